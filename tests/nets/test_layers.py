"""Layers against closed forms in float64."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import nets
from diffjax.nets import layers

B, T, S, N, H = 2, 19, 23, 3, 8


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def exact_attention(q, k, v, mask=None, bias=0.0):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) + bias
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = np.nan_to_num(weights / weights.sum(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights, v)


def masks():
    """No mask; one for each key; one for each query and head, with a row that sees nothing."""
    every = (normal(8, B, N, T, S) > 0).at[0, :, 3].set(False)
    return {"none": None, "keys": normal(7, B, 1, 1, S) > 0, "all": every}


@pytest.fixture(params=["dense", "chunked"])
def path(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(layers, "MAX_SCORES", B * S * 5)
    return request.param


@pytest.mark.parametrize("kind", ["none", "keys", "all"])
def test_attention_is_the_masked_softmax(path, kind):
    q, k, v, bias = normal(0, B, T, N, H), normal(1, B, S, N, H), normal(2, B, S, N, H), normal(3, 1, N, T, S)
    mask = masks()[kind]
    y = jax.jit(lambda *x: layers.attention(*x))(q, k, v, mask, bias)
    np.testing.assert_allclose(y, exact_attention(q, k, v, mask, np.asarray(bias, np.float64)), atol=2e-6)


@pytest.mark.parametrize("kind", ["none", "keys", "all"])
def test_chunks_have_the_gradients_of_the_whole(monkeypatch, kind):
    q, k, v, mask = normal(0, B, T, N, H), normal(1, B, S, N, H), normal(2, B, S, N, H), masks()[kind]

    def slopes():
        return jax.jit(jax.grad(lambda *x: jnp.sum(layers.attention(*x, mask) ** 2), (0, 1, 2)))(q, k, v)

    whole = slopes()
    monkeypatch.setattr(layers, "MAX_SCORES", B * S * 5)
    for a, b in zip(whole, slopes()):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_query_that_sees_nothing_gives_zero_and_zero_gradient(path):
    q, k, v = normal(0, B, T, N, H), normal(1, B, S, N, H), normal(2, B, S, N, H)
    nothing = jnp.zeros((B, 1, 1, S), bool)
    y, back = jax.vjp(jax.jit(lambda *x: layers.attention(*x, nothing)), q, k, v)
    assert not np.any(y)
    assert not any(map(np.any, back(jnp.ones_like(y))))


def test_large_attention_never_holds_the_score_matrix():
    x = jax.ShapeDtypeStruct((1, 16384, 1, 64), jnp.float32)
    program = jax.make_jaxpr(jax.grad(lambda q, k, v: layers.attention(q, k, v).sum(), (0, 1, 2)))(x, x, x)
    assert "16384,16384" not in str(program)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(2, 8, 12, 24), (3, 50, 24)])
def test_group_norm_is_the_two_pass_form(mean, shape):
    x = normal(0, *shape) * normal(1, shape[-1]) + mean + 5 * normal(2, shape[-1])
    groups = np.asarray(x, np.float64).reshape(shape[0], -1, 6, 4)
    axes = (1, 3)
    exact = (groups - groups.mean(axes, keepdims=True)) / np.sqrt(groups.var(axes, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        jax.jit(layers.group_norm, static_argnums=(1, 2))(x, 6, 1e-5), exact.reshape(shape), atol=5e-6
    )


def test_group_norm_of_a_constant_is_zero():
    assert not np.any(layers.group_norm(jnp.full((1, 4, 4, 8), 3e4), 2, 1e-6))


def test_group_norm_gradient():
    def two_pass(x):
        y = x.reshape(2, -1, 2, 4)
        y = (y - y.mean((1, 3), keepdims=True)) / jnp.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
        return jnp.sum(jnp.sin(y.reshape(x.shape)))

    x = normal(0, 2, 5, 5, 8) + 2
    slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(layers.group_norm(x, 2, 1e-5)))))(x)
    np.testing.assert_allclose(slope, jax.jit(jax.grad(two_pass))(x), atol=1e-5)


def test_rms_norm():
    x = 3 * normal(0, 4, 16)
    y, variables = layers.RMSNorm().init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6), rtol=1e-5)
    assert variables["params"]["scale"].shape == (16,)


@pytest.mark.parametrize("flip, shift, dim", [(False, 1, 128), (True, 0, 256), (True, 0, 33)])
def test_timestep_embedding(flip, shift, dim):
    t, half = np.array([0.0, 0.5, 37.0, 999.0]), dim // 2
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - shift))
    parts = [np.cos(angles), np.sin(angles)] if flip else [np.sin(angles), np.cos(angles)]
    y = layers.timestep_embedding(jnp.asarray(t, jnp.float32), dim, flip_sin_to_cos=flip, freq_shift=shift)
    assert y.dtype == jnp.float32 and y.shape == (4, dim)
    np.testing.assert_allclose(y[:, : 2 * half], np.concatenate(parts, 1), atol=2e-4)
    assert not np.any(y[:, 2 * half :])


@pytest.mark.reference
@pytest.mark.parametrize("flip, shift, dim", [(False, 1, 128), (True, 0, 256), (True, 0, 33)])
def test_timestep_embedding_of_diffusers(flip, shift, dim):
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.linspace(0, 999, 200, dtype=np.float32)
    theirs = get_timestep_embedding(torch.tensor(t), dim, flip, shift).numpy()
    ours = layers.timestep_embedding(jnp.asarray(t), dim, flip_sin_to_cos=flip, freq_shift=shift)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.mean(np.abs(ours - theirs) > 2e-7) < 0.05


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_products_read_half_and_accumulate_in_float32(dtype):
    x, kernel, cotangent = normal(0, 5, 7, 300), normal(1, 300, 11), normal(2, 5, 7, 11)
    half = lambda x: np.asarray(x.astype(dtype), np.float64)
    y, back = jax.vjp(lambda x, kernel: layers.matmul(x, kernel, dtype), x, kernel)
    to_x, to_kernel = back(cotangent)
    assert y.dtype == to_x.dtype == to_kernel.dtype == jnp.float32
    np.testing.assert_allclose(y, half(x) @ half(kernel), atol=1e-4)
    np.testing.assert_allclose(to_x, half(cotangent) @ half(kernel).T, atol=1e-4)
    np.testing.assert_allclose(to_kernel, np.einsum("abi,abo->io", half(x), half(cotangent)), atol=1e-4)


def twice(x, kernel):
    """Two products of one shape."""
    product = lambda x: layers.matmul(x, kernel, jnp.bfloat16)
    return product(product(x)).sum()


SQUARES = (normal(0, 24, 16), normal(1, 16, 16))


@pytest.mark.parametrize("platform, rounded", [("cpu", 0), ("tpu", 2), ("cuda", 2)])
def test_half_products_of_one_shape_are_lowered_once_for_their_platform(platform, rounded):
    lowered = jax.jit(jax.value_and_grad(twice, (0, 1))).trace(*SQUARES).lower(lowering_platforms=(platform,))
    products = re.findall(r"dot_general.*-> tensor<\w+x(\w+)>", lowered.as_text())
    assert products.count("bf16") == rounded and len(products) == (4 if platform == "cpu" else 3)


def test_a_program_of_several_platforms_has_the_products_of_this_one():
    function = jax.jit(jax.value_and_grad(twice, (0, 1)))
    exported = jax.export.export(function, platforms=("tpu", "cpu"))(*SQUARES)
    jax.tree.map(np.testing.assert_array_equal, exported.call(*SQUARES), function(*SQUARES))


def test_half_products_take_every_shape():
    for rows, inner, outer in [(1, 1, 1), (1, 32, 64), (64, 1, 3), (3, 257, 2), (28, 64, 31)]:
        x, kernel = normal(0, rows, inner), normal(1, inner, outer)
        slope = jax.jit(jax.grad(lambda k, x=x: jnp.sum(layers.matmul(x, k, jnp.bfloat16))))(kernel)
        np.testing.assert_allclose(slope[:, 0], x.astype(jnp.bfloat16).astype(jnp.float32).sum(0), atol=1e-4)


def test_the_dtype_policy_of_dense():
    dense = layers.Dense(4, dtype=jnp.bfloat16)
    y, variables = jax.jit(dense.init_with_output)(jax.random.key(0), normal(0, 3, 8))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_rotations_see_differences_of_positions_only():
    places = np.array([[0, 0], [1, 3], [5, 2], [6, 5]])
    q, k = normal(0, 1, 4, 1, 16), normal(1, 1, 4, 1, 16)

    def scores(places):
        turn = layers.rotary(places, 16)
        return jnp.einsum("btnh,bsnh->bts", layers.rotate(q, turn), layers.rotate(k, turn))

    np.testing.assert_allclose(scores(places), scores(places + np.array([2, 7])), atol=1e-5)
    assert np.abs(scores(places) - scores(places[:, ::-1])).max() > 0.1
    np.testing.assert_allclose(layers.rotate(q, layers.rotary(places * 0, 16)), q)


@pytest.mark.parametrize("kind, outputs", [("add", 8), ("scale_shift", 16)])
def test_res_block_is_its_shortcut_at_the_start(kind, outputs):
    block = layers.ResBlock(8, groups=2, time_embedding=kind)
    x, emb = normal(0, 2, 4, 4, 8), normal(1, 2, 5)
    y, variables = jax.jit(block.init_with_output)(jax.random.key(0), x, emb)
    np.testing.assert_array_equal(y, x)
    assert variables["params"]["time_emb_proj"]["kernel"].shape == (5, outputs)


def test_flops_and_parameters_of_a_known_layer():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    convolution = layers.nn.Conv(5, (3, 3))
    assert nets.parameter_count(convolution, x) == 3 * 3 * 3 * 5 + 5
    assert nets.flops(convolution, x) == 2 * (2 * 8 * 8 * 5) * 27
    dense = layers.Dense(7)
    assert nets.flops(dense, jax.ShapeDtypeStruct((4, 6, 11), jnp.float32)) == 2 * 4 * 6 * 11 * 7
