"""The first stage of the emoji cascade: 1,000 pictures of 32 pixels from their names.

    diffjax train --config experiments/minimagen/emoji_base32.py --workdir runs/emoji_base32

The pixel transformer, which a CPU trains best; Imagen's own U-Net with --config.network=imagen.

Time: 18 minutes of CPU time, 30 on two cores that others used too, compilation included. Result, by `diffjax evaluate`:
of 64 training prompts 98.4% find their own picture among 1,000; PSNR 26.5 dB (the mean picture: 11.3 dB), in 25 steps
with guidance 2; others were not measured: `emoji.py`, the same network, draws best in 4 without.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "name": "emoji_base32",
            "seed": 0,
            "data": {"name": "openmoji", "path": "", "subset": "1000", "size": 32, "background": "white"},
            "classes": 0,
            "text": {"name": "words", "tokens": 12, "width": 256, "depth": 1, "heads": 4},
            "process": {"name": "flow", "shift": 1.0},
            "prediction": {"name": "x0"},
            "network": "dit",
            "dit": {"patch": 8, "width": 256, "depth": 6, "heads": 4, "hidden": 672, "rank": 32, "dtype": "auto"},
            "imagen": {
                "dim": 64,
                "mults": (1, 2, 3),
                "blocks": (1, 2, 2),
                "attention": (False, False, True),
                "cross_attention": (False, True, True),
                "patch": 2,
                "heads": 4,
            },
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
                "schedule": {"name": "linear", "warmup": 100, "hold": 0.5, "final": 0.02},
            },
            "train": {
                "steps": 1000,
                "batch": 128,
                "accumulate": 1,
                "ema": 0.998,
                "parallel": "jit",
                "log_every": 20,
                "save_every": 100,
                "preview_every": 0,
                "keep_last": 2,
                "keep_best": 1,
            },
            "log": {"tensorboard": True, "wandb": ""},
            "sample": {
                "sampler": "dpmpp_2m",
                "grid": "uniform",
                "steps": 25,
                "guidance": 2.0,
                "num": 8,
                "prompts": ("red heart", "pizza", "cat face", "rocket", "sunflower", "ghost", "rainbow", "green apple"),
            },
        }
    )
