"""A few steps of the stage that enlarges emoji_tiny_base32.py's pictures, in under a minute; nothing is downloaded.

diffjax train --config experiments/minimagen/emoji_tiny_super64.py --workdir runs/emoji_tiny_super64
diffjax sample --cascade runs/emoji_tiny_base32 runs/emoji_tiny_super64 --prompt "red heart" --out pictures
"""

from ml_collections import ConfigDict

from diffjax.nets.imagen import TINY_SUPER


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "name": "emoji_tiny_super64",
            "seed": 0,
            "data": {"name": "openmoji", "path": "", "subset": "200", "size": 64, "background": "white"},
            "classes": 0,
            "text": {"name": "words", "tokens": 12, "width": 64, "depth": 1, "heads": 4},
            "low_res": {"size": 32, "most": 0.3},
            "process": {"name": "cosine", "shift": 1.0},
            "prediction": {"name": "v"},
            "network": "imagen",
            "imagen": TINY_SUPER,
            "loss": {
                "weight": {"name": "sigmoid", "bias": -1.0},
                "times": {"name": "uniform"},
                "uniforms": "antithetic",
                "drop": 0.1,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "weight_decay": 0.01,
                "clip": 1.0,
                "schedule": {"name": "linear", "warmup": 10, "hold": 0.5, "final": 0.02},
            },
            "train": {
                "steps": 20,
                "batch": 8,
                "accumulate": 1,
                "ema": 0.99,
                "parallel": "jit",
                "log_every": 5,
                "save_every": 10,
                "preview_every": 0,
                "keep_last": 2,
                "keep_best": 1,
            },
            "log": {"tensorboard": False, "wandb": ""},
            "sample": {
                "sampler": "dpmpp_2m",
                "grid": "logsnr",
                "steps": 4,
                "guidance": 1.0,
                "level": 0.1,
                "num": 4,
                "prompts": ("red heart", "pizza", "cat face", "rocket"),
            },
        }
    )
