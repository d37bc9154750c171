"""How a convolution of images and its two gradients are computed: plainly, and on a CPU where XLA is slow at that.

On a CPU, XLA's float32 convolutions and their gradients to the image reach what its products reach. But it computes
bfloat16 convolutions in float32, while products of bfloat16 are twice as fast on processors that have them; and the
gradient to the kernel is for it a convolution whose kernel is as large as the image: slow for large images, a hundred
times slower where padding makes the result larger than the image. These become products of patches, `y = P @ kernel`
and `dkernel = P^T @ dy`, where a row of `P` is all that a pixel of the result meets (the image shifted by every place
of the kernel, side by side), for some rows of the image at a time, which a CPU's caches hold. docs/ddpm.md says what a
training step gains.

Where the optional package of `native/` is installed, oneDNN computes them on a CPU that is one device;
`DIFFJAX_ONEDNN=0` switches it off. A processor that would emulate products of bfloat16 computes bfloat16 convolutions
in float32.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from diffjax.utils import processor

Size = tuple[int, int]
Padding = tuple[Size, Size]

# Pixels of the result that are one block of products.
BLOCK = 512
# From how many channels, of the image and of the result, products of bfloat16 are faster than float32 convolutions.
MANY_CHANNELS = 64
# From how many numbers in an image batch the float32 gradient to the kernel is slow as a convolution.
LARGE = 3 * 2**20


class Geometry(NamedTuple):
    """Heights and widths of image and kernel, the stride, and the zeros (before, after) around the image."""

    image: Size
    kernel: Size
    stride: int
    padding: Padding

    @property
    def result(self) -> Size:
        """Height and width of the result."""
        h, w = (
            (size + low + high - kernel) // self.stride + 1
            for size, kernel, (low, high) in zip(self.image, self.kernel, self.padding)
        )
        return h, w

    @property
    def turned(self) -> "Geometry":
        """That of the convolution of stride 1 that takes a gradient from the result to the image."""
        above, left = ((size - 1 - low, size - 1 - high) for size, (low, high) in zip(self.kernel, self.padding))
        return Geometry(self.result, self.kernel, 1, (above, left))


def _plain(x: Array, kernel: Array, geometry: Geometry) -> Array:
    stride, layout = (geometry.stride, geometry.stride), ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, stride, geometry.padding, dimension_numbers=layout)


def _plain_to_image(dy: Array, kernel: Array, geometry: Geometry) -> Array:
    x = jax.ShapeDtypeStruct((len(dy), *geometry.image, kernel.shape[2]), dy.dtype)
    return jax.linear_transpose(lambda x: _plain(x, kernel, geometry), x)(dy)[0]


def _plain_to_kernel(x: Array, dy: Array, geometry: Geometry) -> Array:
    kernel = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[-1], dy.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: _plain(x, kernel, geometry), kernel)(dy)[0]


def _wide(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function of float32 operands where a processor emulates products of bfloat16."""

    def computed(first: Array, second: Array, geometry: Geometry) -> Array:
        if first.dtype != jnp.bfloat16 or processor.has_bfloat16():
            return function(first, second, geometry)
        return function(first.astype(jnp.float32), second.astype(jnp.float32), geometry).astype(jnp.bfloat16)

    return computed


def _on_cpu(x: Array, kernel: Array, geometry: Geometry) -> Array:
    many = min(kernel.shape[2:]) >= MANY_CHANNELS
    if many and (onednn := _onednn_for(x, geometry)):
        return onednn.convolve(x, kernel, geometry.stride, geometry.padding)
    return (_products if many and x.dtype == jnp.bfloat16 else _plain)(x, kernel, geometry)


def _on_cpu_to_image(dy: Array, kernel: Array, geometry: Geometry) -> Array:
    if geometry.stride > 1:
        return _plain_to_image(dy, kernel, geometry)
    return _on_cpu(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), geometry.turned)


def _on_cpu_to_kernel(x: Array, dy: Array, geometry: Geometry) -> Array:
    many, grows = min(x.shape[-1], dy.shape[-1]) >= MANY_CHANNELS, _grows(geometry)
    if (many or grows) and (onednn := _onednn_for(x, geometry)):
        shape = (*geometry.kernel, x.shape[-1], dy.shape[-1])
        return onednn.kernel_gradient(x, dy, shape, geometry.stride, geometry.padding)
    slow = grows or (many if x.dtype == jnp.bfloat16 else x.size >= LARGE)
    return (_products_to_kernel if slow and x.dtype != jnp.float16 else _plain_to_kernel)(x, dy, geometry)


PLAIN = {
    "convolution": _plain,
    "convolution_to_image": _plain_to_image,
    "convolution_to_kernel": _plain_to_kernel,
}
ON_CPU = {
    "convolution": _wide(_on_cpu),
    "convolution_to_image": _wide(_on_cpu_to_image),
    "convolution_to_kernel": _wide(_on_cpu_to_kernel),
}


@functools.cache
def _onednn() -> Any:
    """The optional package; None where it is not installed, older than this code, switched off or of no use.

    XLA would give each of several devices the whole of a batch that is split among them.
    """
    if os.environ.get("DIFFJAX_ONEDNN") == "0" or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return None
    try:
        package = importlib.import_module("diffjax_onednn")
    except ImportError:
        return None
    return package if hasattr(package, "kernel_gradient") else None


def _onednn_for(x: Array, geometry: Geometry) -> Any:
    """The optional package where it computes convolutions of this kind: no padding is as wide as the kernel."""
    narrow = all(0 <= edge < size for size, edges in zip(geometry.kernel, geometry.padding) for edge in edges)
    return _onednn() if narrow and x.dtype in (jnp.float32, jnp.bfloat16) else None


def _grows(geometry: Geometry) -> bool:
    return any(result > size for result, size in zip(geometry.result, geometry.image))


def _products(x: Array, kernel: Array, geometry: Geometry) -> Array:
    padded, (h, w), n, o = _padded(x, geometry.padding), geometry.result, len(x), kernel.shape[-1]
    rows = _rows(n, h, w)

    def block(at: Array) -> Array:
        y = _product(_patches(padded, at, rows, geometry), kernel.reshape(-1, o))
        return _bits(y.astype(x.dtype)).reshape(n, rows, w, o)

    y = jnp.moveaxis(lax.map(block, jnp.arange(h // rows)), 0, 1)
    return _of_bits(y).reshape(n, h, w, o)


def _products_to_kernel(x: Array, dy: Array, geometry: Geometry) -> Array:
    """`dy` is transposed outside the loop: XLA reads rows, and takes a product that has a transpose for float32.

    The barriers keep XLA from folding the transposes into the product of an image that is one block.
    """
    (n, h, w, o), i = dy.shape, x.shape[-1]
    rows, padded = _rows(n, h, w), _padded(x, geometry.padding)
    columns = _bits(dy).reshape(n, -1, rows, w, o).transpose(1, 4, 0, 2, 3).reshape(-1, o, n * rows * w)

    def add(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        at, block = inputs
        return total + _product(_of_bits(block), _patches(padded, at, rows, geometry)), None

    columns = lax.optimization_barrier(columns)
    start = jnp.zeros((o, math.prod(geometry.kernel) * i), jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(add, start, (jnp.arange(h // rows), columns))
    return lax.optimization_barrier(total).T.reshape(*geometry.kernel, i, o).astype(x.dtype)


def _rows(n: int, h: int, w: int) -> int:
    """Into how many rows of the result a block goes: a divisor of all."""
    return max(rows for rows in range(1, h + 1) if h % rows == 0 and (rows == 1 or n * rows * w <= BLOCK))


def _patches(padded: Array, at: Array, rows: int, geometry: Geometry) -> Array:
    """What every pixel in block `at` of so many rows of the result meets, (pixels, places of the kernel times
    channels).
    """
    (n, *_, c), w, stride = padded.shape, geometry.result[1], geometry.stride
    taken = n, stride * (rows - 1) + 1, stride * (w - 1) + 1, c
    corners = [(0, stride * rows * at + i, j, 0) for i, j in np.ndindex(geometry.kernel)]
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
