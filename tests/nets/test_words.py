"""Attention of the image to the text as a further output: exact where asked for, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import imagen as nets_imagen, layers, mmdit, unet as nets_unet
from diffjax.nets.dit import DiT
from diffjax.nets.imagen import TINY_BASE, ImagenUNet
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.unet import UNet

B, L, D = 2, 5, 12


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def pixel_transformer(scan):
    module = DiT(patch=4, width=32, depth=3, heads=2, hidden=48, rank=4, context_width=D, scan=scan)
    return module, dict(context=normal(1, B, L, D), mask=jnp.arange(L) < jnp.array([[2], [L]]))


def latent_transformer(scan):
    fields = dict(sample_size=4, in_channels=3, out_channels=3, num_layers=3, attention_head_dim=8)
    fields |= dict(num_attention_heads=2, joint_attention_dim=D, pooled_projection_dim=6, pos_embed_max_size=8)
    return MMDiT(**fields, patch_size=4, scan=scan), dict(context=normal(1, B, L, D), pooled=normal(2, B, 6))


def pixel_unet(scan):
    fields = dict(sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, context_width=D)
    fields |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return UNet(**fields), dict(context=normal(1, B, L, D), mask=jnp.arange(L) < jnp.array([[2], [L]]))


def imagen(scan):
    return ImagenUNet(**TINY_BASE, context_width=D), pixel_unet(scan)[1]


def start(make, scan):
    module, told = make(scan)
    given = dict(x=normal(0, B, 8, 16, 3), t=jnp.array([300.0, 900.0]), **told)
    draw = np.random.default_rng(1)
    params = jax.jit(module.init)(jax.random.key(0), **given)["params"]
    return module, jax.tree.map(lambda leaf: leaf + 0.2 * draw.standard_normal(leaf.shape, np.float32), params), given


@pytest.mark.parametrize("seen", [np.ones((B, 1, 1, 7), bool), np.arange(7) < np.array([3, 0])[:, None, None, None]])
def test_weights_are_the_softmax_of_each_head(seen):
    q, k = normal(0, B, 4, 3, 8), normal(1, B, 7, 3, 8)
    scores = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (q, k))) / np.sqrt(8)
    weights = np.exp(np.where(seen, scores, -np.inf))
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(layers.attention_weights(q, k, jnp.asarray(seen)), weights.mean(1), atol=1e-6)


def test_weights_are_those_with_which_attention_mixes():
    """With v = out = 1 a layer returns its weights times x, and as many rows of x as channels give them back."""
    t, text = 8, 3
    module, x = layers.SelfAttention(heads=1, text=text), normal(0, 1, t, t)
    turn = layers.rotary(np.arange(t)[:, None], t)
    params = module.init(jax.random.key(0), x, turn)["params"]
    params["v"]["kernel"] = params["out"]["kernel"] = jnp.eye(t)
    y, seen = module.apply({"params": params}, x, turn, mutable=["intermediates"])
    mixed = np.asarray(y[0], np.float64) @ np.linalg.inv(np.asarray(x[0], np.float64))
    np.testing.assert_allclose(seen["intermediates"]["words"][0][0], mixed[text:, :text], atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("make", [pixel_transformer, latent_transformer])
def test_every_layer_says_it_and_computes_the_same(make, scan):
    module, params, given = start(make, scan)
    y = module.apply({"params": params}, **given)
    told, seen = module.apply({"params": params}, **given, mutable=["intermediates"])
    np.testing.assert_array_equal(y, told)
    found = np.concatenate(jax.tree.leaves(seen))
    assert found.shape == (3, B, 8, L)
    assert (found >= 0).all() and (found.sum(-1) < 1).all()
    if "mask" in given:
        assert not found[:, 0, :, 2:].any() and (found[:, 1] > 0).all()


@pytest.mark.parametrize("make", [pixel_unet, imagen])
def test_networks_of_pixels_keep_attention_at_every_resolution(make):
    module, params, given = start(make, scan=False)
    y = module.apply({"params": params}, **given)
    told, seen = module.apply({"params": params}, **given, mutable=["intermediates"])
    np.testing.assert_array_equal(y, told)
    found = jax.tree.leaves(seen)
    assert found
    for kept in found:
        assert kept.shape[0] == B and 8 * 16 % kept.shape[1] == 0 and kept.shape[2] == L
        assert not kept[0, :, 2:].any() and (kept[1] > 0).all() and (kept.sum(-1) < 1 + 1e-6).all()


@pytest.mark.parametrize("make", [pixel_transformer, latent_transformer, pixel_unet, imagen])
def test_a_network_that_is_not_asked_is_the_same_program(make, monkeypatch):
    """The traced program is that without the line that keeps the weights; nor do they make parameters."""
    module, params, given = start(make, scan=False)
    program = lambda: str(jax.make_jaxpr(lambda params: module.apply({"params": params}, **given))(params))
    before = program()
    assert list(jax.eval_shape(module.init, jax.random.key(0), **given)) == ["params"]
    for file in (layers, mmdit, nets_unet, nets_imagen):
        monkeypatch.setattr(file, "keep_words", lambda *_: None)
    assert program() == before
