"""Weights kept in 8 or 4 bits, and read in the dtype of the computation.

A kernel w (..., i, o) becomes whole numbers and scales, `w ~ scale round(w / scale)`, one scale for the i values that
go into an output channel (int8), or for each `group` of them (int4). The scale is the largest of their magnitudes, over
the largest whole number.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from diffjax.utils import struct

KERNELS = r"^blocks(_\d+)?/.*/kernel$"
"""The products of stacked layers, all of T5 and MMDiT but tables and embedders, which stay as they are."""


@struct.dataclass
class Quantized:
    """A kernel in whole numbers; layers read it by `astype`. `scales` are in the dtype that the kernel had.

    `values` are int8 (..., i, o), or bytes (..., i/2, o) of two 4-bit numbers, the lower bits first.
    """

    values: Int[Array, "*layers bytes o"]
    scales: Float[Array, "*layers groups o"]

    def astype(self, dtype: Any) -> Float[Array, "*layers i o"]:
        """The kernel: every whole number times the scale of its group."""
        values = _unpacked(self.values) if self.values.dtype == jnp.uint8 else self.values
        *layers, i, o = values.shape
        grouped = values.reshape(*layers, self.scales.shape[-2], -1, o).astype(jnp.float32)
        return (grouped * self.scales[..., None, :].astype(jnp.float32)).reshape(*layers, i, o).astype(dtype)


def _packed(values: Int[Array, "*layers i o"]) -> Int[Array, "*layers i/2 o"]:
    """Pairs of rows of numbers from -8 to 7 as bytes. A dtype of 4 bits would have XLA unpack all layers to
    read one.
    """
    *layers, i, o = values.shape
    pairs = values.astype(jnp.uint8).reshape(*layers, i // 2, 2, o)
    return (pairs[..., 0, :] & 15) | (pairs[..., 1, :] << 4)


def _unpacked(values: Int[Array, "*layers i/2 o"]) -> Int[Array, "*layers i o"]:
    *layers, half, o = values.shape
    signed = lambda bits: (bits.astype(jnp.int8) ^ 8) - 8
    return jnp.stack([signed(values & 15), signed(values >> 4)], axis=-2).reshape(*layers, 2 * half, o)


@dataclass(frozen=True)
class Scheme:
    """How kernels are kept: in whole numbers up to `most`, and how many inputs share a scale (None, or where `group`
    does not divide them: all).
    """

    most: int
    group: int | None = None

    def reads(self, path: str) -> bool:
        """Whether the parameter of this path is quantised."""
        return re.search(KERNELS, path) is not None

    def __call__(self, kernel: Float[Array, "*layers i o"]) -> Quantized:
        """The kernel in whole numbers."""
        *layers, i, o = kernel.shape
        size = self.group if self.group and i % self.group == 0 else i
        grouped = kernel.reshape(*layers, i // size, size, o).astype(jnp.float32)
        scales = (jnp.max(jnp.abs(grouped), axis=-2) / self.most).astype(kernel.dtype)
        unit = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None, :]
        values = jnp.clip(jnp.round(grouped / unit), -self.most, self.most).astype(jnp.int8).reshape(kernel.shape)
        return Quantized(_packed(values) if self.most < 8 and i % 2 == 0 else values, scales)


SCHEMES = {"int8": Scheme(127), "int4": Scheme(7, 64)}


def quantize_kernels(params: PyTree, scheme: Scheme) -> PyTree:
    """The parameters of a network with its large kernels in whole numbers."""

    def kept(path, leaf):
        return scheme(leaf) if scheme.reads(jax.tree_util.keystr(path, simple=True, separator="/")) else leaf

    return jax.tree_util.tree_map_with_path(kept, params)
