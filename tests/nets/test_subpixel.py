"""The sub-pixel network: the upsampled picture at its start, and what it hears."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets.subpixel import SubPixel
from diffjax.utils.errors import UserError

NET = SubPixel(patch=2, width=8, depth=1, groups=2)
X, LOW = (np.random.default_rng(seed).standard_normal((2, 8, 8, 3)).astype(np.float32) for seed in (0, 1))


def test_at_its_start_it_is_the_upsampled_picture_and_it_hears_all_it_is_told():
    told = {"t": jnp.full(2, 500.0), "low_res": LOW, "level": jnp.full(2, 0.1)}
    params = jax.jit(NET.init)(jax.random.key(0), X, **told)
    run = jax.jit(lambda params, x, told: NET.apply(params, x, **told))
    np.testing.assert_array_equal(run(params, X, told), LOW)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    y = run(params, X, told)
    assert y.shape == X.shape and y.dtype == jnp.float32
    for change in ({"t": jnp.full(2, 900.0)}, {"level": jnp.full(2, 0.5)}, {"low_res": LOW[::-1]}):
        assert np.abs(run(params, X, told | change) - y).max() > 1e-3
    assert np.abs(run(params, X[::-1], told) - y).max() > 1e-3


def test_what_it_cannot_read_is_said():
    with pytest.raises(UserError, match="is for super-resolution only"):
        NET.init(jax.random.key(0), X, jnp.zeros(2))
    with pytest.raises(UserError, match="7 x 8 pixels do not cut into patches of 2"):
        NET.init(jax.random.key(0), X[:, :7], jnp.zeros(2), LOW[:, :7], jnp.zeros(2))
