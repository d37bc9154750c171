"""How the devices of a mesh share the work of one network: the rows of its batch, and the heads of its attention."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from diffjax.nets.quantize import Quantized
from diffjax.utils.errors import UserError

TO_HEADS = re.compile(r"(^|/)(to_[qkv]|add_[qkv]_proj)/")
FROM_HEADS = re.compile(r"(^|/)(to_out_0|to_add_out)/kernel\b")
"""The layers whose outputs, and whose inputs, are heads."""

Place = Callable[[Array], Array]


@dataclass(frozen=True)
class Split:
    """The axes of a mesh: along `rows` the batch is split, where they divide it, and along `heads` the heads, to whom
    some of zeros are added until it divides them. One axis that is both splits the heads of a batch that it does not
    divide.
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...] = ()
    heads: str | None = None

    @classmethod
    def here(cls) -> Self | None:
        """That of the mesh under which a program is traced (`jax.sharding.use_abstract_mesh`): heads along its axis
        `model`, rows along all others. None without a mesh, on one device, and in the program of a single device.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size < 2 or mesh.manual_axes:
            return None
        rows = tuple(name for name in mesh.axis_names if name != "model")
        return cls(mesh, rows, "model" if "model" in mesh.axis_names else None)

    def padded(self, heads: int) -> int:
        """The number of heads with those of zeros."""
        return heads if self.heads is None else heads + -heads % self.mesh.shape[self.heads]

    def _row_axes(self, batch: int) -> tuple[str, ...] | None:
        divides = batch % math.prod(self.mesh.shape[name] for name in self.rows) == 0
        return self.rows if self.rows and divides else None

    def place(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Rows where they belong, everything else whole on each device."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self._row_axes(x.shape[0]))))

    def product(self, rows: int, kernel: tuple[int, ...]) -> tuple[Place, Place]:
        """Of a product of so many rows with a kernel (i, o): what is done with all that has rows, and with all that has
        the kernel's shape, gradients included.

        Where devices have other rows and a part of each kernel, the smaller of both is sent to all of them. Left to
        XLA, it is the rows of wide layers, whose kernels are split along their width.
        """
        shape = self.mesh.shape
        if shape.get("data", 1) == 1 or shape.get("model", 1) > 1:
            return _as_it_is, _as_it_is
        return (self._whole, _as_it_is) if rows * sum(kernel) < math.prod(kernel) else (_as_it_is, self._whole)

    def _whole(self, x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec()))

    def attend(
        self,
        attention: Callable[..., Array],
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s n h"],
        v: Float[Array, "b s n h"],
        *scores: Float[Array, "#b #n #t s"] | Bool[Array, "#b #n #t s"] | None,
    ) -> Float[Array, "b t n h"]:
        """`attention(q, k, v, *scores)`, every device with its own rows and heads; `scores` are mask and bias."""
        b, n = q.shape[0], q.shape[2]
        rows, more = self._row_axes(b), self.padded(n) - n
        heads = None if rows and self.heads in rows else self.heads
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more if heads else 0), (0, 0))) for x in (q, k, v))
        widen = lambda x: (
            jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)), mode="edge") if heads and x.shape[1] > 1 else x
        )
        scores = tuple(None if x is None else widen(x) for x in scores)
        whole = PartitionSpec(rows, None, heads)
        of = lambda x: PartitionSpec(rows if x.shape[0] > 1 else None, heads if x.shape[1] > 1 else None)
        specs = (whole, whole, whole, *(PartitionSpec() if x is None else of(x) for x in scores))
        run = jax.shard_map(attention, mesh=self.mesh, in_specs=specs, out_specs=whole, check_vma=False)
        return run(q, k, v, *scores)[:, :, :n]


def _as_it_is(x: Array) -> Array:
    return x


def pad_heads(params: PyTree, heads: int, width: int, more: int) -> PyTree:
    """The parameters with `more` heads of `width` zeros: all products give what they gave.

    Raises `UserError` for 4-bit kernels whose groups of inputs end elsewhere than heads do.
    """
    if not more:
        return params

    def padded(path: Any, leaf: Array | Quantized) -> Array | Quantized:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if TO_HEADS.search(name) and not name.endswith(("/adapter/a", "/adapter/scale")):
            return jax.tree.map(lambda array: _zeros(array, -1, more * width), leaf)
        if not FROM_HEADS.search(name) or name.endswith(("/b", "/scale", "/gain", "/bias")):
            return leaf
        if isinstance(leaf, Quantized):
            return _more_inputs(leaf, heads * width, more * width)
        return _zeros(leaf, -2, more * width)

    return jax.tree_util.tree_map_with_path(padded, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def _more_inputs(kernel: Quantized, inputs: int, more: int) -> Quantized:
    groups, rows = kernel.scales.shape[-2], kernel.values.shape[-2]
    if groups > 1 and more % (inputs // groups):
        raise UserError("--quantize int4 and --shard do not go together for heads of this width: take int8")
    scales = kernel.scales if groups == 1 else _zeros(kernel.scales, -2, more * groups // inputs)
    return Quantized(_zeros(kernel.values, -2, more * rows // inputs), scales)


def _zeros(x: Array, axis: int, more: int) -> Array:
    """One array after the other: programs that devices run together and that wait for each other may stop for ever on a
    CPU of fewer threads than devices.
    """
    width = [(0, 0)] * x.ndim
    width[axis] = (0, more)
    return jax.block_until_ready(jnp.pad(x, width))
