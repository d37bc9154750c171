"""diffjax: diffusion models in pure JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffjax import weights
    from diffjax.diffusion import (
        analytic,
        cascade,
        denoise,
        grid,
        guide,
        local,
        loss,
        ode,
        predict,
        process,
        refine,
        sample,
    )
    from diffjax.loading import load
    from diffjax.utils.image import to_uint8

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "analytic",
    "cascade",
    "denoise",
    "grid",
    "guide",
    "load",
    "local",
    "loss",
    "ode",
    "predict",
    "process",
    "refine",
    "sample",
    "to_uint8",
    "weights",
]

_PLACES = {"load": "diffjax.loading:load", "to_uint8": "diffjax.utils.image:to_uint8", "weights": "diffjax.weights"}


def __getattr__(name: str) -> Any:
    """`diffjax.load`, `diffjax.to_uint8`, `diffjax.weights` and the mathematics by its short names, such as
    `diffjax.process`: imported when they are first asked for.
    """
    if name not in __all__:
        raise AttributeError(f"module 'diffjax' has no attribute {name!r}")
    module, _, attribute = _PLACES.get(name, f"diffjax.diffusion.{name}").partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
