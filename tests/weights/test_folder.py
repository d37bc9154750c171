"""Which of several forms of the weights is read: never one that was not meant, and always by a way that is told."""

import itertools
import re

import numpy as np
import pytest
import torchfile

from diffjax import cli, loading, weights
from diffjax.nets.unet import UNet
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import folder, hub, safetensors
from diffjax.weights.scheduler import Scheduler

STEM = "diffusion_pytorch_model"
VARIANTS = ("", "fp16", "bf16", "ema")
FORMS = [(variant, pickled, sharded) for variant in VARIANTS for pickled in (False, True) for sharded in (False, True)]
MODULE = UNet(
    sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    layers_per_block=1, norm_num_groups=4,
)  # fmt: skip


def named(variant, pickled, sharded):
    """The files of a form: the whole, or the index and two shards."""
    dotted, kind = f".{variant}" if variant else "", "bin" if pickled else "safetensors"
    if not sharded:
        return [f"{STEM}{dotted}.{kind}"]
    return [f"{STEM}.{kind}.index{dotted}.json", *(f"{STEM}{dotted}-0000{i}-of-00002.{kind}" for i in (1, 2))]


def meant(held, variant):
    """The only form that can be meant, or None: the rules, written once more."""
    kinds = {form[0] for form in held}
    if variant in kinds:
        left = {variant}
    elif "" in kinds:
        left = kinds - {"fp16", "bf16"}
    else:
        left = kinds
    if len(left) > 1:
        return None
    of_it = [form for form in held if form[0] in left]
    best = [form for form in of_it if not form[1]] or of_it
    return best[0] if len(best) == 1 else None


def test_every_set_of_forms_of_three():
    """All 696 folders with one to three forms, by all variants: what is meant is read, what is not known is refused."""
    refused = 0
    for held in itertools.chain.from_iterable(itertools.combinations(FORMS, count) for count in (1, 2, 3)):
        names = [name for form in held for name in named(*form)]
        forms = folder.forms(names)
        assert len(forms) == len(held)
        for variant in (None, *VARIANTS[1:], "other"):
            expected = meant(held, variant)
            if expected is not None:
                chosen = folder.choose(forms, variant, "here")
                assert chosen.name == named(*expected)[0], (held, variant)
                if variant != "other":
                    wanted = hub.needed([f"unet/{name}" for name in names], variant=variant)
                    assert wanted == sorted(f"unet/{name}" for name in named(*expected))
                continue
            refused += 1
            with pytest.raises(UserError, match="^here holds .* choose with --variant") as error:
                folder.choose(forms, variant, "here")
            for way in re.findall(r"--variant ([\w.]+)", str(error.value)):
                assert folder.choose(forms, way, "here").name in str(error.value)
    assert refused > 500


@pytest.mark.parametrize(
    "name, variant",
    [
        ("model.safetensors", ""),
        ("pytorch_model_ema.bin", "ema"),
        ("model.fp16.safetensors", "fp16"),
        (f"{STEM}.non_ema.safetensors", "non_ema"),
        (f"{STEM}.fp16-00001-of-00002.safetensors", "fp16"),
        (f"{STEM}-00001-of-00002.fp16.safetensors", "fp16"),
        (f"{STEM}.safetensors.index.fp16.json", "fp16"),
        (f"{STEM}.fp16.safetensors.index.json", "fp16"),
        ("pytorch_model-00001-of-00003.bin", ""),
        ("optimizer.bin", None),
        ("config.json", None),
        ("sd3.5_large.safetensors", None),
    ],
)
def test_names(name, variant):
    assert folder.variant_of(name) == variant


@pytest.fixture
def model(tmp_path):
    """A DDPM whose parameters are all 1."""
    weights.save_pipeline(tmp_path / "model", MODULE, _all(1.0), Scheduler())
    return tmp_path / "model"


def _all(value):
    import jax

    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), weights.shapes(MODULE))


def put(model, name, value):
    """Another file of weights, all of them `value`."""
    tensors = safetensors.read(model / "unet" / f"{STEM}.safetensors")
    tensors = {key: np.full_like(tensor, value) for key, tensor in tensors.items()}
    write = torchfile.write_state if name.endswith(".bin") else safetensors.write
    write(model / "unet" / name, tensors)
    return list(tensors)


def value(model, **how):
    """The one number that all parameters are."""
    (found,) = {float(leaf) for leaf in np.ravel(loading.load(model, **how).denoiser.params["conv_in"]["kernel"])}
    return found


def test_averaged_weights_beside_others(model):
    put(model, f"{STEM}.ema.safetensors", 2.0)
    with pytest.raises(UserError, match=f"unet holds .*--variant {STEM}.safetensors or --variant ema$"):
        loading.load(model)
    assert value(model, variant="ema") == 2 and value(model, variant=f"{STEM}.safetensors") == 1
    with pytest.raises(UserError, match="unknown variant of .* enema: did you mean ema"):
        loading.load(model, variant="enema")


@pytest.mark.parametrize("name, variant", [(f"{STEM}.fp16.safetensors", "fp16"), (f"{STEM}.bin", f"{STEM}.bin")])
def test_the_same_weights_rounded_or_pickled_are_left_out_aloud(model, name, variant, recwarn):
    put(model, name, 2.0)
    with pytest.warns(UserWarning, match=f"{STEM}.safetensors is read, not {name} \\(--variant chooses\\)"):
        assert value(model) == 1
    recwarn.clear()
    assert value(model, variant=variant) == 2 and not recwarn


def test_a_whole_file_beside_an_index(model, capsys, tmp_path):
    keys = put(model, f"{STEM}-00001-of-00001.safetensors", 2.0)
    index = f"{STEM}.safetensors.index.json"
    files.write_json(model / "unet" / index, {"weight_map": dict.fromkeys(keys, f"{STEM}-00001-of-00001.safetensors")})
    command = ["convert", str(model), str(tmp_path / "out"), "--to", "diffusers"]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.endswith(f"choose with --variant {STEM}.safetensors or --variant {index}\n")
    assert cli.main([*command, "--variant", index]) == 0
    assert value(tmp_path / "out") == 2


def test_missing_shards_are_named(model):
    keys = put(model, f"{STEM}-00001-of-00003.safetensors", 2.0)
    (model / "unet" / f"{STEM}.safetensors").unlink()
    with pytest.raises(UserError, match="holds diffusion_pytorch_model-00001-of-00003.safetensors without the index"):
        loading.load(model)
    places = {key: f"{STEM}-0000{1 + i % 3}-of-00003.safetensors" for i, key in enumerate(keys)}
    files.write_json(model / "unet" / f"{STEM}.safetensors.index.json", {"weight_map": places})
    with pytest.raises(
        UserError, match=f"lacks {STEM}-00002-of-00003.safetensors, {STEM}-00003-of-00003.*: 2 of the 3 shards"
    ):
        loading.load(model)


@pytest.mark.parametrize(
    "content, told",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a pointer of Git LFS.* run `git lfs pull`",
        ),
        (b"GGUF\3\0\0\0", "GGUF, as llama.cpp .* take the model's safetensors"),
        (b"<!DOCTYPE html><html>", "a web page: download the file again, logged in"),
    ],
)
def test_what_is_something_else_than_its_name_says(model, content, told):
    for name in (f"{STEM}.safetensors", f"{STEM}.bin"):
        path = model / "unet" / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is {told}"):
            loading.load(model, variant=name)
        with pytest.raises(UserError, match=f"{name} is {told}"):
            loading.load(path)


@pytest.mark.parametrize("name", ["sd3.ckpt", "sd3.pt", "model.bin"])
def test_single_pickles_are_called_so(tmp_path, name):
    torchfile.write_state(tmp_path / name, {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="is a pickle of PyTorch: write its state_dict as safetensors"):
        loading.load(tmp_path / name)


OTHERS = {"flax_model.msgpack": "of Flax", "model.onnx": "an ONNX graph", "x.pt": "a pickle of PyTorch"}


@pytest.mark.parametrize("name", OTHERS)
def test_folders_of_other_formats_say_which(model, name):
    (model / "unet" / f"{STEM}.safetensors").rename(model / "unet" / name)
    told = f"holds no weights that diffjax reads .*; {name} is {OTHERS[name]}: take the model's safetensors"
    with pytest.raises(UserError, match=told):
        loading.load(model)


@pytest.mark.parametrize(
    "command", [["sample", "--out", "o"], ["plan"], ["fit-grid", "--steps", "2"], ["convert", "o"]]
)
def test_every_command_that_reads_a_model_takes_a_variant(model, capsys, command):
    put(model, f"{STEM}.ema.safetensors", 2.0)
    told = [str(model)] if command[0] == "convert" else ["--model", str(model)]
    assert cli.main([command[0], *told, *command[1:], "--variant", "enema"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "unknown variant of" in lines[-1] and lines[-1].endswith("enema: did you mean ema?") and len(lines) <= 2


def test_a_folder_of_single_files_names_them(tmp_path):
    (tmp_path / "sd3.5_large-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds no model: .*; sd3.5_large-Q4.gguf is GGUF"):
        loading.load(tmp_path)
