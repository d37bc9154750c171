"""Weights kept in 8 or 4 bits, and read in the dtype of the computation.

A kernel w (..., i, o) becomes whole numbers and scales, `w ~ scale round(w / scale)`, one scale for the i values that go into
an output channel (int8), or for each `group` of them (int4). The scale is the largest of their magnitudes, over the largest
whole number.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from diffjax import struct

KERNELS = r"^blocks(_\d+)?/.*/kernel$"
"""The products of stacked layers, all of T5 and MMDiT but tables and embedders, which stay as they are."""


@struct.dataclass
class Quantized:
    """A kernel in whole numbers; layers read it by `astype`. `scales` are in the dtype that the kernel had."""

    values: Int[Array, "*layers i o"]
    scales: Float[Array, "*layers groups o"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.values.shape

    def astype(self, dtype: Any) -> Float[Array, "*layers i o"]:
        """The kernel: every whole number times the scale of its group."""
        *layers, i, o = self.values.shape
        grouped = self.values.reshape(*layers, self.scales.shape[-2], -1, o).astype(jnp.float32)
        return (grouped * self.scales[..., None, :].astype(jnp.float32)).reshape(*layers, i, o).astype(dtype)


@dataclass(frozen=True)
class Scheme:
    """How kernels are kept: in which whole numbers, and how many inputs share a scale (None, or where `group` does not
    divide them: all).
    """

    dtype: Any
    group: int | None = None

    def reads(self, path: str) -> bool:
        """Whether the parameter of this path is quantised."""
        return re.search(KERNELS, path) is not None

    def __call__(self, kernel: Float[Array, "*layers i o"]) -> Quantized:
        """The kernel in whole numbers."""
        *layers, i, o = kernel.shape
        size = self.group if self.group and i % self.group == 0 else i
        grouped = kernel.reshape(*layers, i // size, size, o).astype(jnp.float32)
        most = jnp.iinfo(self.dtype).max
        scales = (jnp.max(jnp.abs(grouped), axis=-2) / most).astype(kernel.dtype)
        unit = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None, :]
        values = jnp.clip(jnp.round(grouped / unit), -most, most).astype(self.dtype)
        return Quantized(values.reshape(kernel.shape), scales)


SCHEMES = {"int8": Scheme(jnp.int8), "int4": Scheme(jnp.int4, 64)}


def quantize(params: PyTree, scheme: Scheme) -> PyTree:
    """The parameters of a network with its large kernels in whole numbers."""

    def kept(path, leaf):
        return scheme(leaf) if scheme.reads(jax.tree_util.keystr(path, simple=True, separator="/")) else leaf

    return jax.tree_util.tree_map_with_path(kept, params)
