"""Checksums of arrays that no host holds whole: sums of numbers that each device can add up for its own part.

An element with bits b at place i counts m(b xor m(i)), where m mixes 32 bits and is one to one (the finalizer of
MurmurHash3): one element that has changed always changes the sum modulo 2^32, however the array is split.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from diffjax.parallel import hosts
from diffjax.parallel.layout import fetch
from diffjax.utils.provenance import checksum


def of(tree: PyTree) -> int:
    """The CRC-32 of a tree (`provenance.checksum`), or `by_place` where its arrays are spread over hosts."""
    return by_place(tree) if hosts.spread(tree) else checksum(tree)


def by_place(tree: PyTree) -> int:
    """The sum of the array's checksums, the first counted once, the second three times, and so on, modulo 2^32."""
    totals = [int(_leaf(leaf)) for leaf in jax.tree.leaves(tree)]
    return sum((2 * i + 1) * total for i, total in enumerate(totals)) % 2**32


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.jit(_of_array)(fetch(leaf))
    leaf = np.ascontiguousarray(leaf)
    bits = leaf.view(f"u{leaf.dtype.itemsize}").astype(np.uint32)
    return _summed(np, bits, np.arange(bits.size, dtype=np.uint32).reshape(bits.shape))


def _of_array(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return _summed(jnp, bits, place)


def _summed(xp: ModuleType, bits: Any, place: Any) -> Any:
    return xp.sum(_mixed(xp, bits ^ _mixed(xp, place)), dtype=xp.uint32)


def _mixed(xp: ModuleType, h: Any) -> Any:
    h = (h ^ (h >> 16)) * xp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * xp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
