"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): `x W + scale (x A) B`, W frozen, A (i, r) and B (r, o) trained.

Adapters are a flat table, parameter path -> `Adapter`, beside parameters that stay as they are, in whatever dtype or
number of bits; those of stacked layers are stacked. `join` makes one tree of both, which any network of
`layers.Dense` reads.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float, Key

from diffjax.nets.quantize import Quantized
from diffjax.utils import struct
from diffjax.utils.errors import UserError

Kernel = Float[Array, "*layers i o"] | Quantized


@struct.dataclass
class Adapter:
    """What makes `gain x W + ((x A) scale) B + bias` of one kernel's `x W`, and of each layer's of a stack.

    `scale` is alpha / r, one number for each of the r products, so that several adapters of a kernel are one of a
    larger rank. Most have no `gain` (it is 1) and no `bias` (0).
    """

    a: Float[Array, "*layers i r"]
    b: Float[Array, "*layers r o"]
    scale: Float[Array, "*layers r"]
    gain: Float[Array, "*layers o"] | None = None
    bias: Float[Array, "*layers o"] | None = None


@struct.dataclass
class Decomposed:
    """A weight-decomposed adapter (DoRA, Liu et al. 2024, arXiv:2402.09353, equation 5): the kernel V = W + scale A B
    becomes `magnitude V / |V|`, |V| the norm of each column, which makes one output. A layer whose magnitude is NaN has
    V itself.
    """

    adapter: Adapter
    magnitude: Float[Array, "*layers o"]

    def on(self, kernel: Kernel) -> Adapter:
        """The same as an adapter of this kernel: gain is magnitude / |V|, and B is multiplied by it."""
        return _plain(kernel, self)


@jax.jit
def _plain(kernel: Kernel, decomposed: Decomposed) -> Adapter:
    layers = kernel, decomposed
    gain = lax.map(_gain, layers) if decomposed.magnitude.ndim > 1 else _gain(layers)
    adapter = decomposed.adapter
    return dataclasses.replace(adapter, b=adapter.b * gain[..., None, :], gain=gain)


def _gain(layer: tuple[Kernel, Decomposed]) -> Float[Array, " o"]:
    kernel, decomposed = layer
    adapter, magnitude = decomposed.adapter, decomposed.magnitude
    change = jnp.matmul(adapter.a * adapter.scale, adapter.b, precision="highest")
    norm = jnp.linalg.norm(kernel.astype(jnp.float32) + change, axis=0)
    return jnp.where(jnp.isnan(magnitude) | (norm == 0), 1, magnitude / jnp.where(norm == 0, 1, norm))


@struct.dataclass
class LowRank:
    """A kernel with its adapter, which `layers.matmul` reads."""

    kernel: Kernel
    adapter: Adapter


Adapters = Mapping[str, Adapter]


def create(key: Key[Array, ""], shapes: Mapping[str, tuple[int, ...]], rank: int, alpha: float) -> dict[str, Adapter]:
    """Adapters for kernels of these shapes by path: A is normal with deviation 1 / rank, B is zero."""

    def adapter(key: Key[Array, ""], shape: tuple[int, ...]) -> Adapter:
        *layers, i, o = shape
        a = jax.random.normal(key, (*layers, i, rank)) / rank
        return Adapter(a, jnp.zeros((*layers, rank, o)), jnp.full((*layers, rank), alpha / rank))

    keys = jax.random.split(key, len(shapes))
    return {path: adapter(key, shapes[path]) for path, key in zip(sorted(shapes), keys)}


def chosen(shapes: Mapping[str, tuple[int, ...]], targets: str) -> dict[str, tuple[int, ...]]:
    """Those of the kernels in whose path the regular expression `targets` is found. Raises `UserError` for none."""
    try:
        found = {path: shape for path, shape in shapes.items() if re.search(targets, path)}
    except re.error as error:
        raise UserError(f"lora.targets={targets!r} is no regular expression: {error}") from error
    if not found:
        raise UserError(
            f"lora.targets={targets!r} matches no linear layer; their paths are like {', '.join(list(shapes)[:3])}"
        )
    return found


def join(params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """The parameters, each adapted kernel as a `LowRank`."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        leaves | {path: LowRank(leaves[path], adapters[path]) for path in adapters}, sep="/"
    )


def add(
    params: Mapping[str, Any], weighted: Sequence[tuple[Mapping[str, Adapter | Decomposed], float]]
) -> dict[str, Any]:
    """The parameters with several tables of adapters, each with its strength: every kernel is
    `W + sum strength (W' - W)`, where W' is what one table alone makes of W.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    found: dict[str, list[tuple[Adapter, float]]] = {}
    for adapters, strength in weighted:
        for path, adapter in adapters.items():
            plain = adapter.on(leaves[path]) if isinstance(adapter, Decomposed) else adapter
            found.setdefault(path, []).append((plain, strength))
    return join(params, {path: _sum(of_one) for path, of_one in found.items()})


def _sum(weighted: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter for several of a kernel, side by side."""
    a, b = (jnp.concatenate([getattr(one, name) for one, _ in weighted], axis) for name, axis in (("a", -1), ("b", -2)))
    scale = jnp.concatenate([strength * one.scale for one, strength in weighted], -1)
    gains = [strength * (one.gain - 1) for one, strength in weighted if one.gain is not None]
    biases = [strength * one.bias for one, strength in weighted if one.bias is not None]
    gain = 1 + functools.reduce(jnp.add, gains) if gains else None
    return Adapter(a, b, scale, gain, functools.reduce(jnp.add, biases) if biases else None)
