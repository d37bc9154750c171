"""Cats of 256 pixels from `google/ddpm-cat-256`, the published DDPM, in 25 evaluations of its network instead of 1,000.

    diffjax plan --config experiments/ddpm_cat256.py                    # what it will cost
    diffjax sample --config experiments/ddpm_cat256.py --out cats
    diffjax sample --config experiments/ddpm_cat256.py --config.steps=1000 --config.sampler=ddpm \\
        --config.grid=leading --out as_published

Time: 25 steps take 163 s end to end on two cores without AVX512 (random weights of this network), 10 steps 67 s.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment: fields of `diffjax.models.options.Request`; any can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "model": "google/ddpm-cat-256",
            "num": 4,
            "steps": 25,
            "sampler": "unipc",
            "grid": "karras",
            "seed": 0,
        }
    )
