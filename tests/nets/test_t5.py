import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from diffjax import weights
from diffjax.nets.t5 import T5Encoder, relative_buckets
from diffjax.weights.t5 import FORMAT

SMALL = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)
KINDS = {"t5_relu": "relu", "t5_gated": "gated-gelu"}


def build(name):
    module = T5Encoder(**SMALL, feed_forward_proj=KINDS[name])
    return module, reference.checkpoint(FORMAT, module)


def inputs():
    random = np.random.RandomState(1)
    tokens = random.randint(0, 40, (2, 150)).astype(np.int32)
    return tokens, np.arange(150) < np.array([[150], [31]])


def outputs(name):
    """What transformers computes, with and without a mask."""
    import torch
    from transformers import T5Config, T5EncoderModel

    module, tensors = build(name)
    config = T5Config(**FORMAT.config(module))
    model = T5EncoderModel(config).eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()}, strict=False)
    tokens, mask = (torch.tensor(value) for value in inputs())
    with torch.no_grad():
        return {"plain": model(tokens)[0].numpy(), "masked": model(tokens, attention_mask=mask.long())[0].numpy()}


def compare(name, expected, step):
    module, tensors = build(name)
    params = reference.params(FORMAT, module, tensors)
    tokens, mask = inputs()
    plain = module.apply({"params": params}, tokens)
    masked = module.apply({"params": params}, tokens, mask)
    assert reference.relative(plain[:, ::step], expected["plain"]) < 1e-5
    assert reference.relative(masked[0, ::step], expected["masked"][0]) < 1e-5
    assert reference.relative(masked[1, :31:step], expected["masked"][1, : -(-31 // step)]) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_equals_transformers_as_stored(name):
    compare(name, reference.stored(name), step=10)


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_equals_transformers(name):
    compare(name, outputs(name), step=1)


@pytest.mark.reference
@pytest.mark.parametrize("name", KINDS)
def test_transformers_reads_what_is_saved(name, tmp_path):
    import torch
    from transformers import T5EncoderModel

    module, tensors = build(name)
    weights.save(tmp_path, module, reference.params(FORMAT, module, tensors))
    model, info = T5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        states = model.eval()(torch.tensor(inputs()[0]))[0].numpy()
    loaded, params = weights.load(tmp_path)
    assert reference.relative(loaded.apply({"params": params}, inputs()[0]), states) < 1e-5


@pytest.mark.parametrize("length", [1, 9, 300])
def test_buckets_are_exact_nearby_and_saturate(length):
    found = relative_buckets(length, 32, 128)
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    assert (found // 16 == (offset > 0)).all()
    near, far = np.abs(offset) < 8, np.abs(offset) >= 128
    assert (found[near] % 16 == np.abs(offset)[near]).all()
    assert (found[far] % 16 == 15).all()
    assert (np.diff(found[0] % 16)[1:] >= 0).all()


def test_xxl_has_the_published_keys_and_size():
    found = reference.keys_and_shapes(FORMAT, T5Encoder())
    d, ff, block = 4096, 10240, "encoder.block.{}.layer.{}."
    expected = {"shared.weight": (32128, d), "encoder.final_layer_norm.weight": (d,)}
    expected["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for i in range(24):
        attention, dense = block.format(i, 0), block.format(i, 1)
        expected |= {f"{attention}SelfAttention.{name}.weight": (d, d) for name in "qkvo"}
        expected |= {f"{part}layer_norm.weight": (d,) for part in (attention, dense)}
        expected |= {f"{dense}DenseReluDense.{name}.weight": (ff, d) for name in ("wi_0", "wi_1")}
        expected[f"{dense}DenseReluDense.wo.weight"] = (d, ff)
    assert found == expected
    assert sum(np.prod(shape) for shape in found.values()) == 4_762_310_656


SIZES = {
    # d_model, d_kv, d_ff, layers, heads
    "t5-small": ("relu", 512, 64, 2048, 6, 8),
    "t5-base": ("relu", 768, 64, 3072, 12, 12),
    "t5-3b": ("relu", 1024, 128, 16384, 24, 32),
    "t5-v1_1-small": ("gated-gelu", 512, 64, 1024, 8, 6),
    "t5-v1_1-base": ("gated-gelu", 768, 64, 2048, 12, 12),
    "t5-v1_1-large": ("gated-gelu", 1024, 64, 2816, 24, 16),
    "t5-v1_1-xl": ("gated-gelu", 2048, 64, 5120, 24, 32),
    "t5-v1_1-xxl": ("gated-gelu", 4096, 64, 10240, 24, 64),
}


@pytest.mark.reference
@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_the_keys_of_transformers(name):
    import torch
    from transformers import T5Config, T5EncoderModel

    kind, width, head, hidden, layers, heads = SIZES[name]
    module = T5Encoder(32128, width, head, hidden, layers, heads, feed_forward_proj=kind)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**FORMAT.config(module)))
    expected = {
        key: tuple(value.shape) for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"
    }
    assert reference.keys_and_shapes(FORMAT, module) == expected


def test_float16_does_not_overflow():
    module, tensors = build("t5_gated")
    large = {key: value * (300 if "wi_" in key else 1) for key, value in tensors.items()}
    exact = module.apply({"params": reference.params(FORMAT, module, large)}, inputs()[0])
    half = {key: value.astype(np.float16) for key, value in large.items()}
    module = module.clone(dtype=jnp.float16, param_dtype=jnp.float16)
    states = module.apply({"params": reference.params(FORMAT, module, half)}, inputs()[0])
    assert states.dtype == jnp.float32
    assert reference.relative(states, np.asarray(exact)) < 0.05


def test_scanned_and_unrolled_layers_are_the_same():
    module, tensors = build("t5_relu")
    params = reference.params(FORMAT, module, tensors)
    unrolled = module.clone(scan=False, remat=True)
    np.testing.assert_allclose(*(m.apply({"params": params}, inputs()[0]) for m in (module, unrolled)), atol=1e-5)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, weights.param_shapes(unrolled, FORMAT))
