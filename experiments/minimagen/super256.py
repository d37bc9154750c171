"""Imagen's efficient stage at MinImagen's widths (0.68 G parameters), from 64 to 256 pixels, captions read by T5.

    diffjax train --config experiments/minimagen/super256.py --workdir runs/super256 --config.data.path=PICTURES
    diffjax sample --cascade runs/base64 runs/super256 --prompt "a lighthouse at dusk" --out pictures

For accelerators; it has not been trained to its end, and how best to draw was not measured.
"""

from ml_collections import ConfigDict

from diffjax.config.kinds import imagen
from diffjax.nets.imagen import MINIMAGEN_SUPER


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return imagen(
        name="minimagen_super256",
        data={"size": 256},
        low_res={"size": 64, "max_level": 0.5},
        imagen={**MINIMAGEN_SUPER, "dtype": "auto", "remat": True},
        train={"accumulate": 8},
        sample={"steps": 10, "guidance": 3.0, "level": 0.1},
    )
