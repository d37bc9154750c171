"""CIFAR-10 by class, with a transformer or a U-Net.

    diffjax train --config experiments/cifar10.py --workdir runs/cifar10
    diffjax train --config experiments/cifar10.py --workdir runs/cifar10-unet --config.network=unet

Time: 1.7 hours on one H100 as `diffjax plan` predicts it; not measured. TFDS downloads the data (160 MB) on first use.
How many steps to draw with, and which guidance, was not measured.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "name": "cifar10",
            "seed": 0,
            "data": {"name": "cifar10", "split": "train", "size": 32, "flip": True},
            "classes": 10,
            "text": None,
            "process": {"name": "flow", "shift": 1.0},
            "prediction": {"name": "x0"},
            "network": "dit",
            "dit": {"patch": 2, "width": 384, "depth": 12, "heads": 6, "hidden": 1024, "rank": 48, "dtype": "auto"},
            "unet": {"block_out_channels": (128, 256, 256, 256), "dtype": "auto"},
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
                "schedule": {"name": "linear", "warmup": 1000, "hold": 0.5, "final": 0.0},
            },
            "train": {
                "steps": 100000,
                "batch": 256,
                "accumulate": 1,
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
                "sampler": "dpmpp_2m",
                "grid": "uniform",
                "steps": 25,
                "guidance": 1.5,
                "num": 20,
                "prompts": (),
            },
        }
    )
