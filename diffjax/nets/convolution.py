"""Convolutions of images, which are differentiated by one another.

`<dy, convolve(x, kernel)>` is linear in each of its three arguments. Its derivatives by them are three functions of the
two others, `to_result`, `to_image` and `to_kernel`, and the derivatives of each of these are the other two. They are
primitives of jax, so that a device computes each in its own way, in whatever order programs are differentiated: all of
`nets.convolution_programs`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from diffjax.nets.convolution_programs import ON_CPU, PLAIN, Geometry, Padding

Dtype = Any
Transpose = Callable[..., Array]

to_result = Primitive("convolution")
"""`y` (b, h2, w2, o) of `x` (b, h, w, i) and `kernel` (kh, kw, i, o)."""

to_image = Primitive("convolution_to_image")
"""`dx` (b, h, w, i) of `dy` (b, h2, w2, o) and `kernel`."""

to_kernel = Primitive("convolution_to_kernel")
"""`dkernel` (kh, kw, i, o) of `x` and `dy`."""

ROLES = (to_result, to_image, to_kernel)


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
        return (y + widen(bias)).astype(self.dtype)


def widen(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """In float32 or wider: what many pixels share, such as a bias, whose gradient is a sum over them. In bfloat16,
    which jax sums in bfloat16, 2,304 ones can be 1,024.
    """
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int = 1, padding: Padding = ((0, 0), (0, 0))
) -> Float[Array, "b h2 w2 o"]:
    """`y[p, q] = sum_ij x[stride p + i - above, stride q + j - left] @ kernel[i, j]` with zeros around `x`.

    `x` and `kernel` have one dtype, which is the result's; of bfloat16, sums are float32.
    """
    (_, h, w, _), (kh, kw, _, _) = x.shape, kernel.shape
    geometry = Geometry((h, w), (kh, kw), stride, padding)
    if _placed(x) or _placed(kernel):
        return PLAIN[to_result.name](x, kernel, geometry)
    return to_result.bind(x, kernel, geometry=geometry)


def _placed(x: Array) -> bool:
    """Whether jax keeps the place of an array on a mesh in its type, of which the primitives here know nothing."""
    found = jax.typeof(x)
    return found != ShapedArray(found.shape, found.dtype, found.weak_type)


def operations(equation: Any) -> float:
    """The floating-point operations of one of the three in a traced program: 2 for every multiply-add."""
    (n, *_), kernel = equation.invars[0].aval.shape, equation.invars[1].aval.shape
    if equation.primitive is to_kernel:
        kernel = equation.outvars[0].aval.shape
    return 2.0 * n * math.prod(equation.params["geometry"].result) * math.prod(kernel)


def program(equation: Any, platform: str) -> Any:
    """The program that computes one of the three in a traced program, on a platform."""
    function = (ON_CPU if platform == "cpu" else PLAIN)[equation.primitive.name]
    operands = (jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars)
    return jax.make_jaxpr(functools.partial(function, **equation.params))(*operands).jaxpr


@functools.partial(jax.jit, static_argnums=0, static_argnames="geometry")
def _alone(role: Primitive, first: Array, second: Array, *, geometry: Geometry) -> Array:
    """One of the three outside of any program: a program of its own."""
    return role.bind(first, second, geometry=geometry)


def _type(role: Primitive, first: Any, second: Any, *, geometry: Geometry) -> ShapedArray:
    shape, dtype = _shape(role.name, (first.shape, first.dtype), (second.shape, second.dtype), geometry)
    return ShapedArray(shape, dtype)


@functools.cache
def _shape(name: str, first: tuple, second: tuple, geometry: Geometry) -> tuple[tuple[int, ...], Dtype]:
    operands = jax.ShapeDtypeStruct(*first), jax.ShapeDtypeStruct(*second)
    y = jax.eval_shape(functools.partial(PLAIN[name], geometry=geometry), *operands)
    return y.shape, y.dtype


def _batched(
    role: Primitive, operands: tuple[Array, Array], axes: tuple[int | None, int | None], *, geometry: Geometry
) -> tuple[Array, int]:
    """Of many batches and one kernel, one batch; of many kernels, on a CPU, one after the other."""
    call = functools.partial(role.bind, geometry=geometry)
    if role is not to_kernel and axes[1] is None:
        images = jnp.moveaxis(operands[0], axes[0] or 0, 0)
        y = call(images.reshape(-1, *images.shape[2:]), operands[1])
        return y.reshape(*images.shape[:2], *y.shape[1:]), 0
    count = next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)
    each = [
        jnp.broadcast_to(x, (count, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes)
    ]
    singly = lambda *pairs: lax.map(lambda pair: call(*pair), pairs)
    together = jax.vmap(functools.partial(PLAIN[role.name], geometry=geometry))
    return lax.platform_dependent(*each, cpu=singly, default=together), 0


def _define(role: Primitive, to_first: Transpose, to_second: Transpose) -> None:
    """What jax asks of a primitive that is linear in each of two operands."""
    role.def_impl(functools.partial(_alone, role))
    role.def_abstract_eval(functools.partial(_type, role))
    batching.primitive_batchers[role] = functools.partial(_batched, role)
    ad.defbilinear(role, to_first, to_second)
    mlir.register_lowering(role, mlir.lower_fun(PLAIN[role.name], multiple_results=False))
    mlir.register_lowering(role, mlir.lower_fun(ON_CPU[role.name], multiple_results=False), platform="cpu")


# Each is given the gradient to the result and both operands, of which the one that it is the gradient to is not known.
_define(
    to_result,
    lambda dy, _, kernel, geometry: to_image.bind(dy, kernel, geometry=geometry),
    lambda dy, x, _, geometry: to_kernel.bind(x, dy, geometry=geometry),
)
_define(
    to_image,
    lambda dx, _, kernel, geometry: to_result.bind(dx, kernel, geometry=geometry),
    lambda dx, dy, _, geometry: to_kernel.bind(dx, dy, geometry=geometry),
)
_define(
    to_kernel,
    lambda dkernel, _, dy, geometry: to_image.bind(dy, dkernel, geometry=geometry),
    lambda dkernel, x, _, geometry: to_result.bind(x, dkernel, geometry=geometry),
)
