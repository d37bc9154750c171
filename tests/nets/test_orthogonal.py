import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets.orthogonal import QUINTIC, STEPS, orthogonal, orthogonal_kernel


def matrix(rows, columns, smallest):
    """Random singular vectors, singular values from `smallest` to 1, evenly in their logarithm."""
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=(rows, columns)), full_matrices=False)
    values = np.geomspace(smallest, 1.0, min(rows, columns))
    return u, values, v, jnp.asarray((u * values) @ v, jnp.float32)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("smallest", [0.3, 1e-3])
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape, smallest):
    u, values, v, x = matrix(*shape, smallest)
    values = values / np.linalg.norm(values)
    for _ in range(STEPS):
        values = QUINTIC[0] * values + QUINTIC[1] * values**3 + QUINTIC[2] * values**5
    np.testing.assert_allclose(orthogonal(x), (u * values) @ v, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (64, 168), (168, 64), (256, 256)])
@pytest.mark.parametrize("smallest", [0.3, 1e-3])
def test_half_precision_is_float32_to_three_percent(shape, smallest):
    x = matrix(*shape, smallest)[-1]
    whole, half = orthogonal(x), orthogonal(x, jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert jnp.linalg.norm(half - whole) < 0.03 * jnp.linalg.norm(whole)


def test_a_kernel_is_many_matrices_the_inputs_first():
    kernel = jax.random.normal(jax.random.key(0), (2, 3, 3, 4, 80))
    found = orthogonal_kernel(kernel)
    each = [orthogonal(x.reshape(36, 80)).reshape(3, 3, 4, 80) for x in kernel]
    np.testing.assert_allclose(found, np.sqrt(80 / 36) * np.stack(each), rtol=1e-5, atol=1e-6)


def test_no_gradient_gives_no_update():
    assert not np.any(orthogonal(jnp.zeros((4, 8))))
