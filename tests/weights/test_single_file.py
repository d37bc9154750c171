import jax
import ml_dtypes
import numpy as np
import pytest
import reference

from diffjax import weights
from diffjax.nets.clip import ClipText
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.t5 import T5Encoder
from diffjax.nets.vae import AutoencoderKL
from diffjax.utils.errors import UserError
from diffjax.weights import clip, mmdit, safetensors, single_file, t5, vae

TRANSFORMERS = {
    "dual": MMDiT(
        sample_size=128,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=6,
        dual_attention_layers=(0, 1),
    ),
    "plain": MMDiT(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=1,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=6,
        qk_norm=None,
    ),
}
SIZES = {
    "large": (MMDiT(), 923),
    "medium": (
        MMDiT(num_layers=24, num_attention_heads=24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        665,
    ),
}
VAE = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, use_quant_conv=True)
CLIP = ClipText(
    vocab_size=9,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
    projection_dim=6,
    hidden_act="gelu",
)
T5 = T5Encoder(vocab_size=9, d_model=8, d_kv=4, d_ff=6, num_layers=2, num_heads=2)


def same(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key], key)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_written_is_recognised_and_taken_apart(name, tmp_path):
    module = TRANSFORMERS[name]
    tensors = reference.checkpoint(mmdit.FORMAT, module)
    single_file.write_transformer(tmp_path / "a.safetensors", module, reference.params(mmdit.FORMAT, module, tensors))
    part = single_file.read(tmp_path / "a.safetensors")["transformer"]
    same(part.tensors, tensors)
    found, params = weights.assemble(part.config, part.tensors, "a.safetensors")
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, params, reference.params(mmdit.FORMAT, module, tensors))


@pytest.mark.parametrize("size", SIZES)
def test_every_published_tensor_has_one_place(size):
    module, count = SIZES[size]
    d, layers, places = module.width, module.num_layers, {}
    for key, shape in reference.keys_and_shapes(mmdit.FORMAT, module).items():
        place = single_file.transformer_place(key, layers)
        places.setdefault(place.key, []).append((place.third, shape, place.exchanged))
    assert len(places) == count
    for key, parts in places.items():
        assert [third for third, _, _ in sorted(parts)] == ([0, 1, 2] if ".qkv." in key else [None])
    exchanged = {key for key, parts in places.items() if parts[0][2]}
    last = f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1"
    assert exchanged == {f"{k}.{p}" for k in ("final_layer.adaLN_modulation.1", last) for p in ("weight", "bias")}
    kinds = {"x_block": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")}
    kinds["context_block"] = kinds["x_block"]
    expected = {"pos_embed"} | {f"x_embedder.proj.{part}" for part in ("weight", "bias")}
    names = ["context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    names += [f"{letter}_embedder.mlp.{i}" for letter in "ty" for i in (0, 2)]
    for i in range(layers):
        for block in ("x_block", "context_block"):
            key = f"joint_blocks.{i}.{block}."
            ends = block == "context_block" and i == layers - 1
            names += [key + name for name in ("attn.qkv", "adaLN_modulation.1")]
            names += [] if ends else [key + name for name in ("attn.proj", "mlp.fc1", "mlp.fc2")]
            expected |= {f"{key}attn.ln_{letter}.weight" for letter in "qk"}
        if i in module.dual_attention_layers:
            names += [f"joint_blocks.{i}.x_block.attn2.{name}" for name in ("qkv", "proj")]
            expected |= {f"joint_blocks.{i}.x_block.attn2.ln_{letter}.weight" for letter in "qk"}
    assert places.keys() == expected | {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert places[f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1.weight"][0][1] == (2 * d, d)


@pytest.fixture
def everything(tmp_path):
    """A file with all components in 8 and 16 bits, and what it holds."""
    parts = {
        "transformer": (mmdit.FORMAT, TRANSFORMERS["dual"]),
        "vae": (vae.FORMAT, VAE),
        "text_encoder_2": (clip.FORMAT, CLIP),
        "text_encoder_3": (t5.FORMAT, T5),
    }
    held, written = {}, {}
    for name, (kind, module) in parts.items():
        small = ml_dtypes.float8_e4m3fn if name == "text_encoder_3" else ml_dtypes.bfloat16
        held[name] = {key: value.astype(small) for key, value in reference.checkpoint(kind, module).items()}
    for key, tensor in held["vae"].items():
        written[single_file.VAE_PREFIX + single_file.vae_place(key, 2).key] = tensor
    for name in ("text_encoder_2", "text_encoder_3"):
        written |= {single_file.TEXT_PREFIXES[name] + key: tensor for key, tensor in held[name].items()}
    params = reference.params(mmdit.FORMAT, TRANSFORMERS["dual"], held["transformer"])
    single_file.write_transformer(tmp_path / "t.safetensors", TRANSFORMERS["dual"], params)
    path = tmp_path / "all.safetensors"
    safetensors.write(
        path, written | safetensors.read(tmp_path / "t.safetensors") | {"text_encoders.clip_g.logit_scale": np.ones(1)}
    )
    return path, held, parts


def test_all_components_are_found(everything):
    path, held, parts = everything
    found = single_file.read(path)
    assert found.keys() == held.keys()
    for name, part in found.items():
        same(part.tensors, held[name])
        module, params = weights.assemble(part.config, part.tensors, "all.safetensors", ml_dtypes.bfloat16)
        assert module == parts[name][1].clone(dtype=module.dtype, param_dtype=module.dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_missing_and_unknown_tensors_are_named(everything, tmp_path):
    tensors = safetensors.read(everything[0])
    tensors["model.diffusion_model.control.weight"] = tensors.pop(
        "model.diffusion_model.joint_blocks.1.x_block.attn2.qkv.bias"
    )
    safetensors.write(tmp_path / "b.safetensors", tensors)
    part = single_file.read(tmp_path / "b.safetensors")["transformer"]
    with pytest.raises(UserError, match=r"3 missing: .*blocks.1.attn2.to_k.bias.*1 unexpected: control.weight"):
        weights.assemble(part.config, part.tensors, "b.safetensors")


@pytest.mark.parametrize("keys", [["a"], ["model.diffusion_model.a"], ["first_stage_model.encoder.conv_in.weight"]])
def test_files_of_other_models_are_refused(keys, tmp_path):
    safetensors.write(tmp_path / "c.safetensors", {key: np.zeros(3, np.float32) for key in keys})
    with pytest.raises(UserError, match="no Stable Diffusion 3"):
        single_file.read(tmp_path / "c.safetensors")


@pytest.mark.reference
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_equal_what_diffusers_makes_of_the_file(name, tmp_path):
    import torch
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    module = TRANSFORMERS[name]
    params = reference.params(mmdit.FORMAT, module, reference.checkpoint(mmdit.FORMAT, module))
    single_file.write_transformer(tmp_path / "a.safetensors", module, params)
    raw = {key: torch.tensor(value) for key, value in safetensors.read(tmp_path / "a.safetensors").items()}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(raw)
    same(single_file.read(tmp_path / "a.safetensors")["transformer"].tensors, {k: v.numpy() for k, v in theirs.items()})


@pytest.mark.reference
def test_autoencoders_equal_what_diffusers_makes_of_the_file(everything):
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    path, held, _ = everything
    raw = {key: torch.tensor(value.astype(np.float32)) for key, value in safetensors.read(path).items()}
    theirs = convert_ldm_vae_checkpoint(raw, vae.FORMAT.config(VAE))
    same(
        {key: value.astype(np.float32) for key, value in held["vae"].items()}, {k: v.numpy() for k, v in theirs.items()}
    )
