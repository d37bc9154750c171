"""Every captioned OpenMoji (3,953 with skin tones) from its names, at 64 pixels, on one GPU.

    diffjax train --config experiments/emoji64.py --workdir runs/emoji64

Time: 27 minutes on one H100 as `diffjax plan` predicts it; not measured. The transformer of `emoji.py`, with patches
of 4. How many steps to draw with, and which guidance, was not measured; that of `emoji.py`
draws best in 4 steps without guidance.
"""

from ml_collections import ConfigDict

from diffjax.config.kinds import pixels


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return pixels(
        name="emoji64",
        data={"name": "openmoji", "subset": "all", "size": 64},
        text={"name": "words", "width": 512, "depth": 2, "heads": 8},
        dit={"patch": 4, "width": 512, "depth": 12, "heads": 8, "hidden": 1376, "rank": 64, "dtype": "auto"},
        optimizer={"schedule": {"warmup": 500}},
        train={"steps": 16000, "batch": 256, "ema": 0.9995, "log_every": 50, "preview_every": 2000},
        sample={
            "guidance": 2.0,
            "prompts": ("red heart", "pizza", "cat face", "rocket", "sunflower", "ghost", "rainbow", "green apple"),
        },
    )
