"""Low-rank adapters: what they compute beside parameters of every kind, and that nothing else changes."""

import functools
import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import lora_files
import numpy as np
import pytest
import reference
import sd3_folder

import diffjax
from diffjax import cli, weights
from diffjax.nets import lora
from diffjax.nets.layers import matmul
from diffjax.nets.quantize import SCHEMES
from diffjax.sampling import job
from diffjax.utils.errors import UserError
from diffjax.weights import lora as lora_file, safetensors, single_file
from diffjax.weights.lora_names import linear

MODULE = lora_files.MODULE
KEPT = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4", "dtype": "bfloat16"},
    "sharded": {"shard": "tensor"},
    "int8 sharded": {"quantize": "int8", "shard": "fsdp"},
}


@pytest.fixture(scope="module")
def base():
    form = weights._format_of(MODULE)
    return reference.params(form, MODULE, reference.checkpoint(form, MODULE))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder, in which its transformer lies as a single file too."""
    folder = sd3_folder.write(tmp_path_factory.mktemp("model"), "medium")
    single_file.write_transformer(folder / "sd3.5_tiny.safetensors", *weights.load(folder / "transformer"))
    return folder


OUTPUT = jax.jit(MODULE.apply)


def adapters(targets, rank=3, alpha=6.0):
    """With a B that is not zero."""
    shapes = {path: row.leaf.shape for path, row in linear(MODULE).items()}
    made = lora.create(jax.random.key(0), lora.chosen(shapes, targets), rank, alpha)
    return {path: one.replace(b=jax.random.normal(jax.random.key(1), one.b.shape) / 9) for path, one in made.items()}


def inputs():
    shapes = ((2, 8, 8, 4), (2,), (2, 5, 32), (2, 20))
    return [np.random.RandomState(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)]


def output(params):
    return np.asarray(OUTPUT({"params": params}, *inputs()))


def read(path, tensors, metadata=None):
    """The transformer's adapters out of a file that holds these tensors."""
    safetensors.write(path, tensors, metadata)
    return lora_file.read(path, {"transformer": MODULE})["transformer"]


def merged(params, changes, biases=()):
    """A checkpoint's parameters with `changes` of their layers, made in float64, and with more bias in some."""
    form = weights._format_of(MODULE)
    tensors = weights.write_params(params, form.names(MODULE))
    made = {f"{layer}.weight": change(tensors[f"{layer}.weight"]) for layer, change in changes.items()}
    made |= {f"{layer}.bias": tensors[f"{layer}.bias"] + more for layer, more in dict(biases).items()}
    return reference.params(form, MODULE, tensors | {key: np.float32(tensor) for key, tensor in made.items()})


def test_every_linear_layer_can_have_one():
    every = linear(MODULE)
    assert {f"{layer}/kernel" for layer in ("blocks_0/attn2/to_q", "blocks_2/ff/net_2", "proj_out")} <= every.keys()
    assert "pos_embed_proj/kernel" not in every


def test_layers_compute_with_the_merged_weights(base, tmp_path):
    tensors, changes = lora_files.write(lora_files.NAMINGS["kohya"])
    joined = lora.add(base, [(read(tmp_path / "a", tensors), 1.0)])
    expected = output(merged(base, changes))
    assert reference.relative(output(joined), expected) <= 2e-5 < 0.1 < reference.relative(output(base), expected)
    nothing = jax.tree.map(jnp.zeros_like, dict(read(tmp_path / "a", tensors).items()))
    np.testing.assert_array_equal(output(lora.join(base, nothing)), output(base))


def test_layers_compute_with_magnitudes_and_biases_too(base, tmp_path):
    tensors, changes = lora_files.write(lora_files.NAMINGS["peft_named"], dora=True)
    plain = [layer for layer, change in changes.items() if change.magnitude is None]
    biases = {
        layer: np.random.RandomState(0).standard_normal(len(changes[layer].delta)).astype(np.float32) for layer in plain
    }
    more = {f"base_model.model.{layer}.lora_B.default.bias": bias for layer, bias in biases.items()}
    joined = lora.add(base, [(read(tmp_path / "a", tensors | more), 1.0)])
    expected = output(merged(base, changes, biases))
    assert len(plain) > 3 and reference.relative(output(joined), expected) <= 2e-5


def test_several_files_are_summed_whatever_their_order(base, tmp_path):
    files, changes = zip(*(lora_files.write(lora_files.NAMINGS["diffusers"], seed, dora=seed > 0) for seed in range(3)))
    read_all = [read(tmp_path / str(i), tensors) for i, tensors in enumerate(files)]
    before, strengths = lora_files.kernels(base), [0.7, -0.4, 1.5]
    assert lora_files.wrong(lora.add(base, list(zip(read_all, strengths))), before, changes, strengths) <= 5e-6
    nothing = lora.add(base, [(one, 0.0) for one in read_all])
    assert lora_files.wrong(nothing, before, []) == 0


def test_the_base_may_be_in_few_bits():
    kernel, x = jax.random.normal(jax.random.key(0), (64, 8)), jnp.ones((2, 64))
    (adapter,) = lora.create(jax.random.key(1), {"kernel": kernel.shape}, 3, 6.0).values()
    adapter = adapter.replace(b=jnp.ones((3, 8)))
    few = SCHEMES["int8"](kernel)
    apart = matmul(x, lora.LowRank(few, adapter), jnp.float32) - matmul(x, few, jnp.float32)
    np.testing.assert_allclose(apart, 2 * (x @ adapter.a @ adapter.b), rtol=1e-4, atol=1e-5)


DEFAULT = [
    ("diffusers", "float32", False, False),
    ("kohya", "int8 sharded", True, True),
    ("comfy", "bfloat16", True, False),
]


def combinations():
    """Every naming beside every way to keep weights, from a folder or a single file, LoRA or DoRA; by default a few."""
    for one in itertools.product(lora_files.NAMINGS, KEPT, (False, True), (False, True)):
        yield pytest.param(*one, marks=[] if one in DEFAULT else pytest.mark.slow)


@pytest.fixture(scope="module")
def before(model):
    """The kernels of the model without adapters, by how they are kept."""
    return functools.cache(lambda how: lora_files.kernels(diffjax.load(model, prompts=[], **KEPT[how]).denoiser.params))


@pytest.mark.parametrize("naming, how, single, dora", list(combinations()))
def test_files_of_every_program_act_on_weights_of_every_kind(model, before, tmp_path, naming, how, single, dora):
    tensors, changes = lora_files.write(lora_files.NAMINGS[naming], dora=dora)
    safetensors.write(tmp_path / "a.safetensors", tensors)
    place = model / "sd3.5_tiny.safetensors" if single else model
    loaded = diffjax.load(place, prompts=[], lora=f"{tmp_path / 'a.safetensors'}:0.5", **KEPT[how])
    assert lora_files.wrong(loaded.denoiser.params, before(how), [changes], [0.5]) <= 5e-6


def test_targets_that_match_nothing_are_said():
    for targets, why in {"nothing": "matches no linear layer", "(": "no regular expression"}.items():
        with pytest.raises(UserError, match=why):
            adapters(targets)


def test_text_encoders_are_adapted_as_their_merged_weights_are(tmp_path):
    folder = sd3_folder.write(tmp_path / "model", "medium")
    tensors, attention, mlp = (
        {},
        "text_model.encoder.layers.{}.self_attn.out_proj",
        "text_model.encoder.layers.{}.mlp.fc1",
    )
    for name, prefix, layers in (
        ("text_encoder", "text_encoder.", [attention.format(0), "text_projection"]),
        ("text_encoder_2", "lora_te2_", [mlp.format(1), attention.format(0)]),
        (
            "text_encoder_3",
            "lora_te3_",
            ["encoder.block.1.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wo"],
        ),
    ):
        file = folder / name / "model.safetensors"
        kept = dict(safetensors.read(file))
        for i, layer in enumerate(layers):
            outputs, inputs = kept[f"{layer}.weight"].shape
            a, b = (
                np.random.RandomState(i).standard_normal(shape).astype(np.float32)
                for shape in ((2, inputs), (outputs, 2))
            )
            dotted = prefix.endswith(".")
            stem = prefix + (layer if dotted else layer.replace(".", "_"))
            ends = ("lora_A", "lora_B") if dotted else ("lora_down", "lora_up")
            tensors |= {f"{stem}.{ends[0]}.weight": a, f"{stem}.{ends[1]}.weight": b}
            kept[f"{layer}.weight"] = np.float32(kept[f"{layer}.weight"] + 0.25 * (b.astype(np.float64) @ a))
        (tmp_path / "merged" / name).mkdir(parents=True)
        safetensors.write(
            tmp_path / "merged" / name / "model.safetensors", {key: np.array(value) for key, value in kept.items()}
        )
    safetensors.write(tmp_path / "a.safetensors", tensors)
    adapted = diffjax.load(folder, prompts=["a cat"], lora={tmp_path / "a.safetensors": 0.25}).text(["a cat"])
    before = diffjax.load(folder, prompts=["a cat"]).text(["a cat"])
    shutil.copytree(tmp_path / "merged", folder, dirs_exist_ok=True)
    expected = diffjax.load(folder, prompts=["a cat"]).text(["a cat"])
    for name, value in expected.items():
        assert reference.relative(adapted[name], value) <= 1e-5 < 0.1 < reference.relative(before[name], value)


def test_jobs_record_their_adapters_and_are_replayed(model, tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        safetensors.write(path, lora_files.write(lora_files.NAMINGS["kohya"], seed)[0])
    told = ["--model", str(model), "--prompt", "a cat", "--size", "16", "--steps", "1", "--num", "1"]
    a, b = (["--lora", f"{os.path.relpath(path)}:{strength}"] for path, strength in zip(paths, (0.5, -1)))
    assert cli.main(["sample", *told, *a, *b, "--out", str(tmp_path / "out")]) == 0
    recipe = job.read_manifest(tmp_path / "out" / "manifest.json")["recipe"]
    assert sorted(recipe["lora"]) == ["../a.safetensors:0.5", "../b.safetensors:-1.0"]
    assert sorted(recipe["files"]["lora"]) == sorted([job.sha256(path), of] for path, of in zip(paths, (0.5, -1.0)))
    assert cli.main(["sample", *told, *b, *a, "--out", str(tmp_path / "other")]) == 0
    first, second, plain = ((tmp_path / name / "grid.png") for name in ("out", "other", "plain"))
    assert first.read_bytes() == second.read_bytes()
    assert cli.main(["sample", *told, "--lora", f"{paths[0]}:0", "--out", str(plain.parent)]) == 0
    assert first.read_bytes() != plain.read_bytes()
    assert (
        cli.main(["sample", "--replay", str(tmp_path / "out" / "manifest.json"), "--out", str(tmp_path / "again")]) == 0
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["recipe"]["lora"] = [name.replace(":0.5", ":0.25") for name in manifest["recipe"]["lora"]]
    (tmp_path / "out" / "other.json").write_text(json.dumps(manifest))
    assert (
        cli.main(["sample", "--replay", str(tmp_path / "out" / "other.json"), "--out", str(tmp_path / "weaker")]) == 2
    )
    safetensors.write(paths[0], lora_files.write(lora_files.NAMINGS["kohya"], 5)[0])
    assert (
        cli.main(["sample", "--replay", str(tmp_path / "out" / "manifest.json"), "--out", str(tmp_path / "third")]) == 2
    )


@pytest.mark.reference
def test_diffusers_reads_and_computes_the_same(tmp_path, base):
    pytest.importorskip("peft")
    from diffusers import SD3Transformer2DModel

    weights.save(tmp_path / "transformer", MODULE, base)
    some = adapters("/attn/|proj_out|linear_1|norm1_linear")
    lora_file.write(tmp_path / lora_file.FILE, MODULE, some)
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    theirs.load_lora_adapter(tmp_path, weight_name=lora_file.FILE)
    assert reference.relative(output(lora.join(base, some)), published(theirs)) <= 1e-5


def published(network):
    """What diffusers' network makes of `inputs`."""
    import torch

    x, t, context, pooled = map(torch.from_numpy, inputs())
    with torch.no_grad():
        return network(x.permute(0, 3, 1, 2), context, pooled, t).sample.permute(0, 2, 3, 1).numpy()


SETTINGS = {
    "plain": {},
    "stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 3}, "alpha_pattern": {r"^transformer_blocks\.1\..*": 5, "to_k": 2}},
    "dora": {"use_dora": True, "use_rslora": True},
    "bias": {"lora_bias": True},
    "alpha 0": {"lora_alpha": 0},
}


@pytest.mark.reference
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("header", [True, False], ids=["header", "config"])
def test_what_peft_trained_is_computed_as_peft_does(tmp_path, base, name, header):
    """Settings in the header, as diffusers' `save_lora_adapter` writes them, or in PEFT's own adapter_config.json."""
    peft = pytest.importorskip("peft")
    import torch
    from diffusers import SD3Transformer2DModel

    weights.save(tmp_path / "transformer", MODULE, base)
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    targets = ["to_q", "to_k", "add_v_proj", "to_out.0", "proj_out", "norm1.linear", "net.0.proj"]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets} | SETTINGS[name])
    random = torch.Generator().manual_seed(0)
    if header:
        theirs.add_adapter(config)
    whole = theirs if header else peft.get_peft_model(theirs, config)
    for key, value in whole.named_parameters():
        if "lora_" in key:
            noise = torch.randn(value.shape, generator=random)
            value.data = value.data * (1 + noise / 5) if "magnitude" in key else noise / 5
    if header:
        theirs.save_lora_adapter(tmp_path / "out")
    else:
        whole.save_pretrained(tmp_path / "out")
    (source,) = lora_file.sources(tmp_path / "out")
    ours = lora.add(base, [(lora_file.read(source.file, {"transformer": MODULE})["transformer"], 1.0)])
    assert reference.relative(output(ours), published(theirs)) <= 1e-5
