"""The bases of several kinds of experiment: what experiments of a kind have in common.

An experiment is a call that says what differs from them, table by table; a table with another `name` takes the place of
the base's. It has every field: what neither says is the default. `diffjax config --config FILE` prints all.

    pixels(name="mine", data={"name": "captioned_folder", "path": "pictures"}, train={"steps": 500, "batch": 64})
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffjax.config.base import table
from diffjax.config.completion import completed, renamed, trains

PIXELS = {
    "process": {"name": "flow"},
    "prediction": {"name": "x0"},
    "network": "dit",
    "loss": {"weight": {"name": "velocity", "floor": 0.1}, "times": {"name": "logit_normal", "mean": 0.6}},
    "optimizer": {"name": "muon", "dtype": "auto"},
    "log": {"tensorboard": True},
}


def pixels(**fields: Any) -> ConfigDict:
    """A network on pixels that learns x0 along straight lines from noise, by Muon: what the emoji are drawn by.

    Its loss is that of the velocity, with times that favour noisy pictures (Li and He 2025, "Back to Basics").
    """
    return _experiment(PIXELS, fields)


IMAGEN = {
    "data": {"name": "captioned_folder", "crop": "random", "flip": True, "workers": 4},
    "text": {"name": "t5", "path": "google/t5-v1_1-base", "tokens": 64},
    "process": {"name": "cosine"},
    "prediction": {"name": "v"},
    "network": "imagen",
    "loss": {"weight": {"name": "sigmoid", "bias": -1.0}, "times": {"name": "uniform"}},
    "optimizer": {
        "name": "adamw",
        "learning_rate": 1e-4,
        "schedule": {"warmup": 2000, "hold": 0.9, "final": 0.02},
    },
    "train": {"steps": 500000, "batch": 256, "ema": 0.9999, "save_every": 2000, "preview_every": 5000},
    "log": {"tensorboard": True},
    "sample": {"sampler": "dpmpp_2m_sde", "grid": "logsnr", "threshold": 0.95, "prompts": ("",)},
}


def imagen(**fields: Any) -> ConfigDict:
    """A stage of Imagen (Saharia et al. 2022), as MinImagen has it: captioned pictures, captions read by T5."""
    return _experiment(IMAGEN, fields)


DDPM = {
    "process": {"name": "discrete"},
    "prediction": {"name": "eps"},
    "network": "unet",
    "loss": {"weight": {"name": "plain"}, "times": {"name": "table"}, "uniforms": "independent"},
    "optimizer": {
        "name": "adamw",
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "b2": 0.999,
        "schedule": {"warmup": 5000, "hold": 1.0, "final": 1.0},
    },
    "train": {"steps": 800000, "batch": 128, "ema": 0.9999},
    "log": {"tensorboard": True},
    "sample": {"sampler": "ddpm", "grid": "leading", "steps": 1000, "clip": 1.0},
}


def ddpm(**fields: Any) -> ConfigDict:
    """A DDPM: the U-Net, noise table, loss, optimizer and number of steps of Ho et al. 2020, appendix B."""
    return _experiment(DDPM, fields)


_PICTURES = {"name": "captioned_folder", "size": 1024}
FINETUNE = {
    "data": _PICTURES,
    "prior": {"data": _PICTURES},
    "loss": {"weight": {"name": "plain"}, "times": {"name": "logit_normal"}},
    "optimizer": {"name": "adamw", "schedule": {"name": "cosine", "warmup": 50, "final": 0.1}},
    "log": {"tensorboard": True},
}


def finetune(**fields: Any) -> ConfigDict:
    """A published latent model taught captioned pictures, by the loss that it was trained with (Esser et al. 2024)."""
    return _experiment(FINETUNE, fields)


def _experiment(base: dict[str, Any], fields: dict[str, Any]) -> ConfigDict:
    """The fields over those of a base, and all others; None for what an experiment must say and neither does."""
    config = _over(base, renamed(fields))
    return ConfigDict(completed("", config, table(config), lambda kind: None) if trains(config) else config)


def _over(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields over those of a base, table by table; a table with another name replaces the base's."""
    merged = dict(base)
    for name, value in fields.items():
        before = base.get(name)
        if (
            isinstance(before, Mapping)
            and isinstance(value, Mapping)
            and value.get("name") in (None, before.get("name"))
        ):
            value = _over(before, value)
        merged[name] = value
    return merged
