"""Updates of kernels made nearly orthogonal, which is what Muon does with its momentum (Jordan et al. 2024)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Dtype = Any

STEPS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
"""`a s + b s^3 + c s^5` brings a singular value s of (0, 1] to about 1, between 0.68 and 1.14, in `STEPS` steps."""


def orthogonal(x: Float[Array, "m n"], dtype: Dtype = jnp.float32) -> Float[Array, "m n"]:
    """Newton-Schulz steps `x <- a x + (b A + c A^2) x` with `A = x x^T`, from `x / |x|` (Frobenius): of `x = U S V^T`
    they leave about `U V^T`.

    Products read `dtype` and accumulate in float32. In bfloat16 the result is that of float32 to a few percent, which
    is less than how far either is from orthogonal.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T, dtype).T
    a, b, c = QUINTIC
    product = functools.partial(_product, dtype=dtype)
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(STEPS):
        gram = product(x, x.T)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x


def _product(x: Array, y: Array, dtype: Dtype) -> Array:
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames="dtype")  # so that kernels of one shape are traced and lowered once
def orthogonal_kernel(kernel: Float[Array, "*axes i o"], dtype: Dtype = jnp.float32) -> Float[Array, "*axes i o"]:
    """`orthogonal` of a kernel, times `sqrt(max(1, outputs / inputs))`.

    A convolution (h, w, i, o) is the matrix (h w i, o); axes before these, which `nn.scan` adds, are many kernels. A
    CPU takes them one after the other, which is quicker, since one is in its cache.
    """
    inputs = kernel.shape[-4:-1] if kernel.ndim >= 4 else kernel.shape[-2:-1]
    rows, columns = math.prod(inputs), kernel.shape[-1]
    of_one = functools.partial(orthogonal, dtype=dtype)
    matrices = kernel.reshape(-1, rows, columns)
    found = lax.platform_dependent(matrices, cpu=functools.partial(lax.map, of_one), default=jax.vmap(of_one))
    return math.sqrt(max(1.0, columns / rows)) * found.reshape(kernel.shape)
