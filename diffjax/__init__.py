"""diffjax: diffusion models in pure JAX."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`diffjax.load`, `diffjax.to_uint8` and `diffjax.weights`, imported when they are first asked for."""
    import importlib

    if name == "load":
        return importlib.import_module("diffjax.loading").load
    if name == "to_uint8":
        return importlib.import_module("diffjax.image").to_uint8
    if name == "weights":
        return importlib.import_module("diffjax.weights")
    raise AttributeError(f"module 'diffjax' has no attribute {name!r}")
