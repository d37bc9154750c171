import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from diffjax import weights
from diffjax.nets import flops, parameter_count
from diffjax.nets.mmdit import MMDiT, position_table
from diffjax.utils.errors import UserError
from diffjax.weights.mmdit import FORMAT

SMALL = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    pos_embed_max_size=6,
)
KINDS = {
    "mmdit_large": dict(),
    "mmdit_medium": dict(dual_attention_layers=(0,)),
    "mmdit_sd3": dict(num_layers=2, qk_norm=None, out_channels=6),
}
PUBLISHED = {
    "large": (dict(), 8_146_280_768, 8_056_627_520),
    "medium": (
        dict(num_layers=24, num_attention_heads=24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        2_469_663_936,
        2_243_171_520,
    ),
}


def build(name):
    module = MMDiT(**(SMALL | KINDS[name]))
    return module, reference.checkpoint(FORMAT, module)


def inputs():
    """Latents that are neither square nor as large as the table, odd numbers of patches."""
    random = np.random.RandomState(1)
    shapes = (2, 6, 10, 4), (2, 7, 12), (2, 10)
    x, context, pooled = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, np.array([1000.0, 8.9286], np.float32), context, pooled


def published(model, **options):
    """What a diffusers model makes of our inputs."""
    import torch

    x, t, context, pooled = (torch.tensor(value) for value in inputs())
    with torch.no_grad():
        y = model.eval()(x.permute(0, 3, 1, 2), context, pooled, t, **options).sample
    return y.permute(0, 2, 3, 1).numpy()


def outputs(name):
    """What diffusers computes, also with a layer left out."""
    import torch
    from diffusers import SD3Transformer2DModel

    module, tensors = build(name)
    model = SD3Transformer2DModel.from_config(FORMAT.config(module))
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    return {"full": published(model), "skipped": published(model, skip_layers=[1])}


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *given):
    return module.apply({"params": params}, *given)


def compare(name, expected):
    module, tensors = build(name)
    params = reference.params(FORMAT, module, tensors)
    assert reference.relative(apply(module, params, *inputs()), expected["full"]) < 1e-5
    weaker = module.clone(skip_layers=(1,))
    assert reference.relative(apply(weaker, params, *inputs()), expected["skipped"]) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_equals_diffusers_as_stored(name):
    compare(name, reference.stored(name))


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_equals_diffusers(name):
    compare(name, outputs(name))


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_diffusers_reads_what_is_saved(name, tmp_path):
    from diffusers import SD3Transformer2DModel

    module, tensors = build(name)
    weights.save(tmp_path, module, reference.params(FORMAT, module, tensors))
    model, info = SD3Transformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    loaded, params = weights.load(tmp_path)
    assert loaded == module
    assert reference.relative(apply(loaded, params, *inputs()), published(model)) < 1e-5


@pytest.mark.reference
def test_the_table_of_positions_is_that_of_diffusers():
    from diffusers import SD3Transformer2DModel

    module, _ = build("mmdit_large")
    model = SD3Transformer2DModel.from_config(FORMAT.config(module))
    table = model.pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(position_table(6, 4, 16), table, atol=1e-6)


def linear(key, out, into):
    return {f"{key}.weight": (out, into), f"{key}.bias": (out,)}


def layer(key, d, dual, last):
    """Keys and shapes of one layer."""
    found = linear(f"{key}.norm1.linear", (9 if dual else 6) * d, d)
    found |= linear(f"{key}.norm1_context.linear", (2 if last else 6) * d, d)
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
    names += ["attn.to_out.0"] + ([] if last else ["attn.to_add_out"])
    norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
    if dual:
        names += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
        norms += ["attn2.norm_q", "attn2.norm_k"]
    for name in names:
        found |= linear(f"{key}.{name}", d, d)
    for name in ("ff",) if last else ("ff", "ff_context"):
        found |= linear(f"{key}.{name}.net.0.proj", 4 * d, d) | linear(f"{key}.{name}.net.2", d, 4 * d)
    return found | {f"{key}.{name}.weight": (64,) for name in norms}


@pytest.mark.parametrize("size", PUBLISHED)
def test_has_the_published_keys_and_size(size):
    fields, total, trainable = PUBLISHED[size]
    module = MMDiT(**fields)
    d, table = module.width, (1, module.pos_embed_max_size**2, module.width)
    expected = {"pos_embed.pos_embed": table, "pos_embed.proj.weight": (d, 16, 2, 2), "pos_embed.proj.bias": (d,)}
    for name, width in (("timestep_embedder", 256), ("text_embedder", 2048)):
        key = f"time_text_embed.{name}.linear_"
        expected |= linear(f"{key}1", d, width) | linear(f"{key}2", d, d)
    expected |= linear("context_embedder", d, 4096) | linear("norm_out.linear", 2 * d, d) | linear("proj_out", 64, d)
    for i in range(module.num_layers):
        last = i == module.num_layers - 1
        expected |= layer(f"transformer_blocks.{i}", d, i in module.dual_attention_layers, last)
    found = reference.keys_and_shapes(FORMAT, module)
    assert found == expected
    assert parameter_count(module, *FORMAT.example(module)) == total == trainable + np.prod(table)


def test_operations_of_the_published_sizes():
    """TFLOP per forward at 1024 x 1024 with 77 + 256 text tokens, counted by hand elsewhere."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    given = shape(1, 128, 128, 16), shape(1), shape(1, 333, 4096), shape(1, 2048)
    for size, expected in {"large": 31.12e12, "medium": 11.25e12}.items():
        assert flops(MMDiT(**PUBLISHED[size][0]), *given) == pytest.approx(expected, rel=5e-3)


def test_unrolled_and_recomputed_layers_are_the_same():
    module = MMDiT(**SMALL, qk_norm=None)
    params = reference.params(FORMAT, module, reference.checkpoint(FORMAT, module))
    first = {name: params[name] for name in ("pos_embed", "pos_embed_proj")}

    def gradient(module):
        loss = lambda first: jnp.sum(module.apply({"params": params | first}, *inputs()) ** 2)
        return jax.jit(jax.grad(loss))(first)

    ours, theirs = gradient(module), gradient(module.clone(scan=False, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, theirs)
    assert not ours["pos_embed"].any() and ours["pos_embed_proj"]["kernel"].any()


def test_bfloat16_is_near():
    module, tensors = build("mmdit_medium")
    params = reference.params(FORMAT, module, tensors)
    exact = apply(module, params, *inputs())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    near = apply(module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), half, *inputs())
    assert near.dtype == jnp.float32
    assert reference.relative(near, np.asarray(exact)) < 0.05


@pytest.mark.parametrize(
    "shape, message", [((1, 7, 8, 4), "7 x 8: give multiples of 2"), ((1, 14, 4, 4), "larger .* at most 12")]
)
def test_sizes_that_do_not_fit_are_errors(shape, message):
    module, tensors = build("mmdit_large")
    _, t, context, pooled = (value[:1] for value in inputs())
    params = reference.params(FORMAT, module, tensors)
    with pytest.raises(UserError, match=message):
        module.apply({"params": params}, np.zeros(shape, np.float32), t, context, pooled)


def test_contradicting_widths_are_an_error():
    config = FORMAT.config(build("mmdit_large")[0])
    with pytest.raises(UserError, match="caption_projection_dim = 8, and heads make 16"):
        FORMAT.module(config | {"caption_projection_dim": 8}, "config.json")
