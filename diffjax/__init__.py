"""diffjax: diffusion models in pure JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

_MATHEMATICS = (
    "process",
    "predict",
    "denoise",
    "guide",
    "refine",
    "grid",
    "sample",
    "ode",
    "loss",
    "cascade",
    "analytic",
)
_NAMES = {
    "load": "diffjax.loading:load",
    "to_uint8": "diffjax.utils.image:to_uint8",
    "weights": "diffjax.weights",
    **{name: f"diffjax.diffusion.{name}" for name in _MATHEMATICS},
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    """`diffjax.load`, `diffjax.to_uint8`, `diffjax.weights` and the mathematics by its short names, such as
    `diffjax.process`: imported when they are first asked for.
    """
    if name not in _NAMES:
        raise AttributeError(f"module 'diffjax' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
