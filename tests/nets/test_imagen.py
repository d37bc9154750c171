"""Imagen's U-Nets: what may and what may not change their output, and their size beside MinImagen's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build, nets
from diffjax.nets.imagen import MINIMAGEN_BASE, MINIMAGEN_SUPER, TINY_BASE, TINY_SUPER, ImagenUNet, fold, unfold
from diffjax.utils.errors import UserError

B, L, D = 3, 5, 12
BASE = ImagenUNet(**TINY_BASE | {"blocks": (1, 1)}, context_width=D, classes=3)
ONE = {"mults": (1,), "blocks": (1,), "attention": (False,), "cross_attention": (True,)}
SUPER = ImagenUNet(**TINY_SUPER | ONE, patch=2, context_width=D, low_res=True)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def inputs(module):
    told = {
        "x": normal(0, B, 8, 16, 3),
        "t": jnp.array([0.0, 300.0, 1000.0]),
        "context": normal(1, B, L, D),
        "mask": jnp.arange(L) < jnp.array([0, 2, L])[:, None],
    }
    if module.classes:
        told["label"] = jnp.array([0, 2, -1])
    if module.low_res:
        told |= {"low_res": normal(2, B, 8, 16, 3), "level": jnp.array([0.0, 0.1, 0.5])}
    return told


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, told):
    return module.apply({"params": params}, **told)


@functools.partial(jax.jit, static_argnums=0)
def slope(module, params):
    return jax.grad(lambda params: jnp.mean((module.apply({"params": params}, **inputs(module)) - 1) ** 2))(params)


@pytest.fixture(scope="module")
def learned():
    """`params(module)`, random everywhere: at its start the network is zero whatever it is told."""

    @functools.cache
    def params(module):
        shapes = jax.eval_shape(module.init, jax.random.key(0), **inputs(module))["params"]
        draw = np.random.default_rng(1)
        return jax.tree.map(lambda leaf: 0.1 * draw.standard_normal(leaf.shape, np.float32), shapes)

    return params


def call(params, module, **changed):
    return run(module, params(module), inputs(module) | changed)


def differs(a, b):
    """Which rows differ."""
    return [bool(np.abs(x - y).max() > 1e-3) for x, y in zip(a, b)]


@pytest.mark.parametrize("module", [BASE, SUPER], ids=["base", "super"])
def test_shape_and_dtype(learned, module):
    y = call(learned, module)
    assert y.shape == (B, 8, 16, 3) and y.dtype == jnp.float32 and np.isfinite(y).all()


def test_half_precision(learned):
    half = run(BASE.clone(dtype=jnp.bfloat16), learned(BASE), inputs(BASE))
    full = call(learned, BASE)
    assert half.dtype == jnp.float32 and np.abs(half - full).max() < 0.1 * np.abs(full).max()


def test_every_parameter_has_a_gradient_which_remat_does_not_change(learned):
    slopes = jax.tree_util.tree_leaves_with_path(slope(SUPER, learned(SUPER)))
    assert not [jax.tree_util.keystr(path) for path, leaf in slopes if not np.any(leaf)]
    for a, (_, b) in zip(jax.tree.leaves(slope(SUPER.clone(remat=True), learned(SUPER))), slopes):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3)


def test_a_dropped_text_is_the_learned_null_whatever_stands_there(learned):
    assert differs(call(learned, BASE), call(learned, BASE, context=normal(7, B, L, D))) == [False, True, True]
    nothing = call(learned, BASE, mask=jnp.zeros((B, L), bool))
    assert differs(nothing, call(learned, BASE)) == [False, True, True]


@pytest.mark.parametrize("module", [BASE, SUPER], ids=["base", "super"])
def test_padding_is_not_seen(learned, module):
    told, before = inputs(module), call(learned, module)
    shown = told["mask"][..., None]
    np.testing.assert_allclose(
        call(learned, module, context=jnp.where(shown, told["context"], 9.0)), before, atol=1e-4, rtol=1e-4
    )
    wider = {
        name: jnp.pad(told[name], [(0, 0), (0, 4)] + [(0, 0)] * (told[name].ndim - 2)) for name in ("context", "mask")
    }
    np.testing.assert_allclose(call(learned, module, **wider), before, atol=1e-4, rtol=1e-4)


def test_time_class_picture_and_level_are_read(learned):
    before = call(learned, BASE)
    assert differs(before, call(learned, BASE, t=jnp.array([5.0, 300.0, 900.0]))) == [True, False, True]
    assert differs(before, call(learned, BASE, label=jnp.array([-1, 2, 1]))) == [True, False, True]
    before = call(learned, SUPER)
    assert differs(before, call(learned, SUPER, level=jnp.array([0.0, 0.3, 0.5]))) == [False, True, False]
    other = inputs(SUPER)["low_res"].at[2].set(0)
    assert differs(before, call(learned, SUPER, low_res=other)) == [False, False, True]


def test_the_efficient_form_works_below_full_resolution():
    """Twice the blocks at its first level cost it a quarter of what they cost the other form."""

    def added(**fields):
        x, t = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
        few, many = (ImagenUNet(16, (1, 2), (n, 1), *2 * [(False,) * 2], **fields) for n in (1, 3))
        return nets.flops(many, x, t) - nets.flops(few, x, t)

    assert added(efficient=True) < 0.26 * added()


def test_folding_and_back():
    x = normal(0, 2, 8, 12, 3)
    assert fold(x, 4).shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(fold(x, 2)[0, 1, 2], x[0, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unfold(fold(x, 4), 4), x)


def size(fields, pixels):
    """Parameters and multiply-adds of a network told 256 states of T5 base."""
    told = {"context": (1, 256, 768), "mask": (1, 256)}
    told |= {"low_res": (1, pixels, pixels, 3), "level": (1,)} if fields.get("efficient") else {}
    told = {name: jax.ShapeDtypeStruct(shape, bool if name == "mask" else jnp.float32) for name, shape in told.items()}
    module = ImagenUNet(**fields, context_width=768, low_res=bool(fields.get("efficient")))
    x, t = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return nets.parameter_count(module, x, t, **told), nets.flops(module, x, t, **told) / 2


@pytest.mark.slow
def test_presets_beside_minimagen():
    """MinImagen: base 1,618,466,051 parameters and 546 G multiply-adds at 64 pixels; super 715,760,003 and 100 G
    at 128.
    """
    base, base_work = size(MINIMAGEN_BASE, 64)
    assert base == 1_621_020_163 and base / 1_618_466_051 == pytest.approx(1, abs=0.01)
    assert base_work == pytest.approx(546e9, rel=0.02)
    super_, work = size(MINIMAGEN_SUPER, 128)
    assert super_ == 679_923_587 and super_ / 715_760_003 == pytest.approx(1, abs=0.06)
    assert work == pytest.approx(100e9, rel=0.02)


def test_muon_takes_the_blocks():
    shapes = jax.eval_shape(BASE.init, jax.random.key(0), **inputs(BASE))["params"]
    ways = jax.tree_util.tree_leaves_with_path(build.muon_or_adamw(shapes))
    taken = {jax.tree_util.keystr(path, simple=True, separator="/") for path, way in ways if way == "muon"}
    assert {"down_blocks_1/resnets_0/conv1/kernel", "mid_block/mixers_0/cross_attention/q/kernel"} <= taken
    assert not [name for name in taken if not name.startswith(("down_blocks", "mid_block", "up_blocks", "last_block"))]


@pytest.mark.parametrize(
    "module, changed, said",
    [
        (BASE, {"x": jnp.zeros((B, 7, 16, 3))}, "7 x 16 pixels: this network reads multiples of 2"),
        (SUPER, {"x": jnp.zeros((B, 6, 16, 3))}, "6 x 16 pixels: this network reads multiples of 4"),
        (BASE, {"context": None}, "this model reads a text"),
        (BASE, {"label": None}, "give a label"),
        (SUPER, {"low_res": None}, "this network draws from low-res pictures: give `low_res` and `level`"),
    ],
)
def test_what_is_missing_is_said(module, changed, said):
    with pytest.raises(UserError, match=said):
        jax.eval_shape(module.init, jax.random.key(0), **inputs(module) | changed)
