import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from diffjax import weights
from diffjax.nets.clip import LEGACY_EOS, ClipText, Encoded
from diffjax.weights.clip import FORMAT

SMALL = dict(vocab_size=30, hidden_size=16, num_attention_heads=2, intermediate_size=24, projection_dim=12)
KINDS = {
    "clip_legacy": dict(hidden_act="quick_gelu", num_hidden_layers=3, eos_token_id=LEGACY_EOS),
    "clip_eos": dict(hidden_act="gelu", num_hidden_layers=2, eos_token_id=28),
}
BASE = "text_model."


def build(name):
    module = ClipText(**SMALL, **KINDS[name])
    return module, reference.checkpoint(FORMAT, module)


def inputs():
    """Texts that end early, pad with the id 29 (above the end's own 28), or end twice."""
    tokens = np.random.RandomState(1).randint(3, 28, (3, 20)).astype(np.int32)
    tokens[0, 7:], tokens[1, 9], tokens[1, 10:], tokens[2, [4, 19]] = 28, 28, 29, 28
    return tokens, np.arange(20) < np.array([[8], [10], [20]])


def outputs(name):
    """What transformers computes, with and without a mask."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    module, tensors = build(name)
    config = CLIPTextConfig(**FORMAT.config(module))
    model = CLIPTextModelWithProjection(config).eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    tokens, mask = (torch.tensor(value) for value in inputs())
    found = {}
    for kind, given in {"plain": None, "masked": mask.long()}.items():
        with torch.no_grad():
            out = model(tokens, attention_mask=given, output_hidden_states=True)
        both = (out.last_hidden_state, out.hidden_states[-2], out.text_embeds)
        found |= {f"{kind}_{part}": value.numpy() for part, value in zip(Encoded._fields, both)}
    return found


def compare(name, expected, step):
    module, tensors = build(name)
    params = reference.params(FORMAT, module, tensors)
    tokens, mask = inputs()
    for kind, given in {"plain": None, "masked": mask}.items():
        found = module.apply({"params": params}, tokens, given)
        for part in ("states", "penultimate"):
            theirs, ours = expected[f"{kind}_{part}"], getattr(found, part)[:, ::step]
            real = (mask if kind == "masked" else np.ones_like(mask))[:, ::step]
            assert reference.relative(ours[real], theirs[real]) < 1e-5
        assert reference.relative(found.pooled, expected[f"{kind}_pooled"]) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_equals_transformers_as_stored(name):
    compare(name, reference.stored(name), step=4)


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_equals_transformers(name):
    compare(name, outputs(name), step=1)


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_transformers_reads_what_is_saved(name, tmp_path):
    import torch
    from transformers import CLIPTextModelWithProjection

    module, tensors = build(name)
    weights.save(tmp_path, module, reference.params(FORMAT, module, tensors))
    model, info = CLIPTextModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        pooled = model.eval()(torch.tensor(inputs()[0])).text_embeds.numpy()
    loaded, params = weights.load(tmp_path)
    assert reference.relative(loaded.apply({"params": params}, inputs()[0]).pooled, pooled) < 1e-5


def test_legacy_texts_are_pooled_at_the_highest_id_and_others_at_the_first_end():
    module, tensors = build("clip_eos")
    params = reference.params(FORMAT, module, tensors)
    tokens = inputs()[0]
    encode = lambda eos: module.clone(eos_token_id=eos).apply({"params": params}, tokens)
    for eos, places in {28: [7, 9, 4], LEGACY_EOS: [7, 10, 4]}.items():
        found = encode(eos)
        expected = found.states[np.arange(3), np.array(places)] @ params["text_projection"]["kernel"]
        np.testing.assert_allclose(found.pooled, expected, atol=1e-5)


def test_states_do_not_depend_on_later_tokens():
    module, tensors = build("clip_legacy")
    params = reference.params(FORMAT, module, tensors)
    tokens = inputs()[0]
    changed = np.where(np.arange(20) < 12, tokens, 3)
    ours, theirs = (module.apply({"params": params}, given).states for given in (tokens, changed))
    np.testing.assert_allclose(ours[:, :12], theirs[:, :12], atol=1e-6)


PUBLISHED = {
    "L": (dict(), 123_650_304),
    "G": (
        dict(
            hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, intermediate_size=5120, projection_dim=1280
        ),
        694_659_840,
    ),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_has_the_published_keys_and_size(kind):
    fields, count = PUBLISHED[kind]
    module = ClipText(**fields)
    d, ff = module.hidden_size, module.intermediate_size
    expected = {
        f"{BASE}embeddings.token_embedding.weight": (49408, d),
        f"{BASE}embeddings.position_embedding.weight": (77, d),
        "text_projection.weight": (d, d),
    }
    norms = [f"{BASE}final_layer_norm"]
    for i in range(module.num_hidden_layers):
        layer = f"{BASE}encoder.layers.{i}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        shapes = {f"self_attn.{name}_proj": (d, d) for name in ("q", "k", "v", "out")}
        for name, shape in (shapes | {"mlp.fc1": (ff, d), "mlp.fc2": (d, ff)}).items():
            expected |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    expected |= {f"{norm}.{part}": (d,) for norm in norms for part in ("weight", "bias")}
    found = reference.keys_and_shapes(FORMAT, module)
    assert found == expected
    assert sum(np.prod(shape) for shape in found.values()) == count


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_near(dtype):
    module, tensors = build("clip_legacy")
    params = reference.params(FORMAT, module, tensors)
    exact = module.apply({"params": params}, inputs()[0])
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    near = module.clone(dtype=dtype, param_dtype=dtype).apply({"params": half}, inputs()[0])
    for ours, theirs in zip(near, exact):
        assert ours.dtype == jnp.float32
        assert reference.relative(ours, np.asarray(theirs)) < 0.05
