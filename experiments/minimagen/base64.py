"""Imagen's base stage at MinImagen's widths (1.62 G parameters), 64 pixels, captions read by T5.

    diffjax train --config experiments/minimagen/base64.py --workdir runs/base64 --config.data.path=PICTURES

PICTURES is a folder of pictures with captions; any TFDS data set with captions does too (--config.data.name).
For accelerators; it has not been trained to its end, and how best to draw was not measured.
"""

from ml_collections import ConfigDict

from diffjax.nets.imagen import MINIMAGEN_BASE


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "name": "minimagen_base64",
            "seed": 0,
            "data": {
                "name": "captioned_folder",
                "path": "",
                "size": 64,
                "crop": "random",
                "flip": True,
                "workers": 4,
            },
            "classes": 0,
            "text": {"name": "t5", "path": "google/t5-v1_1-base", "tokens": 64},
            "process": {"name": "cosine", "shift": 1.0},
            "prediction": {"name": "v"},
            "network": "imagen",
            "imagen": {**MINIMAGEN_BASE, "dtype": "auto", "remat": True},
            "loss": {
                "weight": {"name": "sigmoid", "bias": -1.0},
                "times": {"name": "uniform"},
                "uniforms": "antithetic",
                "drop": 0.1,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "weight_decay": 0.01,
                "clip": 1.0,
                "schedule": {"name": "linear", "warmup": 2000, "hold": 0.9, "final": 0.02},
            },
            "train": {
                "steps": 500000,
                "batch": 256,
                "accumulate": 4,
                "ema": 0.9999,
                "parallel": "jit",
                "log_every": 100,
                "save_every": 2000,
                "preview_every": 5000,
                "keep_last": 2,
                "keep_best": 1,
            },
            "log": {"tensorboard": True, "wandb": ""},
            "sample": {
                "sampler": "dpmpp_2m_sde",
                "grid": "logsnr",
                "steps": 25,
                "guidance": 5.0,
                "threshold": 0.95,
                "num": 16,
                "prompts": ("",),
            },
        }
    )
