"""Attention by fused kernels, which keep no scores: cuDNN's on NVIDIA GPUs, Pallas' flash attention on TPUs.

A program takes the one of the platform that it is lowered for, which need not be this process's.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffjax.nets.split import Split
from diffjax.utils.install import has_compiler

BLOCK = 512
"""Queries and keys that Pallas reads at a time."""

SHORTEST = 1024
"""Queries and keys from which on Pallas' is used: padding to whole blocks costs shorter ones too much."""


def kernels(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], plain: bool
) -> dict[str, Callable[..., Float[Array, "b t n h"]]]:
    """The functions of (q, k, v, mask, bias) that take queries and keys of this kind, by platform; `plain`: without
    mask and bias. XLA splits none of them by itself: under a mesh each device has its own rows and heads.
    """
    found, split = {}, Split.here()
    if has_compiler("cuda") and _cudnn_reads(q):
        found["cuda"] = cudnn
    long = min(q.shape[1], k.shape[1]) >= SHORTEST
    fits = plain and long and q.dtype == jnp.bfloat16 and q.shape[-1] % 64 == 0
    if has_compiler("tpu") and fits and (split or _is_alone()):
        found["tpu"] = lambda q, k, v, mask, bias: pallas(q, k, v)
    return {name: functools.partial(split.attend, kernel) for name, kernel in found.items()} if split else found


def _cudnn_reads(q: Array) -> bool:
    """Whether cuDNN's fused attention takes this width and dtype, on this process's GPU or, without one, on an A100 and
    later ones.
    """
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "8.0")
    generation = int(capability.split(".")[0]) if capability.replace(".", "").isdigit() else 0
    widest = 256 if generation >= 9 else 128 if generation >= 8 else 0
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= widest


def _is_alone() -> bool:
    """Whether what is traced is a program of one device: of `shard_map`, under a mesh of one, or on the only TPU."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names:
        return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.default_backend() == "tpu" and jax.device_count() == 1


def cudnn(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s n h"],
    v: Float[Array, "b s n h"],
    mask: Bool[Array, "#b #n #t s"] | None,
    bias: Float[Array, "#b #n #t s"] | None,
) -> Float[Array, "b t n h"]:
    """cuDNN's fused attention; its gradient wants even lengths, so an odd one gets a token that is left out again."""
    (b, t), s = q.shape[:2], k.shape[1]
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    whole = lambda x: jnp.pad(jnp.broadcast_to(x, (*x.shape[:2], t, s)), ((0, 0), (0, 0), (0, t % 2), (0, s % 2)))
    mask = None if mask is None else whole(mask)
    bias = None if bias is None else whole(bias.astype(q.dtype))
    lengths = [jnp.full(b, length, jnp.int32) if t % 2 or s % 2 else None for length in (t, s)]
    y = jax.nn.dot_product_attention(
        *(even(q), even(k), even(v), bias, mask),
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        implementation="cudnn",
    )
    return y[:, :t]


def pallas(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], v: Float[Array, "b s n h"]
) -> Float[Array, "b t n h"]:
    """Pallas' flash attention, of arrays that are on one device: XLA does not split it."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    (b, t), s, h = q.shape[:2], k.shape[1], q.shape[-1]
    padded = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % BLOCK), (0, 0)))
    q, k, v = padded(q), padded(k), padded(v)
    is_key = jnp.broadcast_to((jnp.arange(k.shape[2]) < s).astype(jnp.int32), (b, k.shape[2]))
    segments = kernel.SegmentIds(jnp.ones((b, q.shape[2]), jnp.int32), is_key)
    sizes = kernel.BlockSizes(BLOCK, BLOCK, BLOCK, 1, *(BLOCK,) * 7)
    y = kernel.flash_attention(q, k, v, segment_ids=segments, sm_scale=1 / math.sqrt(h), block_sizes=sizes)
    return jnp.swapaxes(y, 1, 2)[:, :t]
