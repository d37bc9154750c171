"""Every captioned OpenMoji (3,953 with skin tones) from its names, at 64 pixels, on one GPU.

    diffjax train --config experiments/emoji64.py --workdir runs/emoji64

Time: 27 minutes on one H100 as `diffjax plan` predicts it; not measured. The transformer of `emoji.py`, with patches
of 4. How many steps to draw with, and which guidance, was not measured; that of `emoji.py`
draws best in 4 steps without guidance.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "name": "emoji64",
            "seed": 0,
            "data": {"name": "openmoji", "path": "", "subset": "all", "size": 64, "background": "white"},
            "classes": 0,
            "text": {"name": "words", "tokens": 16, "width": 512, "depth": 2, "heads": 8},
            "process": {"name": "flow", "shift": 1.0},
            "prediction": {"name": "x0"},
            "network": "dit",
            "dit": {"patch": 4, "width": 512, "depth": 12, "heads": 8, "hidden": 1376, "rank": 64, "dtype": "auto"},
            "loss": {
                "weight": {"name": "velocity", "floor": 0.1},
                "times": {"name": "logit_normal", "mean": 0.6, "std": 1.0},
                "uniforms": "antithetic",
                "drop": 0.1,
            },
            "optimizer": {
                "name": "muon",
                "learning_rate": 0.02,
                "adam_learning_rate": 2e-3,
                "weight_decay": 0.01,
                "clip": 1.0,
                "schedule": {"name": "linear", "warmup": 500, "hold": 0.5, "final": 0.0},
            },
            "train": {
                "steps": 16000,
                "batch": 256,
                "accumulate": 1,
                "ema": 0.9995,
                "parallel": "jit",
                "log_every": 50,
                "save_every": 1000,
                "preview_every": 2000,
                "keep_last": 2,
                "keep_best": 1,
            },
            "log": {"tensorboard": True, "wandb": ""},
            "sample": {
                "sampler": "dpmpp_2m",
                "grid": "uniform",
                "steps": 25,
                "guidance": 2.0,
                "num": 16,
                "prompts": ("red heart", "pizza", "cat face", "rocket", "sunflower", "ghost", "rainbow", "green apple"),
            },
        }
    )
