"""A few steps of the base stage, in under a minute, to see that everything works; nothing is downloaded.

diffjax train --config experiments/minimagen/emoji_tiny_base32.py --workdir runs/emoji_tiny_base32
"""

from ml_collections import ConfigDict

from diffjax.config.kinds import imagen
from diffjax.nets.imagen import TINY_BASE


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return imagen(
        name="emoji_tiny_base32",
        data={"name": "openmoji", "subset": "200", "size": 32},
        text={"name": "words", "tokens": 12, "width": 64},
        imagen=TINY_BASE,
        optimizer={"learning_rate": 1e-3, "schedule": {"warmup": 10, "hold": 0.5}},
        train={"steps": 20, "batch": 8, "ema": 0.99, "log_every": 5, "save_every": 10, "preview_every": 0},
        log={"tensorboard": False},
        sample={
            "sampler": "dpmpp_2m",
            "steps": 4,
            "guidance": 2.0,
            "threshold": 0.0,
            "num": 4,
            "prompts": ("red heart", "pizza", "cat face", "rocket"),
        },
    )
