"""Files of adapters: every program's names and settings, and one clear error for whatever else they hold."""

import json
import math
from pathlib import Path

import jax
import lora_files
import numpy as np
import pytest
import reference
import sd3_folder

from diffjax import weights
from diffjax.nets import lora
from diffjax.utils.errors import UserError
from diffjax.weights import lora as lora_file, safetensors
from diffjax.weights.lora_names import PREFIXES, linear, meaning, parts, plain
from diffjax.weights.peft import CONFIG, METADATA

MODULE = lora_files.MODULE
MODULES = {"transformer": MODULE, **sd3_folder.NETWORKS}
QUERY = "transformer_blocks.1.attn.to_q"
A, B = (
    np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    for seed, shape in enumerate([(2, 16), (16, 2)])
)


@pytest.fixture(scope="module")
def base():
    form = weights._format_of(MODULE)
    return reference.params(form, MODULE, reference.checkpoint(form, MODULE))


@pytest.fixture
def read(tmp_path):
    """A function: what is read from a file of these tensors, with `metadata` in its header, beside a `config`."""

    def read(tensors, metadata=None, config=None):
        header = (
            None if metadata is None else {METADATA: metadata if isinstance(metadata, str) else json.dumps(metadata)}
        )
        safetensors.write(tmp_path / "some.safetensors", tensors, header)
        if config is not None:
            (tmp_path / CONFIG).write_text(json.dumps(config))
        return lora_file.read(tmp_path / "some.safetensors", MODULES)

    return read


def pair(layer=f"transformer.{QUERY}", **more):
    return {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B} | {
        f"{layer}.{end}": value for end, value in more.items()
    }


def scale_of(found):
    adapter = found["transformer"]["blocks_0/attn/to_q/kernel"]
    np.testing.assert_array_equal(adapter.a[1], A.T)
    assert not adapter.scale[0].any() and len(set(adapter.scale[1])) == 1
    return float(adapter.scale[1, 0])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("naming", lora_files.NAMINGS)
def test_every_programs_names_mean_the_layers_that_they_say(base, read, naming, dora):
    tensors, changes = lora_files.write(lora_files.NAMINGS[naming], dora=dora)
    added = lora.add(base, [(read(tensors)["transformer"], 1.0)])
    assert len(changes) == 23 and lora_files.wrong(added, lora_files.kernels(base), [changes]) <= 5e-6


def test_no_two_layers_have_the_same_name():
    for name, module in MODULES.items():
        if name in PREFIXES:
            claimed = [found for found in parts(module).values() if len({part.place for part in found}) > 1]
            assert all(sorted(part.place.third for part in found) == [0, 1, 2] for found in claimed)
            every = {(part.row.path, part.index) for found in parts(module).values() for part in found}
            assert len(every) == sum(len(row.keys) for row in linear(module).values())


def test_text_encoders_have_names_too():
    attention, layer = "text_model.encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
    for key, component, name in (
        (f"text_encoder.{attention}.lora_A.weight", "text_encoder", attention),
        (f"text_encoder_2.{attention}.lora_linear_layer.up.weight", "text_encoder_2", attention),
        (f"text_encoders.clip_g.transformer.{attention}.lora_up.weight", "text_encoder_2", attention),
        (f"lora_te1_{plain(attention)}.lora_down.weight", "text_encoder", attention),
        (f"lora_te2_{plain(attention)}.alpha", "text_encoder_2", attention),
        (f"lora_te3_{plain(layer)}.dora_scale", "text_encoder_3", layer),
    ):
        said = meaning(key)
        assert said.component == component and plain(said.layer) == plain(name)
        assert plain(name) in parts(MODULES[component])


PATTERNS = {
    "common": ({"r": 2, "lora_alpha": 6}, 3.0),
    "rank-stabilised": ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(2)),
    "alpha 0": ({"r": 2, "lora_alpha": 0}, 0.0),
    "rank_pattern": ({"r": 8, "lora_alpha": 6, "rank_pattern": {"attn.to_q": 2}}, 3.0),
    "alpha_pattern": ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"to_k": 9, "to_q": 1}}, 0.5),
    "first of patterns": (
        {"r": 2, "lora_alpha": 6, "alpha_pattern": {r"^transformer_blocks\.1\..*": 5, "to_q": 1}},
        2.5,
    ),
    "both, stabilised": (
        {"r": 8, "lora_alpha": 6, "rank_pattern": {QUERY: 2}, "alpha_pattern": {QUERY: 4}, "use_rslora": True},
        4 / math.sqrt(2),
    ),
    "not the name's end": ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"o_q": 1, "attn": 1}}, 3.0),
}


@pytest.mark.parametrize("place", ["transformer.", "", CONFIG])
@pytest.mark.parametrize("settings", PATTERNS)
def test_scales_are_pefts(read, settings, place):
    """alpha / r, alpha / sqrt(r) where rank-stabilised, each by the first pattern that matches the end of a name."""
    said, expected = PATTERNS[settings]
    said = said | {"peft_type": "LORA", "target_modules": ["to_q"], "init_lora_weights": True, "lora_dropout": 0.1}
    found = (
        read(pair(), config=said) if place == CONFIG else read(pair(), {f"{place}{name}": said[name] for name in said})
    )
    assert math.isclose(scale_of(found), expected, rel_tol=1e-6, abs_tol=0)


def test_scales_without_settings_are_alphas_tensor_or_one(read):
    assert scale_of(read(pair())) == 1
    for alpha in (np.float32(3), np.float32([3]), np.float16([[3]]), np.int64(3)):
        assert scale_of(read(pair(alpha=np.asarray(alpha)))) == 1.5
    assert scale_of(read(pair(alpha=np.float32(0)))) == 0
    assert scale_of(read(pair(), {"transformer.r": 2, "transformer.lora_alpha": 5}, {"r": 2, "lora_alpha": 7})) == 2.5


def test_what_is_written_is_read(tmp_path):
    shapes = {path: row.leaf.shape for path, row in linear(MODULE).items()}
    some = lora.create(jax.random.key(0), lora.chosen(shapes, "/attn/|time.*linear_1"), 3, 6.0)
    some = {path: one.replace(b=jax.random.normal(jax.random.key(1), one.b.shape)) for path, one in some.items()}
    lora_file.write(tmp_path / lora_file.FILE, MODULE, some)
    tensors = safetensors.read(tmp_path / lora_file.FILE)
    assert tensors["transformer.transformer_blocks.2.attn.to_out.0.lora_A.weight"].shape == (3, 16)
    back = lora_file.read(tmp_path / lora_file.FILE, MODULES)["transformer"]
    assert back.keys() == some.keys() and jax.tree.all(jax.tree.map(np.array_equal, back, some))


TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
WRONG = {
    "no adapters": ({}, "holds no adapters"),
    "a lone A": ({"transformer.proj_out.lora_A.weight": A}, "'proj_out' has no lora_B"),
    "a lone A in a stack": (
        pair() | {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": A},
        "blocks.0.* no lora_B",
    ),
    "a lone alpha": (pair() | {"transformer.proj_out.alpha": A[:1, 0]}, "'proj_out' has no lora_A and no lora_B"),
    "another layer": (pair("transformer.blocks.0.to_q"), "no linear layers called transformer blocks.0.to_q"),
    "a convolution": (pair("transformer.pos_embed.proj"), "no linear layers called transformer pos_embed.proj"),
    "another width": (pair("transformer.proj_out.lora_x"), "no linear layers"),
    "narrow": ({name: tensor[:, :1] for name, tensor in pair().items()}, "shapes|16 to 16 wide"),
    "a layer too wide": (pair("transformer.transformer_blocks.1.ff.net.2"), "net.2' is 64 to 16 wide here"),
    "a fused third": (pair("diffusion_model.joint_blocks.0.x_block.attn.qkv"), "attn.qkv' is 16 to 48 wide here"),
    "rank 0": ({f"transformer.{QUERY}.lora_A.weight": A[:0], f"transformer.{QUERY}.lora_B.weight": B[:, :0]}, "shapes"),
    "ranks that differ": (pair() | {f"transformer.{QUERY}.lora_B.weight": B[:, :1]}, r"shapes \[2, 16\] and \[16, 1\]"),
    "a huge rank": (
        {name: np.ones((33, 16) if "lora_A" in name else (16, 33), np.float32) for name in pair()},
        "shapes",
    ),
    "one axis": (pair() | {f"transformer.{QUERY}.lora_A.weight": A[0]}, "shapes"),
    "two alphas": (pair(alpha=A[0, :2]), "alpha of .* is not one number"),
    "NaN as alpha": (pair(alpha=np.float32(np.nan)), "alpha of .* is not finite"),
    "infinite": (pair() | {f"transformer.{QUERY}.lora_A.weight": A + np.inf}, "lora_A of .* is not finite"),
    "beyond float32": (pair() | {f"transformer.{QUERY}.lora_A.weight": A.astype("f8") * 1e300}, "is not finite"),
    "whole numbers": (pair() | {f"transformer.{QUERY}.lora_A.weight": A.astype("i4")}, "of int32, not of floating"),
    "two adapters": (pair() | {f"transformer.{QUERY}.lora_A.other.weight": A}, "1 tensors that are not understood"),
    "twice": (pair() | pair("lora_transformer_transformer_blocks_1_attn_to_q"), "adapts .*to_q.weight twice"),
    "magnitudes of inputs": (pair(dora_scale=np.ones((1, 16), "f4")), "only one number for each of 16 outputs"),
    "magnitude and bias": (pair(**{"dora_scale": np.ones(16, "f4"), "lora_B.bias": np.ones(16, "f4")}), "no paper"),
    "LoHa": (
        {"lycoris_proj_out.hada_w1_a": A, "lycoris_proj_out.hada_w1_b": B},
        "hada_w1_a, lycoris_proj_out.hada_w1_b",
    ),
    "LoKr": (pair() | {"lycoris_proj_out.lokr_w1": A}, "not understood: lycoris_proj_out.lokr_w1"),
    "a whole module": (pair() | {"transformer.proj_out.weight": A}, "not understood: transformer.proj_out.weight"),
    "a difference": (
        pair() | {"diffusion_model.proj_out.diff_b": A},
        "not understood: diffusion_model.proj_out.diff_b",
    ),
    "of the first CLIP of another kind": (pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj"), "lora_te_text"),
    "another text layer": (pair(TEXT + "_x"), "called text_encoder text_model.encoder.layers.0.self_attn.q_proj_x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_understood_is_named(read, name):
    tensors, why = WRONG[name]
    with pytest.raises(UserError, match=why) as said:
        read(tensors)
    assert "\n" not in str(said.value) and "some.safetensors" in str(said.value)


def test_adapters_of_what_a_model_is_without_are_named(read, tmp_path):
    with pytest.raises(UserError, match="adapts text_encoder, which this model is without"):
        safetensors.write(tmp_path / "a", pair(TEXT))
        lora_file.read(tmp_path / "a", {"transformer": MODULE})


LORA = {"r": 2, "lora_alpha": 6}
WRONG_SETTINGS = {
    "no object": ([1], "do not say alpha"),
    "no JSON": ("{", "do not say alpha"),
    "deep": ("[" * 100_000, "do not say alpha"),
    "another rank": ({"r": 4, "lora_alpha": 6}, "says r = 4 of .*its tensors have rank 2"),
    "no alpha": ({"r": 2}, "lora_alpha of .* is null"),
    "a word": ({"r": 2, "lora_alpha": "6"}, 'is "6", which is no sensible number'),
    "NaN": ({"r": 2, "lora_alpha": math.nan}, "is NaN"),
    "beyond all numbers": ({"r": 2, "lora_alpha": 10**400}, "is 1000"),
    "no table": (LORA | {"alpha_pattern": [3]}, "alpha_pattern is no table"),
    "no pattern": (LORA | {"alpha_pattern": {"(": 1}}, "is no pattern of layers"),
    "an endless pattern": (LORA | {"alpha_pattern": {"(.*)*x": 1}}, "is no pattern of layers"),
    "a slow pattern": (LORA | {"alpha_pattern": {".*" * 9 + "x": 1}}, "is no pattern of layers"),
    "another type": (LORA | {"peft_type": "LOHA"}, "adapters of type 'LOHA'"),
    "another base": (LORA | {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes"),
    "a field of the future": (LORA | {"use_qalora": True}, "field 'use_qalora' is not implemented"),
    "another component": ({"unet.r": 2}, "says how 'unet' was adapted"),
    "promised magnitudes": (LORA | {"use_dora": True}, "has no lora_magnitude_vector"),
    "promised biases": (LORA | {"lora_bias": True}, "has no lora_B.bias"),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_settings_that_are_not_understood_are_named(read, name):
    said, why = WRONG_SETTINGS[name]
    with pytest.raises(UserError, match=why) as error:
        read(pair(), said)
    assert "\n" not in str(error.value)


def test_settings_and_alpha_that_disagree_are_refused(read):
    assert scale_of(read(pair(alpha=np.float32(6)), LORA)) == 3
    with pytest.raises(UserError, match="says two scales of .*: 3 in its settings, 1 by its alpha"):
        read(pair(alpha=np.float32(2)), LORA)


def files(given):
    return [(Path(source.name).name, source.file.name, source.strength) for source in lora_file.sources(given)]


def test_files_are_named_with_their_strengths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_folders = ("one/adapter_model.safetensors", "one/optimizer.safetensors", "two/x.safetensors")
    for name in ("a.safetensors", "b:0.5", "C:x.safetensors", *in_folders):
        safetensors.write(tmp_path / name, pair() | {name: A})
    a = "a.safetensors"
    for given, strength in {a: 1, f"{a}:0.8": 0.8, f"{a}:-1": -1, f"{a}:0": 0, f"{tmp_path / a}:1e-1": 0.1}.items():
        assert files(given) == [(a, a, strength)]
    assert files("b:0.5") == [("b:0.5", "b:0.5", 1)] and files("b:0.5:2") == [("b:0.5", "b:0.5", 2)]
    assert files("C:x.safetensors:2") == [("C:x.safetensors", "C:x.safetensors", 2)]
    assert files(["one:0.5", Path("two")]) == files(["two", "one:0.5"]) == files({"two": 1, Path("one"): 0.5})
    assert {name for _, name, _ in files(["one", "two"])} == {"adapter_model.safetensors", "x.safetensors"}
    assert files(None) == files([]) == []


def test_files_that_cannot_be_meant_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    safetensors.write(tmp_path / "a.safetensors", pair())
    for name in ("many/a.safetensors", "many/b.safetensors"):
        safetensors.write(tmp_path / name, pair())
    (tmp_path / "none").mkdir()
    (tmp_path / "old.bin").write_bytes(b"PK")
    for given, why in {
        "a.safetensors:strong": "'strong' is no strength",
        "a.safetensors:": "'' is no strength",
        "a.safetensors:nan": "strength of a.safetensors is nan",
        "a.safetensors:inf": "is inf: give a number",
        "b.safetensors": "there is no file b.safetensors",
        "b.safetensors:1": "there is no file b.safetensors;",
        "loras/b.safetensors": "there is no file loras/b.safetensors",
        "many/c/b.safetensors": "there is no file many/c/b.safetensors",
        "/nowhere/b": "there is no file /nowhere/b",
        "many": "it holds a.safetensors, b.safetensors; name the file",
        "none": "it holds none",
        "old.bin": "old.bin is a pickle",
    }.items():
        with pytest.raises(UserError, match=why):
            lora_file.sources(given)
