"""Convolutions of images: the plain one on accelerators, and on a CPU products where XLA's convolutions are slow there.

On a CPU, XLA's float32 convolutions and their gradients to the image reach what its products reach. But it computes
bfloat16 convolutions in float32, while products of bfloat16 are twice as fast on processors that have them; and the
gradient to the kernel is for it a convolution whose kernel is as large as the image: slow for large images, a hundred
times slower where padding makes the result larger than the image. These become products of patches, `y = P @ kernel`
and `dkernel = P^T @ dy`, where a row of `P` is all that a pixel of the result meets (the image shifted by every place
of the kernel, side by side), for some rows of the image at a time, which a CPU's caches hold. docs/ddpm.md says what a
training step gains.

Where the optional package of `native/` is installed, oneDNN computes the forward convolutions of a CPU that is one
device, and in bfloat16 the gradients too; `DIFFJAX_ONEDNN=0` switches it off. A processor that would emulate products
of bfloat16 computes bfloat16 convolutions in float32.
"""

import functools
import importlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from diffjax.utils import processor

Dtype = Any
Padding = tuple[tuple[int, int], tuple[int, int]]

# Pixels of the result that are one block of products.
BLOCK = 512
# From how many channels, of the image and of the result, products of bfloat16 are faster than float32 convolutions.
MANY_CHANNELS = 64
# From how many numbers in an image batch the float32 gradient to the kernel is slow as a convolution.
LARGE = 3 * 2**20


class Conv(nn.Module):
    """`convolve` with a learned kernel and bias; parameters and their initial values are those of `nn.Conv`.

    `padding` is the same on all sides, or ((above, below), (left, right)).
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: int | Padding = 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 features"]:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        same = self.padding
        padding = ((same, same), (same, same)) if isinstance(same, int) else same
        y = convolve(x.astype(self.dtype), jnp.asarray(kernel, self.dtype), self.strides, padding)
        return y + jnp.asarray(bias, self.dtype)


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int = 1, padding: Padding = ((0, 0), (0, 0))
) -> Float[Array, "b h2 w2 o"]:
    """`y[p, q] = sum_ij x[stride p + i - above, stride q + j - left] @ kernel[i, j]` with zeros around `x`.

    `x` and `kernel` have one dtype, which is the result's. Of bfloat16, sums are float32 and only reverse mode is
    defined.
    """
    function = _half if x.dtype == jnp.bfloat16 else _wide
    return function(x, kernel, stride, padding)


@functools.cache
def _onednn() -> Any:
    """The optional package; None where it is not installed, switched off or of no use.

    XLA would give each of several devices the whole of a batch that is split among them.
    """
    if os.environ.get("DIFFJAX_ONEDNN") == "0" or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return None
    try:
        return importlib.import_module("diffjax_onednn")
    except ImportError:
        return None


def _onednn_for(shape: tuple[int, ...], padding: Padding) -> Any:
    """The optional package where it has kernels of this shape: no padding is as wide as they are."""
    narrow = all(0 <= edge < size for size, edges in zip(shape, padding) for edge in edges)
    return _onednn() if narrow else None


def _forward(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """By oneDNN or in bfloat16 by products: on a CPU, of many channels."""
    plain, products = (functools.partial(f, stride=stride, padding=padding) for f in (_plain, _products))
    fast = products if x.dtype == jnp.bfloat16 else plain
    if x.dtype in (jnp.float32, jnp.bfloat16) and (onednn := _onednn_for(kernel.shape, padding)):
        fast = functools.partial(onednn.convolve, stride=stride, padding=padding)
    emulated = x.dtype == jnp.bfloat16 and not processor.has_bfloat16()
    if fast is plain or emulated or min(kernel.shape[2:]) < MANY_CHANNELS:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=fast, default=plain)


def _plain(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _wide(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _forward(x, kernel, stride, padding)


def _wide_jvp(stride: int, padding: Padding, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y, plain = _wide(x, kernel, stride, padding), functools.partial(_plain, stride=stride, padding=padding)
    dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else plain(dx, kernel)
    if isinstance(dkernel, SymbolicZero):
        return y, dy
    if x.dtype == jnp.float16 or (x.size < LARGE and not _grows(x, y)):
        return y, dy + plain(x, dkernel)
    products = functools.partial(_from_kernel, shape=y.shape, stride=stride, padding=padding)
    return y, dy + lax.platform_dependent(x, dkernel, cpu=products, default=plain)


_wide.defjvp(_wide_jvp, symbolic_zeros=True)


def _from_kernel(x: Array, kernel: Array, shape: tuple[int, ...], stride: int, padding: Padding) -> Array:
    """The convolution as the transpose of the gradient to the kernel, so that autodiff finds that gradient."""
    gradient = lambda dy: _kernel_gradient(x, dy, kernel.shape, stride, padding)
    return jax.linear_transpose(gradient, jax.ShapeDtypeStruct(shape, x.dtype))(kernel)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _half(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _forward(x, kernel, stride, padding)


def _half_forward(x: Array, kernel: Array, stride: int, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _half(x, kernel, stride, padding), (x, kernel)


def _half_backward(stride: int, padding: Padding, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    plain = lambda x, kernel, dy: jax.vjp(lambda x, kernel: _plain(x, kernel, stride, padding), x, kernel)[1](dy)
    if min(kernel.shape[2:]) < MANY_CHANNELS and not _grows(x, dy):
        return plain(x, kernel, dy)
    function = _gradients if processor.has_bfloat16() else _wide_gradients
    products = functools.partial(function, stride=stride, padding=padding)
    return lax.platform_dependent(x, kernel, dy, cpu=products, default=plain)


_half.defvjp(_half_forward, _half_backward)


def _gradients(x: Array, kernel: Array, dy: Array, stride: int, padding: Padding) -> tuple[Array, Array]:
    onednn = _onednn_for(kernel.shape, padding)
    to_kernel = (onednn.kernel_gradient if onednn else _kernel_gradient)(x, dy, kernel.shape, stride, padding)
    if stride > 1:
        return jax.vjp(lambda x: _plain(x, kernel, stride, padding), x)[1](dy)[0], to_kernel
    around = tuple((size - 1 - low, size - 1 - high) for size, (low, high) in zip(kernel.shape, padding))
    return _half(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), 1, around), to_kernel


def _wide_gradients(x: Array, kernel: Array, dy: Array, stride: int, padding: Padding) -> tuple[Array, Array]:
    """In float32, for a processor that emulates products of bfloat16."""
    wide = lambda value: value.astype(jnp.float32)
    _, pull = jax.vjp(lambda x, kernel: _wide(x, kernel, stride, padding), wide(x), wide(kernel))
    dx, dkernel = pull(wide(dy))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _grows(x: Array, y: Array) -> bool:
    return y.shape[1] > x.shape[1] or y.shape[2] > x.shape[2]


@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def _products(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    (*size, _, o), padded = kernel.shape, _padded(x, padding)
    n, (h, w) = len(x), ((1 + (whole - k) // stride) for whole, k in zip(padded.shape[1:3], size))
    rows = _rows(n, h, w)

    def block(at: Array) -> Array:
        y = _product(_patches(padded, at, size, (rows, w), stride), kernel.reshape(-1, o))
        return _bits(y.astype(x.dtype)).reshape(n, rows, w, o)

    y = jnp.moveaxis(lax.map(block, jnp.arange(h // rows)), 0, 1)
    return _of_bits(y).reshape(n, h, w, o)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _kernel_gradient(x: Array, dy: Array, shape: tuple[int, ...], stride: int, padding: Padding) -> Array:
    """`dy` is transposed outside the loop: XLA reads rows, and takes a product that has a transpose for float32.

    The barriers keep XLA from folding the transposes into the product of an image that is one block.
    """
    (*size, i, o), (n, h, w, _) = shape, dy.shape
    rows, padded = _rows(n, h, w), _padded(x, padding)
    columns = _bits(dy).reshape(n, -1, rows, w, o).transpose(1, 4, 0, 2, 3).reshape(-1, o, n * rows * w)

    def add(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        at, block = inputs
        return total + _product(_of_bits(block), _patches(padded, at, size, (rows, w), stride)), None

    columns = lax.optimization_barrier(columns)
    start = jnp.zeros((o, math.prod(size) * i), jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(jax.checkpoint(add, prevent_cse=False), start, (jnp.arange(h // rows), columns))
    return lax.optimization_barrier(total).T.reshape(shape).astype(x.dtype)


def _rows(n: int, h: int, w: int) -> int:
    """Into how many rows of the result a block goes: a divisor of all."""
    return max(rows for rows in range(1, h + 1) if h % rows == 0 and (rows == 1 or n * rows * w <= BLOCK))


def _patches(padded: Array, at: Array, size: list[int], block: tuple[int, int], stride: int) -> Array:
    """What every pixel in block `at` of the result meets, (pixels, places of the kernel times channels)."""
    (n, *_, c), (rows, w) = padded.shape, block
    taken = n, stride * (rows - 1) + 1, stride * (w - 1) + 1, c
    corners = [(0, stride * rows * at + i, j, 0) for i in range(size[0]) for j in range(size[1])]
    parts = [lax.dynamic_slice(padded, corner, taken)[:, ::stride, ::stride] for corner in corners]
    return _of_bits(jnp.concatenate(parts, axis=-1).reshape(n * rows * w, -1))


def _padded(x: Array, padding: Padding) -> Array:
    x, around = _bits(x), ((0, 0), *padding, (0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in around])


def _bits(x: Array) -> Array:
    """bfloat16 as whole numbers, which XLA moves on a CPU as they are, and not by way of float32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _of_bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _product(x: Array, y: Array) -> Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
