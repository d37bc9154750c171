"""The pixel transformer: what may and what may not change its output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import nets
from diffjax.nets.dit import DiT
from diffjax.utils.errors import UserError

B, L, D = 3, 5, 12
SMALL = DiT(patch=4, width=32, depth=2, heads=2, hidden=48, rank=4, context_width=D, pooled_width=D, classes=3)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def inputs():
    return {
        "x": normal(0, B, 8, 16, 3),
        "t": jnp.array([0.0, 300.0, 1000.0]),
        "context": normal(1, B, L, D),
        "mask": jnp.arange(L) < jnp.array([0, 2, L])[:, None],
        "pooled": normal(2, B, D),
        "label": jnp.array([0, 2, -1]),
    }


@pytest.fixture(scope="module")
def start():
    return jax.jit(SMALL.init)(jax.random.key(0), **inputs())["params"]


@pytest.fixture(scope="module")
def params(start):
    """Random everywhere: at its start the network is zero whatever it is told."""
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.2 * draw.standard_normal(leaf.shape, np.float32), start)


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, told):
    return module.apply({"params": params}, **told)


@functools.partial(jax.jit, static_argnums=0)
def slope(module, params):
    return jax.grad(lambda params: jnp.mean((module.apply({"params": params}, **inputs()) - 1) ** 2))(params)


def call(params, module=SMALL, **changed):
    return run(module, params, inputs() | changed)


def test_the_start_is_zero_and_gradients_reach_the_output_layer(start):
    assert not np.any(call(start))
    assert np.any(slope(SMALL, start)["patch_out"]["bias"])


def test_shape_and_dtype(params):
    y = call(params)
    assert y.shape == (B, 8, 16, 3) and y.dtype == jnp.float32
    half = call(params, SMALL.clone(dtype=jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert np.abs(half - y).max() < 0.1 * np.abs(y).max()


@pytest.mark.parametrize("options", [{"remat": True}, {"scan": True, "remat": True}])
def test_scan_and_remat_change_neither_output_nor_gradient(params, options):
    other = SMALL.clone(**options)
    np.testing.assert_allclose(call(params, other), call(params), atol=1e-5)
    for a, b in zip(jax.tree.leaves(slope(other, params)), jax.tree.leaves(slope(SMALL, params))):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_an_empty_text_is_the_learned_null_whatever_stands_there(params):
    y, changed = call(params), call(params, context=normal(5, B, L, D), pooled=normal(6, B, D))
    np.testing.assert_array_equal(y[0], changed[0])
    assert np.abs(y[1:] - changed[1:]).max((1, 2, 3)).min() > 1e-2
    for name in ("null_token", "null_pooled"):
        moved = call(params | {name: params[name] + 1})
        assert np.abs(moved[0] - y[0]).max() > 1e-3
        np.testing.assert_array_equal(moved[1:], y[1:])


def test_padding_of_the_text_is_not_seen(params):
    longer = jnp.concatenate([inputs()["context"], 9 * normal(7, B, 4, D)], axis=1)
    mask = jnp.pad(inputs()["mask"], ((0, 0), (0, 4)))
    np.testing.assert_allclose(call(params, context=longer, mask=mask), call(params), atol=1e-5)
    full = call(params, mask=jnp.ones((B, L), bool))
    np.testing.assert_allclose(call(params, mask=None), full, atol=1e-5)


def test_rows_do_not_see_each_other(params):
    moved = {name: value.at[1].set(value[2]) for name, value in inputs().items()}
    y, changed = call(params), call(params, **moved)
    np.testing.assert_array_equal(y[jnp.array([0, 2])], changed[jnp.array([0, 2])])
    np.testing.assert_allclose(changed[1], changed[2], atol=1e-5)


def test_every_input_matters(params):
    y = call(params)
    for name, value in {"t": inputs()["t"] + 100, "label": jnp.array([1, 1, 1]), "x": -inputs()["x"]}.items():
        assert np.abs(call(params, **{name: value}) - y).max((1, 2, 3)).min() > 1e-3
    turned = call(params, x=jnp.roll(inputs()["x"], 4, axis=2))
    assert np.abs(jnp.roll(turned, -4, axis=2) - y).max() > 1e-3


def test_without_conditions():
    module = DiT(patch=2, width=16, depth=1, heads=1, hidden=16, rank=2)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), normal(0, 1, 4, 4, 1), jnp.zeros(1))
    assert y.shape == (1, 4, 4, 1)
    assert not {"null_token", "null_pooled", "label_embedding"} & set(variables["params"])


@pytest.mark.parametrize("name", ["context", "pooled", "label"])
def test_a_missing_condition_is_named(params, name):
    with pytest.raises(UserError, match=name):
        call(params, **{name: None})


def test_a_size_that_does_not_divide_is_refused(params):
    with pytest.raises(UserError, match="patches of 4"):
        call(params, x=jnp.zeros((B, 8, 10, 3)))


def count(width, depth, hidden, rank, patch, text):
    """Parameters by hand; each head is 64 wide."""
    c = width
    block = 4 * c * c + 3 * c * hidden + 2 * 64 + c * rank + (rank + 1) * 6 * c
    ends = (3 * patch**2 + 1) * c + (c + 1) * 3 * patch**2 + (c + 1) * 2 * c + (c + 1) * 6 * c
    time, told = (256 + 1) * c + (c + 1) * c, 2 * ((text + 1) * c + c)
    return depth * block + ends + time + told


@pytest.mark.parametrize(
    "width, depth, hidden, rank, patch, size, text",
    [(256, 6, 672, 32, 8, 32, 256), (512, 12, 1344, 64, 4, 64, 512), (768, 12, 2048, 96, 16, 256, 768)],
)
def test_cost_of_the_presets(width, depth, hidden, rank, patch, size, text):
    module = DiT(patch, width, depth, width // 64, hidden, rank, context_width=text, pooled_width=text, scan=True)
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    told = shape(2, size, size, 3), shape(2), shape(2, 12, text), jax.ShapeDtypeStruct((2, 12), bool), shape(2, text)
    assert nets.parameter_count(module, *told) == count(width, depth, hidden, rank, patch, text)
    tokens = (size // patch) ** 2 + 12
    matrices = 2 * 2 * tokens * depth * (4 * width**2 + 3 * width * hidden)
    scores = 2 * 2 * 2 * tokens**2 * width * depth
    assert matrices + scores < nets.flops(module, *told) < 1.1 * (matrices + scores)
    assert nets.flops(module, *told) == nets.flops(module.clone(scan=False), *told)
