"""Low-rank adapters: what they compute, their files, and that nothing else changes."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd3_folder

sys.path.insert(0, str(Path(__file__).parent / "nets"))
import reference

from diffjax import cli, generate, lora, weights
from diffjax.errors import UserError
from diffjax.nets.layers import matmul
from diffjax.quantize import SCHEMES
from diffjax.weights import lora as lora_file
from diffjax.weights import safetensors

MODULE = sd3_folder.TRANSFORMERS["medium"]


@pytest.fixture(scope="module")
def base():
    form = weights._format_of(MODULE)
    return reference.params(form, MODULE, reference.checkpoint(form, MODULE))


def adapters(targets, rank=3, alpha=6.0):
    """With a B that is not zero."""
    shapes = {path: row.leaf.shape for path, row in lora_file.linear(MODULE).items()}
    made = lora.create(jax.random.key(0), lora.chosen(shapes, targets), rank, alpha)
    return {path: one.replace(b=jax.random.normal(jax.random.key(1), one.b.shape) / 9) for path, one in made.items()}


def inputs():
    shapes = ((2, 8, 8, 4), (2,), (2, 5, 32), (2, 20))
    return [np.random.RandomState(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)]


def output(params, module=MODULE):
    return np.asarray(jax.jit(module.apply)({"params": params}, *inputs()))


def test_every_linear_layer_can_have_one(base):
    every = adapters("")
    assert {f"{layer}/kernel" for layer in ("blocks_0/attn2/to_q", "blocks_2/ff/net_2", "proj_out")} <= every.keys()
    assert "pos_embed_proj/kernel" not in every
    changed = output(lora.join(base, every))
    np.testing.assert_allclose(changed, output(lora.merge(base, every)), rtol=0, atol=2e-5 * np.abs(changed).max())
    assert reference.relative(changed, output(base)) > 0.1


def test_new_adapters_change_nothing(base):
    new = {path: one.replace(b=jnp.zeros_like(one.b)) for path, one in adapters("").items()}
    np.testing.assert_array_equal(output(lora.join(base, new)), output(base))


def test_the_base_may_be_in_few_bits():
    kernel, x = jax.random.normal(jax.random.key(0), (64, 8)), jnp.ones((2, 64))
    (adapter,) = lora.create(jax.random.key(1), {"kernel": kernel.shape}, 3, 6.0).values()
    adapter = adapter.replace(b=jnp.ones((3, 8)))
    few = SCHEMES["int8"](kernel)
    apart = matmul(x, lora.LowRank(few, adapter), jnp.float32) - matmul(x, few, jnp.float32)
    np.testing.assert_allclose(apart, 2 * (x @ adapter.a @ adapter.b), rtol=1e-4, atol=1e-5)


def test_files_bring_them_back(tmp_path):
    some = adapters("/attn/|time.*linear_1")
    lora_file.write(tmp_path / lora_file.FILE, MODULE, some)
    tensors = safetensors.read(tmp_path / lora_file.FILE)
    assert tensors["transformer.transformer_blocks.2.attn.to_out.0.lora_A.weight"].shape == (3, 16)
    back = lora_file.read(tmp_path / lora_file.FILE, MODULE)
    assert back.keys() == some.keys() and jax.tree.all(jax.tree.map(np.array_equal, back, some))


def test_files_of_others(tmp_path):
    layer = "transformer.transformer_blocks.1.attn.to_q"
    wide = {f"{layer}.lora_A.weight": np.ones((2, 16), np.float32), f"{layer}.lora_B.weight": np.ones((16, 2), np.float32)}
    safetensors.write(tmp_path / "a", wide)
    plain = lora_file.read(tmp_path / "a", MODULE)["blocks_0/attn/to_q/kernel"]
    assert plain.scale.tolist() == [0, 1] and not plain.a[0].any() and plain.a[1].all()
    safetensors.write(tmp_path / "b", wide | {f"{layer}.alpha": np.float32(1)})
    assert lora_file.read(tmp_path / "b", MODULE)["blocks_0/attn/to_q/kernel"].scale.tolist() == [0, 0.5]
    safetensors.write(tmp_path / "c", wide | {"text_encoder.x.lora_A.weight": np.ones(1, np.float32)})
    safetensors.write(tmp_path / "d", {name: tensor[:, :1] for name, tensor in wide.items()})
    safetensors.write(tmp_path / "e", wide, {lora_file.METADATA: json.dumps([1])})
    safetensors.write(tmp_path / "f", {})
    said = {"c": "1 tensors such as 'text_enc", "d": "16 to 16 wide", "e": "do not say alpha", "f": "no adapters"}
    for name, why in said.items():
        with pytest.raises(UserError, match=why):
            lora_file.read(tmp_path / name, MODULE)


def test_targets_that_match_nothing_are_said():
    for targets, why in {"nothing": "matches no linear layer", "(": "no regular expression"}.items():
        with pytest.raises(UserError, match=why):
            adapters(targets)


@pytest.mark.slow
def test_draws_with_a_file(tmp_path, base):
    folder = sd3_folder.write(tmp_path / "model", "medium", t5=False)
    path = tmp_path / lora_file.FILE
    lora_file.write(path, MODULE, adapters("/attn/"))
    told = ["--model", str(folder), "--lora", str(path), "--prompt", "a cat", "--size", "16", "--steps", "1", "--num", "1"]
    assert cli.main(["sample", *told, "--out", str(tmp_path / "out")]) == 0
    assert generate.read_manifest(tmp_path / "out" / "manifest.json")["recipe"]["files"]["lora"]


@pytest.mark.reference
def test_diffusers_reads_and_computes_the_same(tmp_path, base):
    pytest.importorskip("peft")
    import torch
    from diffusers import SD3Transformer2DModel

    weights.save(tmp_path / "transformer", MODULE, base)
    some = adapters("/attn/|proj_out|linear_1|norm1_linear")
    lora_file.write(tmp_path / lora_file.FILE, MODULE, some)
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    theirs.load_lora_adapter(tmp_path, weight_name=lora_file.FILE)
    x, t, context, pooled = map(torch.from_numpy, inputs())
    with torch.no_grad():
        y = theirs(x.permute(0, 3, 1, 2), context, pooled, t).sample.permute(0, 2, 3, 1).numpy()
    assert reference.relative(output(lora.join(base, some)), y) <= 1e-5
