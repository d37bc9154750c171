"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): `x W + scale (x A) B`, W frozen, A (i, r) and B (r, o) trained.

Adapters are a flat table, parameter path -> `Adapter`, beside parameters that stay as they are, in whatever dtype or number of
bits; those of stacked layers are stacked. `join` makes one tree of both, which any network of `layers.Dense` reads.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Key

from diffjax import struct
from diffjax.errors import UserError
from diffjax.quantize import Quantized


@struct.dataclass
class Adapter:
    """One kernel's A and B; `scale` is alpha / r, of each layer of a stack."""

    a: Float[Array, "*layers i r"]
    b: Float[Array, "*layers r o"]
    scale: Float[Array, "*layers"]


@struct.dataclass
class LowRank:
    """A kernel with its adapter, which `layers.matmul` reads."""

    kernel: Float[Array, "*layers i o"] | Quantized
    adapter: Adapter


Adapters = Mapping[str, Adapter]


def create(key: Key[Array, ""], shapes: Mapping[str, tuple[int, ...]], rank: int, alpha: float) -> dict[str, Adapter]:
    """Adapters for kernels of these shapes by path: A is normal with deviation 1 / rank, B is zero."""

    def adapter(key: Key[Array, ""], shape: tuple[int, ...]) -> Adapter:
        *layers, i, o = shape
        a = jax.random.normal(key, (*layers, i, rank)) / rank
        return Adapter(a, jnp.zeros((*layers, rank, o)), jnp.full(layers, alpha / rank))

    keys = jax.random.split(key, len(shapes))
    return {path: adapter(key, shapes[path]) for path, key in zip(sorted(shapes), keys)}


def chosen(shapes: Mapping[str, tuple[int, ...]], targets: str) -> dict[str, tuple[int, ...]]:
    """Those of the kernels in whose path the regular expression `targets` is found. Raises `UserError` for none."""
    try:
        found = {path: shape for path, shape in shapes.items() if re.search(targets, path)}
    except re.error as error:
        raise UserError(f"lora.targets={targets!r} is no regular expression: {error}") from error
    if not found:
        raise UserError(f"lora.targets={targets!r} matches no linear layer; their paths are like {', '.join(list(shapes)[:3])}")
    return found


def join(params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """The parameters, each adapted kernel as a `LowRank`."""
    leaves = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(leaves | {path: LowRank(leaves[path], adapters[path]) for path in adapters}, sep="/")


def merge(params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """The parameters, each adapted kernel as W + scale A B in its own dtype."""
    leaves = dict(traverse_util.flatten_dict(params, sep="/"))
    for path, adapter in adapters.items():
        change = adapter.scale[..., None, None] * (adapter.a @ adapter.b)
        leaves[path] = (leaves[path].astype(jnp.float32) + change).astype(leaves[path].dtype)
    return traverse_util.unflatten_dict(leaves, sep="/")
