"""Imagen's base stage at MinImagen's widths (1.62 G parameters), 64 pixels, captions read by T5.

    diffjax train --config experiments/minimagen/base64.py --workdir runs/base64 --config.data.path=PICTURES

PICTURES is a folder of pictures with captions; any TFDS data set with captions does too (--config.data.name).
For accelerators; it has not been trained to its end, and how best to draw was not measured.
"""

from ml_collections import ConfigDict

from diffjax.config.kinds import imagen
from diffjax.nets.imagen import MINIMAGEN_BASE


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return imagen(
        name="minimagen_base64",
        data={"size": 64},
        imagen={**MINIMAGEN_BASE, "dtype": "auto", "remat": True},
        train={"accumulate": 4},
        sample={"guidance": 5.0},
    )
