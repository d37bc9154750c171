"""The parts that networks are made of: timestep embedding, norms, products with a dtype policy, attention, ResBlock.

The dtype policy: parameters are kept in `param_dtype`, products read `dtype` and accumulate in float32, statistics and
softmax are float32, and a layer returns `dtype`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from diffjax.nets import flash
from diffjax.nets.convolution import Conv, convolve, widen
from diffjax.nets.lora import LowRank
from diffjax.nets.quantize import Quantized
from diffjax.nets.split import Place, Split

Dtype = Any

# Above this many float32 scores, 16 MB of them, attention works through heads and queries in turn.
MAX_SCORES = 2**22


def timestep_embedding(
    t: Float[Array, " b"], dim: int, max_period: float = 10000.0, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "b dim"]:
    """`[cos(t w), sin(t w)]` in float32, `w_i = max_period^(-i / (dim/2 - freq_shift))`; an odd `dim` ends in a zero.

    `flip_sin_to_cos=False` puts the sines first. DDPM (arXiv:2006.11239) is `flip_sin_to_cos=False, freq_shift=1`.
    """
    half = dim // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    angles = t.astype(jnp.float32)[:, None] * np.exp(exponent, dtype=np.float64).astype(np.float32)
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


def group_norm(x: Float[Array, "b *space c"], groups: int, eps: float) -> Float[Array, "b *space c"]:
    """`(x - mean) / sqrt(var + eps)` over the space and each group of `c / groups` channels; float32 in and out.

    One pass over `x` gives every channel's sums of `d` and `d^2`, which then join into groups: `var = E[d^2] - E[d]^2`.
    `d` is `x` less the mean of the group's first row, so that a large mean does not cancel.
    """
    b, c = x.shape[0], x.shape[-1]
    spread = lambda value: jnp.repeat(value, c // groups, axis=-1).reshape(b, *(1,) * (x.ndim - 2), c)
    x = x.astype(jnp.float32)
    shift = lax.stop_gradient(jnp.mean(x[:, 0].reshape(b, -1, groups, c // groups), axis=(1, 3)))
    d = x - spread(shift)
    space = tuple(range(1, x.ndim - 1))
    mean, square = (jnp.mean(jnp.mean(y, space).reshape(b, groups, -1), axis=-1) for y in (d, d * d))
    inverse = lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + eps)
    return (d - spread(mean)) * spread(inverse)


class GroupNorm(nn.Module):
    """`group_norm` with a learned scale and bias per channel (arXiv:1803.08494)."""

    groups: int = 32
    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return (group_norm(x, self.groups, self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (arXiv:1910.07467)."""

    eps: float = 1e-6
    use_scale: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        x = x.astype(jnp.float32)
        y = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        if self.use_scale:
            y = y * self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return y.astype(self.dtype)


def matmul(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"] | Quantized | LowRank, dtype: Dtype
) -> Float[Array, "*batch o"]:
    """`x @ kernel` read in `dtype` and accumulated in float32 or wider, which is also what it returns; accelerators
    round sums of bfloat16 and float16 to these once, so that half as many bytes leave a product, and a device.

    The kernel may be a `Quantized` one, which becomes `dtype` here, one layer of a stack at a time, or a `LowRank` one.
    In bfloat16 and float16 both products of the backward pass read `dtype` as well (autodiff alone would take a float32
    cotangent to a float32 product), and only reverse mode is defined. Under a mesh, devices send each other what
    `Split.product` says.
    """
    if isinstance(kernel, LowRank):
        return _adapted_matmul(x, kernel, dtype)
    rows = x.reshape(-1, x.shape[-1])
    kernel = kernel.astype(dtype) if isinstance(kernel, Quantized) else kernel
    product = _half_matmul if jnp.dtype(dtype).itemsize < 4 else _wide_matmul
    return jnp.reshape(product(rows, kernel, dtype, Split.here()), (*x.shape[:-1], kernel.shape[-1]))


def _adapted_matmul(x: Float[Array, "*batch i"], whole: LowRank, dtype: Dtype) -> Float[Array, "*batch o"]:
    adapter, y = whole.adapter, matmul(x, whole.kernel, dtype)
    y = y if adapter.gain is None else adapter.gain * y
    y = y + matmul(matmul(x, adapter.a, dtype) * adapter.scale, adapter.b, dtype)
    return y if adapter.bias is None else y + adapter.bias


def _placing(x: Array, kernel: Array, split: Split | None) -> tuple[Place, Place]:
    keep = lambda y: y
    return split.product(len(x), kernel.shape) if split else (keep, keep)


def _wide_matmul(x: Array, kernel: Array, dtype: Dtype, split: Split | None) -> Array:
    on_rows, on_kernel = _placing(x, kernel, split)
    return on_rows(on_rows(x.astype(dtype)) @ on_kernel(kernel.astype(dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _half_matmul(x: Array, kernel: Array, dtype: Dtype, split: Split | None) -> Array:
    return _half_matmul_forward(x, kernel, dtype, split)[0]


def _half_matmul_forward(x: Array, kernel: Array, dtype: Dtype, split: Split | None) -> tuple[Array, tuple]:
    on_rows, on_kernel = _placing(x, kernel, split)
    half = on_rows(x.astype(dtype)), on_kernel(kernel.astype(dtype))
    return on_rows(_rounded(*half, 1, 0)), (*half, x[:0], kernel[:0])


def _half_matmul_backward(dtype: Dtype, split: Split | None, saved: tuple, cotangent: Array) -> tuple[Array, Array]:
    x, kernel, like_x, like_kernel = saved
    on_rows, on_kernel = _placing(x, kernel, split)
    cotangent = on_rows(cotangent.astype(dtype))
    to_kernel = on_kernel(_outer_product(x, cotangent))
    return on_rows(_rounded(cotangent, kernel, 1, 1)).astype(like_x.dtype), to_kernel.astype(like_kernel.dtype)


_half_matmul.defvjp(_half_matmul_forward, _half_matmul_backward)


@jax.jit  # as `_rounded` is: each shape is traced and lowered once, however many layers have it
def _outer_product(x: Array, y: Array) -> Array:
    """`x^T y` in float32."""
    return lax.platform_dependent(x, y, cpu=_outer_product_cpu, default=lambda x, y: _product(x, y, 0, 0))


def _outer_product_cpu(x: Array, y: Array) -> Array:
    """`x^T y`; XLA's fast CPU product reads rows, so the narrower one is transposed first, exactly, by a product
    with 1.
    """
    if x.shape[1] > y.shape[1]:
        return lax.optimization_barrier(_outer_product_cpu(y, x)).T  # else XLA reads columns after all
    transposed = _product(jnp.eye(x.shape[1], dtype=x.dtype), x, 1, 1).astype(x.dtype)
    return _product(transposed, y, 1, 0)


def _product(x: Array, y: Array, x_axis: int, y_axis: int, dtype: Dtype = jnp.float32) -> Array:
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rounded(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product in float32, on accelerators rounded to the dtype of `x` as it leaves the unit that accumulates it."""
    wide = lambda x, y: _product(x, y, x_axis, y_axis)
    half = lambda x, y: _product(x, y, x_axis, y_axis, x.dtype).astype(jnp.float32)
    return lax.platform_dependent(x, y, cpu=wide, default=half)


class Dense(nn.Module):
    """`x @ kernel + bias` over the last axis with the dtype policy of this module's head."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        y = matmul(x, self._kernel(x.shape[-1]), self.dtype)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return y.astype(self.dtype)

    def _kernel(self, width: int) -> Array | Quantized | LowRank:
        kept = self.get_variable("params", "kernel") if self.has_variable("params", "kernel") else None
        if isinstance(kept, Quantized | LowRank):
            return kept
        return self.param("kernel", self.kernel_init, (width, self.features), self.param_dtype)


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s n h"],
    v: Float[Array, "b s n h"],
    mask: Bool[Array, "#b #n #t s"] | None = None,
    bias: Float[Array, "#b #n #t s"] | None = None,
) -> Float[Array, "b t n h"]:
    """`softmax(q k^T / sqrt(h) + bias) v` per head, softmax in float32; a query whose keys are all masked gives 0.

    `mask` is True where a key is seen. On a platform that has one, a fused kernel (`flash.kernels`); elsewhere the
    score matrix, of one head and some queries at a time when it would pass `MAX_SCORES` numbers, each computed again in
    the backward pass.
    """
    fused = flash.kernels(q, k, mask is None and bias is None)
    given = q, k, v, mask, bias
    y = lax.platform_dependent(*given, default=_chunked, **fused) if fused else _chunked(*given)
    if mask is not None:
        seen = jnp.any(mask, axis=-1)
        y = jnp.where(jnp.swapaxes(seen, 1, 2)[..., None], y, 0)
    return y.astype(q.dtype)


def _chunked(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
    dtype = q.dtype
    if dtype == jnp.float16:  # which XLA's CPU products do not know
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return scaled_dot_product(q, k, v, mask, bias, MAX_SCORES).astype(dtype)


@functools.partial(jax.jit, static_argnums=5)
def scaled_dot_product(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None, most: int) -> Array:
    """Attention by way of the scores: if there are more than `most`, head by head, and of a head that many at a time.

    What a CPU's caches hold is two to four times as fast as all scores in memory. `nets.program_cost` knows it by
    its name.
    """
    (b, t, n, _), s = q.shape, k.shape[1]
    if b * n * t * s <= most:
        return jax.nn.dot_product_attention(q, k, v, bias, mask, implementation="xla")
    head = functools.partial(_in_parts, _tile, (1, None, None, 2, 2), max(1, most // (b * s)))
    return _in_parts(head, (2, 2, 2, 1, 1), 1, q, k, v, mask, bias)


def _in_parts(
    function: Callable[..., Array],
    axes: tuple[int, *tuple[int | None, ...]],
    size: int,
    first: Array,
    *others: Array | None,
) -> Array:
    """`function` of parts of at most `size` along each array's axis, one part after the other; arrays without that
    axis, or with one place on it, go into all parts. The result is put together along the axis of the first.
    """
    arrays, length = (first, *others), first.shape[axes[0]]
    count = -(-length // size)
    size = -(-length // count)

    def split(x: Array | None, axis: int | None) -> Array | None:
        if x is None or axis is None or x.shape[axis] != length:
            return None
        width = [(0, 0)] * x.ndim
        width[axis] = (0, count * size - length)
        x = jnp.pad(x, width)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    moving = [split(x, axis) for x, axis in zip(arrays, axes)]
    fixed = [x if parts is None else None for x, parts in zip(arrays, moving)]
    _, y = lax.scan(functools.partial(_part, function, fixed), None, moving)
    y = jnp.moveaxis(y, 0, axes[0])
    y = y.reshape(*y.shape[: axes[0]], count * size, *y.shape[axes[0] + 2 :])
    return lax.slice_in_dim(y, 0, length, axis=axes[0])


def _part(function: Callable[..., Array], fixed: list, carry: None, moving: list) -> tuple[None, Array]:
    return carry, function(*(x if y is None else y for x, y in zip(fixed, moving)))


@jax.checkpoint
def _tile(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
    """Attention of some queries of one head, `sum_s p_s v_s / sum_s p_s` with `p = exp(score - max score)`."""
    q, k, v = (x[:, :, 0] for x in (q, k, v))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bth,bsh->bts", q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias[:, 0]
    scores = scores if mask is None else jnp.where(mask[:, 0], scores, -0.7 * jnp.finfo(jnp.float32).max)
    p = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    y = product("bts,bsh->bth", p.astype(v.dtype), v) / jnp.sum(p, axis=-1, keepdims=True)
    return y.astype(v.dtype)[:, :, None]


def attention_weights(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], mask: Bool[Array, "#b 1 #t s"] | None = None
) -> Float[Array, "b t s"]:
    """How much each query attends to each key, `softmax(q k^T / sqrt(h))`, the mean over the heads, in float32; one
    head after the other, so that the scores of one are in memory. A query whose keys are all masked attends to none.
    """

    def add(total: Array, head: tuple[Array, ...]) -> tuple[Array, None]:
        scores = jnp.einsum("bth,bsh->bts", *head, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
        return total + jax.nn.softmax(scores, where=None if mask is None else mask[:, 0]), None

    heads = tuple(jnp.moveaxis(x.astype(jnp.float32), 2, 0) for x in (q, k))
    total = jnp.zeros((q.shape[0], q.shape[1], k.shape[1]), jnp.float32)
    return lax.scan(add, total, heads)[0] / q.shape[2]


def keep_words(module: nn.Module, q: Array, k: Array, mask: Array | None, image: slice, text: slice) -> None:
    """Sow how much the image's tokens attend to the text's, `attention_weights`, as the intermediate "words".

    Nothing is computed unless the network is applied with `mutable=["intermediates"]`.
    """
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", "words", attention_weights(q[:, image], k, mask)[:, :, text])


def rotary(
    positions: Float[np.ndarray, "t axes"], head_dim: int, max_period: float = 100.0
) -> Float[np.ndarray, "2 t f"]:
    """Cosine and sine of every token's angles, `position * w_i`, `w_i = max_period^(-i / n)`, for `rotate`.

    Each axis of the position turns `n = head_dim / (2 axes)` pairs of channels; the position 0 turns none (RoPE,
    arXiv:2104.09864, by axis).
    """
    pairs = head_dim // (2 * positions.shape[1])
    frequencies = max_period ** -(np.arange(pairs) / pairs)
    angles = (positions[:, :, None] * frequencies).reshape(len(positions), -1)
    angles = np.pad(angles, ((0, 0), (0, head_dim // 2 - angles.shape[1])))
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x: Float[Array, "b t n h"], turn: Float[Array, "2 t f"]) -> Float[Array, "b t n h"]:
    """Each pair `(x_i, x_{i + h/2})` turned by its angle of `rotary`."""
    cos, sin = turn[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class SelfAttention(nn.Module):
    """`attention` of a sequence over itself, with RMS-normed (arXiv:2302.05442) and rotated queries and keys.

    Projections are separate: their gradients then need no concatenation, which costs a CPU more than the products do.
    The first `text` tokens are a text, to which the attention of the others is kept where it is asked for.
    """

    heads: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    text: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], turn: Float[Array, "2 t f"], mask: Bool[Array, "b 1 1 t"] | None = None
    ) -> Float[Array, "b t c"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(Dense, x.shape[-1], use_bias=False, **policy)
        q, k, v = (dense(name=name)(x).reshape(*x.shape[:2], self.heads, -1) for name in "qkv")
        q, k = (RMSNorm(param_dtype=self.param_dtype, name=f"{name}_norm")(y) for name, y in (("q", q), ("k", k)))
        q, k = rotate(q, turn).astype(self.dtype), rotate(k, turn).astype(self.dtype)
        if self.text:
            keep_words(self, q, k, mask, slice(self.text, None), slice(self.text))
        y = attention(q, k, v, mask)
        return dense(name="out")(y.reshape(x.shape))


class SwiGLU(nn.Module):
    """`(silu(x W) * x V) U` with `hidden` inner channels (arXiv:2002.05202)."""

    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.silu(dense(self.hidden, name="gate")(x)) * dense(self.hidden, name="up")(x)
        return dense(x.shape[-1], name="down")(y)


def stacked(
    block: type[nn.Module], length: int, scan: bool, remat: bool = False, in_axes: Any = nn.broadcast
) -> type[nn.Module]:
    """`length` blocks `(carry, *inputs) -> (carry, None)` in a row, their parameters stacked along a first axis.

    With `scan` one of them is compiled instead of all; with `remat` each is computed again in the backward pass.
    """
    return nn.scan(
        nn.remat(block, prevent_cse=not scan) if remat else block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=1 if scan else length,
    )


# [parity of an output row, row of the small image, row of a 3 x 3 kernel]: the kernel rows that fall on each small row.
FOLDS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


class UpConv(nn.Module):
    """A 3 x 3 convolution of `x` with every pixel doubled in height and width, at 4/9 of its products.

    An output pixel sees only 2 x 2 pixels of `x`, so the kernel's rows and columns that fall on the same one are summed
    first; the four parities of output pixels are then one 2 x 2 convolution with four times the channels.
    """

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w features"]:
        (b, h, w, c), o = x.shape, self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, o), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (o,), self.param_dtype)
        kernel = jnp.einsum("pat,qbu,tuio->abipqo", FOLDS, FOLDS, kernel.astype(jnp.float32), precision="highest")
        kernel = kernel.reshape(2, 2, c, 4 * o).astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, padding=((1, 1), (1, 1)))
        y = y.reshape(b, h + 1, w + 1, 2, 2, o)
        rows = [jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in (0, 1)], axis=3) for p in (0, 1)]
        return (jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, o) + widen(bias)).astype(self.dtype)


class ResBlock(nn.Module):
    """`shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))`, told the time by `project(silu(emb))`.

    `time_embedding="add"` adds the projection before the second norm (DDPM, arXiv:2006.11239); `"scale_shift"` makes it
    that norm's `(1 + scale) y + shift` (arXiv:2102.09672). The last convolution starts at zero. `activation` stands for
    silu throughout; `resample` is applied to `x` and before the first convolution; `dropout` acts before the last one
    when a "dropout" key is given.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    time_embedding: Literal["add", "scale_shift"] = "add"
    activation: Callable[[Array], Array] = nn.silu
    resample: Callable[[Array], Array] | None = None
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h2 w2 features"]:
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(GroupNorm, self.groups, self.eps, **policy)
        conv = functools.partial(Conv, self.features, (3, 3), padding=1, **policy)
        y = self.activation(norm(name="norm1")(x))
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        y = conv(name="conv1")(y)
        if emb is None:
            y = norm(name="norm2")(y)
        elif self.time_embedding == "add":
            time = Dense(self.features, **policy, name="time_emb_proj")(self.activation(emb))
            y = norm(name="norm2")((y + widen(time[:, None, None])).astype(self.dtype))
        else:
            time = Dense(2 * self.features, **policy, name="time_emb_proj")(self.activation(emb))
            scale, shift = jnp.split(widen(time[:, None, None]), 2, axis=-1)
            y = (norm(name="norm2")(y) * (1 + scale) + shift).astype(self.dtype)
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(self.activation(y))
        y = conv(name="conv2", kernel_init=nn.initializers.zeros)(y)
        if x.shape[-1] != self.features:
            x = Dense(self.features, **policy, name="conv_shortcut")(x)
        return x + y
