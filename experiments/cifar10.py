"""CIFAR-10 by class, with a transformer or a U-Net.

    diffjax train --config experiments/cifar10.py --workdir runs/cifar10
    diffjax train --config experiments/cifar10.py --workdir runs/cifar10-unet --config.network=unet

Time: 1.7 hours on one H100 as `diffjax plan` predicts it; not measured. TFDS downloads the data (160 MB) on first use.
How many steps to draw with, and which guidance, was not measured.
"""

from ml_collections import ConfigDict

from diffjax.config.kinds import pixels


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return pixels(
        name="cifar10",
        data={"name": "cifar10", "size": 32, "flip": True},
        classes=10,
        dit={"patch": 2, "width": 384, "depth": 12, "heads": 6, "hidden": 1024, "rank": 48, "dtype": "auto"},
        unet={"dtype": "auto"},
        optimizer={"schedule": {"warmup": 1000}},
        train={"steps": 100000, "batch": 256, "ema": 0.9999, "save_every": 2000, "preview_every": 5000},
        sample={"guidance": 1.5, "num": 20},
    )
