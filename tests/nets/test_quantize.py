"""Kernels in whole numbers: their error, their bytes, and networks that read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from diffjax import weights
from diffjax.nets import quantize
from diffjax.nets.layers import Dense, matmul
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.t5 import T5Encoder
from diffjax.plan import tree_bytes

INT8, INT4 = quantize.SCHEMES["int8"], quantize.SCHEMES["int4"]


def kernel(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("scheme, group, most", [(INT8, 128, 127), (INT4, 64, 7)])
def test_error_is_at_most_half_a_step_of_each_group(scheme, group, most):
    w = kernel(3, 128, 8) * jnp.geomspace(1e-3, 10, 8)
    kept = scheme(w)
    assert kept.values.nbytes == w.size * (1 if most == 127 else 1 / 2) and kept.scales.shape == (3, 128 // group, 8)
    grouped = w.reshape(3, -1, group, 8)
    step = jnp.abs(grouped).max(axis=2, keepdims=True) / most
    error = jnp.abs(kept.astype(jnp.float32).reshape(grouped.shape) - grouped)
    assert (error <= 0.5001 * step).all() and (error > 0.45 * step).any()


@pytest.mark.parametrize("scheme, most", [(INT8, 127), (INT4, 7)])
def test_whole_numbers_are_kept_exactly(scheme, most):
    w = jnp.arange(-most, most + 1.0).repeat(2)[:, None] * jnp.array([0.5, 0.0, 4.0])
    np.testing.assert_array_equal(scheme(w).astype(jnp.float32), w)


def test_scales_keep_the_dtype_of_the_kernel():
    kept = INT8(kernel(64, 8).astype(jnp.bfloat16))
    assert kept.scales.dtype == jnp.bfloat16
    error = kept.astype(jnp.float32) - kernel(64, 8).astype(jnp.bfloat16).astype(jnp.float32)
    assert jnp.linalg.norm(error) < 0.01 * jnp.linalg.norm(kernel(64, 8))


def test_widths_that_groups_or_bytes_do_not_divide():
    assert INT4(kernel(100, 4)).scales.shape == (1, 4)
    odd = INT4(kernel(33, 4))
    assert odd.values.shape == (33, 4) and jnp.abs(odd.astype(jnp.float32) - kernel(33, 4)).max() < 0.3


def test_four_bits_take_half_a_byte():
    kept = jax.eval_shape(INT4, jax.ShapeDtypeStruct((38, 2432, 9728), jnp.bfloat16))
    assert tree_bytes(kept) == 38 * 2432 * 9728 // 2 + 38 * (2432 // 64) * 9728 * 2


def test_products_and_their_gradients():
    x, w = kernel(4, 64), kernel(64, 8)
    squared = jax.value_and_grad(lambda x, w, dtype: jnp.sum(matmul(x, w, dtype) ** 2))
    for dtype in (jnp.float32, jnp.bfloat16):
        ours, plain = squared(x, INT8(w), dtype), squared(x, INT8(w).astype(dtype), dtype)
        jax.tree.map(np.testing.assert_array_equal, ours, plain)
    assert Dense(8, use_bias=False).apply({"params": {"kernel": INT8(w)}}, x).shape == (4, 8)


TRANSFORMER = MMDiT(8, 2, 4, 4, 2, 8, 2, 12, 10, 6)
TEXT = T5Encoder(100, 32, 8, 64, 2, 4)


def arguments(module):
    if module is TEXT:
        return (jnp.arange(12).reshape(2, 6),)
    shapes = (2, 8, 8, 4), (2,), (2, 5, 12), (2, 10)
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


@pytest.fixture(scope="module", params=[pytest.param(TRANSFORMER, marks=pytest.mark.slow), TEXT], ids=["mmdit", "t5"])
def network(request, tmp_path_factory):
    """A module, its parameters, and the folder that they were saved in."""
    module, folder = request.param, tmp_path_factory.mktemp("network")
    shapes, random = (
        jax.eval_shape(module.init, jax.random.key(0), *arguments(module))["params"],
        np.random.RandomState(0),
    )
    params = jax.tree.map(lambda leaf: jnp.float32(random.standard_normal(leaf.shape) / leaf.shape[0] ** 0.5), shapes)
    weights.save(folder, module, params)
    return module, params, folder


def test_networks_read_quantised_kernels(network):
    module, params, _ = network
    call = jax.jit(lambda params: module.apply({"params": params}, *arguments(module)))
    kept = quantize.quantize_kernels(params, INT4)
    meant = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), kept, is_leaf=lambda leaf: isinstance(leaf, quantize.Quantized)
    )
    np.testing.assert_allclose(call(kept), call(meant), rtol=1e-4, atol=1e-5)
    assert jnp.abs(call(kept) - call(params)).max() > 0.01
    assert tree_bytes(kept) < 0.7 * tree_bytes(params)


@pytest.mark.parametrize("scheme", [INT8, INT4])
def test_loading_quantises_layer_by_layer(network, scheme):
    module, params, folder = network
    loaded, kept = weights.load(folder, scheme=scheme)
    assert loaded == module
    jax.tree.map(np.testing.assert_array_equal, kept, quantize.quantize_kernels(params, scheme))


def test_loading_onto_several_devices(network):
    _, params, folder = network
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("model",))
    place = lambda path, shape: NamedSharding(
        mesh, P(*[None] * (len(shape) - 1), "model") if "kernel/" in path else P()
    )
    _, kept = weights.load(folder, sharding=place, scheme=INT8)
    jax.tree.map(np.testing.assert_array_equal, kept, quantize.quantize_kernels(params, INT8))
    widths = {leaf.sharding.spec for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.int8}
    assert widths == {P(None, None, "model")}
