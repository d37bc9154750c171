"""Networks whose parameters are split over eight devices give what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from diffjax import weights
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.quantize import SCHEMES, quantize_kernels
from diffjax.nets.t5 import T5Encoder
from diffjax.parallel import sharding
from diffjax.utils.errors import UserError

TRANSFORMER = MMDiT(8, 2, 4, 4, 2, 8, 8, 16, 8, 8)
TEXT = T5Encoder(96, 32, 8, 64, 2, 8)


def arguments(module):
    if isinstance(module, T5Encoder):
        return (np.arange(12).reshape(2, 6),)
    shapes = (2, 8, 8, 4), (2,), (2, 5, 16), (2, 8)
    return tuple(np.random.RandomState(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes))


def drawn(module):
    shapes, random = (
        jax.eval_shape(module.init, jax.random.key(0), *arguments(module))["params"],
        np.random.RandomState(0),
    )
    return jax.tree.map(lambda leaf: jnp.float32(random.standard_normal(leaf.shape) / leaf.shape[0] ** 0.5), shapes)


def placed(params, place):
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, place(name(path), leaf.shape)), params
    )


@pytest.fixture(scope="module")
def transformer():
    params = drawn(TRANSFORMER)
    return params, called(TRANSFORMER, params)


def called(module, params):
    return np.asarray(jax.jit(module.apply)({"params": params}, *arguments(module)))


@pytest.mark.parametrize("way", sharding.WAYS)
def test_split_over_eight_devices(transformer, way):
    params, exact = transformer
    split = placed(params, sharding.over(way))
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(split))
    assert held < sum(leaf.size for leaf in jax.tree.leaves(params)) / (6 if way != "tensor" else 3)
    assert np.abs(called(TRANSFORMER, split) - exact).max() <= 1e-6 * np.abs(exact).max()


def test_pairs_of_products_are_split_by_outputs_then_inputs():
    place = sharding.over("tensor")
    for name, spec in (
        ("to_q/kernel", (None, None, "model")),
        ("net_2/kernel", (None, "model", None)),
        ("net_2/bias", ()),
    ):
        assert tuple(place(f"blocks_0/x/{name}", (2, 64, 64)[: 2 if "bias" in name else 3]).spec) == spec
    assert tuple(sharding.over("both")("blocks/ff/wi_0/kernel", (2, 64, 32)).spec) == (None, "data", "model")


def test_a_text_encoder_on_one_of_the_devices_quantised(tmp_path):
    weights.save(tmp_path, TEXT, drawn(TEXT))
    third = SingleDeviceSharding(jax.devices()[3])
    module, params = weights.load(tmp_path, sharding=lambda path, shape: third, scheme=SCHEMES["int8"])
    assert {device for leaf in jax.tree.leaves(params) for device in leaf.devices()} == {jax.devices()[3]}
    exact = called(TEXT, quantize_kernels(drawn(TEXT), SCHEMES["int8"]))
    np.testing.assert_allclose(called(module, params), exact, rtol=1e-5, atol=1e-6)
    split = placed(params, sharding.over("tensor"))
    np.testing.assert_allclose(called(module, split), exact, rtol=1e-5, atol=1e-5)


def test_too_few_devices():
    with pytest.raises(UserError, match="over 6 devices: it takes a multiple of 4"):
        sharding.over("both", jax.devices()[:6])
