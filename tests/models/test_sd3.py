"""Stable Diffusion 3.5 as a model: the whole pipeline, against diffusers' own on the same folders."""

import functools
import shutil
import tempfile
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import sd3_folder

import diffjax
from diffjax import cli
from diffjax.models import autoencoder, sd3
from diffjax.nets.quantize import Quantized
from diffjax.sampling import job
from diffjax.utils import image
from diffjax.utils.errors import UserError
from diffjax.weights import safetensors, single_file

PROMPTS, NEGATIVE = ["a cat in a hat", "it is 12 o'clock"], "the mat"
CASES = {"large": ("large", True), "medium": ("medium", True), "no_t5": ("large", False)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return functools.cache(lambda name: sd3_folder.write(tmp_path_factory.mktemp(name), *CASES[name]))


def latents():
    return np.random.RandomState(1).standard_normal((2, 8, 12, 4)).astype(np.float32)


def published(folder, **more):
    import torch
    from diffusers import StableDiffusion3Pipeline

    left_out = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    given = torch.from_numpy(latents()).permute(0, 3, 1, 2)
    call = functools.partial(pipeline, PROMPTS, height=16, width=24, latents=given, output_type="np")
    with torch.no_grad():
        return call(num_inference_steps=6, guidance_scale=4.5, negative_prompt=[NEGATIVE] * 2, **more).images


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def test_the_published_grid_ends_where_the_publishers_does(folders):
    model = diffjax.load(folders("large"), prompts=[])
    sigmas = model.denoiser.process.sigma(model.defaults.grid(4).astype(np.float32))
    np.testing.assert_allclose(sigmas[:, 0], [1.0, 0.857692, 0.602151, 0.008929], atol=5e-7)
    assert sigmas[-1, 1] == 0 and model.defaults.grid(4)[-1, 1] == 0
    assert abs(model.denoiser.process.sigma(model.defaults.grid(40)[-1, 0]) - 0.0089286) < 1e-7


def test_the_command_line_draws_what_sample_draws(folders, tmp_path, one_device):
    told = [
        "--prompt",
        PROMPTS[0],
        "--negative-prompt",
        NEGATIVE,
        "--size",
        "24x16",
        "--steps",
        "3",
        "--num",
        "1",
        "--seed",
        "3",
    ]
    command = ["sample", "--model", str(folders("large")), *told, "--preview", "1", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    (file,) = (path for path in (tmp_path / "out").glob("*.png") if path.name != "grid.png")
    drawn, text = image.read_png(file)
    told = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE, "size": (16, 24), "steps": 3}
    expected = diffjax.load(folders("large")).sample(jax.random.key(3), **told)
    assert drawn.shape == (16, 24, 3) and (image.to_uint8(expected)[0] == drawn).all()
    assert text["sampler"] == "dpmpp_2m" and text["guidance"] == "4.5"
    assert job.replay(tmp_path / "out" / "manifest.json", tmp_path / "again")


def test_wrong_keys_are_listed_by_component(folders, tmp_path):
    folder = shutil.copytree(folders("large"), tmp_path / "model")
    for name, key in (("vae", "decoder.conv_in.weight"), ("transformer", "proj_out.bias")):
        (path,) = (folder / name).glob("*.safetensors")
        tensors = dict(safetensors.read(path))
        del tensors[key]
        safetensors.write(path.with_suffix(".new"), tensors, {"format": "pt"})
        path.with_suffix(".new").replace(path)
    with pytest.raises(
        UserError, match=r"transformer .*1 missing: proj_out.bias; vae .*1 missing: decoder.conv_in.weight"
    ):
        diffjax.load(folder)


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_indices_of_other_tasks_name_the_same_components(folders, tmp_path, kind):
    folder = shutil.copytree(folders("large"), tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", f"StableDiffusion3{kind}Pipeline"))
    ours, same = (diffjax.load(one, prompts=[]).denoiser.params for one in (folder, folders("large")))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, same))


@pytest.mark.parametrize("name", ["StableDiffusion3ControlNetPipeline", "StableDiffusionXLPipeline", "DiTPipeline"])
def test_other_pipelines_are_refused_by_name(folders, tmp_path, name):
    folder = shutil.copytree(folders("large"), tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", name))
    with pytest.raises(
        UserError, match=f"holds a {name}: diffjax draws with DDPMPipeline, .*StableDiffusion3InpaintPipeline"
    ):
        diffjax.load(folder)


def test_kinds_are_told_by_name_and_layers(folders):
    large, medium = sd3_folder.TRANSFORMERS["large"], sd3_folder.TRANSFORMERS["medium"]
    assert sd3.kind("/turbo/sd3.5-large", large) == "large" and sd3.kind("x/large", medium) == "medium"
    for name in (
        "stabilityai/sd3.5-large-turbo",
        "/a/models--b--large-turbo/snapshots/0a1b",
        "sd3.5_turbo.safetensors",
    ):
        assert sd3.kind(name, large) == "turbo"
    turbo = sd3.load(folders("large"), name="sd3.5-turbo", prompts=[]).defaults
    assert (turbo.steps, turbo.guidance, turbo.sampler) == (4, None, "euler")


def test_sizes_are_multiples_of_a_patch(folders):
    model = diffjax.load(folders("large"), prompts=[])
    assert model.recipe(size=(16, 48)).shape == (8, 24, 4)
    for size in ((16, 18), (16, 52), (0, 16)):
        with pytest.raises(UserError, match=f"{size[1]} pixels wide and {size[0]} high: give multiples of 4 up to 48"):
            model.recipe(size=size)


def test_text_encoders_of_another_model_are_refused(folders):
    parts = sd3.components(folders("large"))
    clip = parts["text_encoder"]
    parts["text_encoder_2"] = clip
    with pytest.raises(UserError, match="the text encoders are of another model"):
        sd3.assemble(parts, folders("large"), sd3.FlowScheduler(), sd3.Kept(), "large", [])


def test_dpmpp_2m_is_the_published_loop(folders):
    """x' = (s'/s) x - expm1(-h) ((1 + 1/2r) D - D_old/2r), h = log(s/s'), r = h_old/h; the first and last steps of
    order 1.
    """
    model = diffjax.load(folders("large"), prompts=["a cat"])
    cond, denoise = model.text(["a cat"]), jax.jit(lambda denoiser, x, t, cond: denoiser(x, t, cond).x0)
    grid, x = model.defaults.grid(5).astype(np.float32), latents()[:1, :8, :8]
    sigmas = [*np.asarray(model.denoiser.process.sigma(grid[:, 0])), 0.0]
    before, y = None, x.astype(np.float64)
    for i in range(5):
        now = np.asarray(denoise(model.denoiser, y.astype(np.float32), grid[i, 0], cond), np.float64)
        guess = now
        if 0 < i < 4:
            h, old = np.log(sigmas[i] / sigmas[i + 1]), np.log(sigmas[i - 1] / sigmas[i])
            guess = (1 + h / old / 2) * now - h / old / 2 * before
        ratio = sigmas[i + 1] / sigmas[i]
        before, y = now, ratio * y + (1 - ratio) * guess
    ours = model.replace(decode=None).sample(jax.random.key(0), steps=5, guidance=lambda d: d, prompt="a cat", init=x)
    np.testing.assert_allclose(ours, y, atol=2e-4)


def test_previews_undo_a_linear_encoder():
    def encode(images):
        cells = images.reshape(1, images.shape[1] // 2, 2, images.shape[2] // 2, 2, 3).mean((2, 4))
        return cells @ np.random.RandomState(0).standard_normal((3, 5)) + 2

    encode.module = types.SimpleNamespace(factor=2)
    picture = autoencoder.colours(12)[None, ::-1, :8]
    shown = autoencoder.Preview(encode)(encode(picture))
    assert shown.shape == (1, 6, 4, 3)
    np.testing.assert_allclose(shown, picture.reshape(1, 6, 2, 4, 2, 3).mean((2, 4)), atol=1e-5)


def test_prompts_are_encoded_once(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path))
    long = "cat " * 75 + "it cat"
    with pytest.warns(UserWarning, match="the end of the text is cut off, 'it cat'"):
        first = diffjax.load(folders("large"), prompts=[long]).text([long])
    monkeypatch.setattr(sd3, "texts", lambda *given: pytest.fail("the text encoders were loaded"))
    with pytest.warns(UserWarning, match="the end of the text is cut off, 'it cat'"):
        again = diffjax.load(folders("large"), prompts=[long]).text([long])
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    monkeypatch.undo()
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path))
    for path in tmp_path.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.warns(UserWarning, match="the end of the text is cut off, 'it cat'"):
        mended = diffjax.load(folders("large"), prompts=[long])
    assert mended.text.prompts == ("", long)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, mended.text([long])))


def test_a_single_file_takes_what_it_lacks_from_its_folder(folders, tmp_path):
    folder = shutil.copytree(folders("medium"), tmp_path / "model")
    whole = diffjax.load(folder, prompts=[])
    denoiser = whole.denoiser
    single_file.write_transformer(folder / "sd3.5_tiny.safetensors", denoiser.apply.module, denoiser.params)
    shutil.rmtree(folder / "transformer")
    one = diffjax.load(folder / "sd3.5_tiny.safetensors", prompts=[])
    assert jax.tree.all(jax.tree.map(np.array_equal, one.denoiser.params, denoiser.params))
    assert one.shape == (128, 128, 4) and one.defaults.steps == whole.defaults.steps == 50


def test_a_picture_is_changed_where_the_mask_allows(folders):
    model = diffjax.load(folders("large"), prompts=["a cat"])
    picture = np.random.RandomState(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    mask = np.zeros((1, 16, 16, 1), np.float32)
    mask[:, :7] = 1
    known = model.known(picture)
    told = {"prompt": "a cat", "image": picture, "steps": 4, "strength": 0.5, "mask": mask}
    recipe = model.recipe(steps=4, strength=0.5)
    assert len(recipe.grid) == 2
    inputs = model.inputs(jax.random.key(0), np.arange(1), reads=recipe.reads, prompt="a cat", image=picture, mask=mask)
    assert inputs.mask[0, :, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    x = recipe.advance(inputs, recipe.begin(inputs)).x
    np.testing.assert_allclose(x[:, 4:], known[:, 4:], atol=1e-5)
    assert np.abs(x[:, :4] - known[:, :4]).max() > 0.1
    drawn, soft = model.sample(jax.random.key(0), **told), model.sample(jax.random.key(0), **told, feather=3)
    decoded = np.clip(model.decode(x), -1, 1)
    np.testing.assert_allclose(drawn[:, :7], decoded[:, :7], atol=1e-5)
    assert (drawn[:, 7:] == picture[:, 7:]).all() and np.abs(decoded[:, 7:] - picture[:, 7:]).max() > 1e-3
    for row, share in enumerate((1, 1, 0.75, 0.5, 0.25, 0, 0), 5):
        np.testing.assert_allclose(soft[:, row], share * decoded[:, row] + (1 - share) * picture[:, row], atol=1e-5)
    assert (soft[:, 10:] == picture[:, 10:]).all()
    cells = model.sample(jax.random.key(0), **told | {"mask": inputs.mask})
    assert (cells[:, 8:] == picture[:, 8:]).all()
    latent = model.sample(jax.random.key(0), **told | {"image": known, "mask": inputs.mask})
    np.testing.assert_allclose(latent, decoded, atol=1e-5)
    with pytest.raises(UserError, match="mask has 8 x 16 pixels"):
        model.sample(jax.random.key(0), **told | {"mask": mask[:, :8]})
    with pytest.raises(UserError, match="'a dog' was not among the prompts"):
        model.sample(jax.random.key(0), prompt="a dog")


def test_texts_as_published(folders):
    text, bare = diffjax.load(folders("large")).text, diffjax.load(folders("no_t5")).text
    cond = text(["a cat"])
    assert cond["context"].shape == (1, 77 + 256, 32) and cond["pooled"].shape == (1, 20)
    assert (cond["context"][:, :77, 24:] == 0).all() and np.abs(cond["context"][:, 77:]).min() > 0
    assert (bare(["a cat"])["context"][:, 77:] == 0).all()
    assert bare.replace(tokens=9)(["a cat"])["context"].shape == (1, 77 + 9, 32)
    with pytest.warns(UserWarning, match="where 77 are read: the end of the text is cut off, 'it cat'"):
        text(["cat " * 75 + "it cat"])


def ours(folder, guidance=4.5):
    told = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "init": latents(), "size": (16, 24)}
    drawn = diffjax.load(folder).sample(jax.random.key(0), num=2, steps=6, sampler="euler", guidance=guidance, **told)
    return (np.asarray(drawn) + 1) / 2


def outputs(name):
    """The pictures of diffusers, by the name of a stored reference."""
    with tempfile.TemporaryDirectory() as folder:
        return {"images": published(sd3_folder.write(Path(folder), *CASES[name.removeprefix("sd3_")]))}


def test_draws_what_diffusers_drew(folders):
    theirs = reference.stored("sd3_medium")["images"]
    assert np.abs(ours(folders("medium")) - theirs).max() <= 1e-4 and theirs.std() > 0.05


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_draws_what_diffusers_draws(folders, name):
    theirs = published(folders(name))
    assert np.abs(ours(folders(name)) - theirs).max() <= 1e-4 and theirs.std() > 0.05


@pytest.mark.reference
def test_reads_shards_and_variants_as_diffusers_writes_them(folders, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    StableDiffusion3Pipeline.from_pretrained(folders("large")).save_pretrained(
        tmp_path, max_shard_size="8KB", variant="fp16"
    )
    assert len(list((tmp_path / "transformer").glob("*.fp16-*-of-*.safetensors"))) > 2
    ours, theirs = diffjax.load(folders("large")), diffjax.load(tmp_path)
    pick = lambda model: (model.denoiser.params, model.decode.params, model.text(["a cat, it is"]))
    assert jax.tree.all(jax.tree.map(np.array_equal, pick(ours), pick(theirs)))


@pytest.mark.reference
def test_skips_layers_as_diffusers_does(folders):
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_scale": 2.5, "skip_layer_guidance_stop": 0.5}
    theirs = published(folders("medium"), **more)
    skipped = ours(folders("medium"), sd3.SkipLayers(guidance=4.5, layers=(1,), stop=0.5))
    assert np.abs(skipped - theirs).max() <= 1e-4 < np.abs(ours(folders("medium")) - theirs).max()


def test_skipped_layers_must_be_there(folders, tmp_path, capsys):
    command = [
        "sample",
        "--model",
        str(folders("medium")),
        "--prompt",
        "a",
        "--skip-layers",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 2 and "layers 7, 8, 9, which this network has not" in capsys.readouterr().err


def test_fewer_bits_and_split_weights(folders, tmp_path):
    model = diffjax.load(folders("large"), quantize="int4", shard="tensor")
    kernel = model.denoiser.params["blocks_0"]["ff"]["net_0_proj"]["kernel"]
    assert isinstance(kernel, Quantized) and kernel.values.sharding.shard_shape(kernel.values.shape) == (2, 8, 8)
    wide = model.text.t5.params["blocks"]["ff"]["wi_0"]["kernel"]
    assert isinstance(wide, Quantized) and len(wide.values.devices()) == 1
    for untouched in (model.text.clips, model.decode.params):
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(untouched))
    told = [
        "--prompt",
        PROMPTS[0],
        "--size",
        "16",
        "--steps",
        "1",
        "--num",
        "1",
        "--quantize",
        "int4",
        "--shard",
        "tensor",
    ]
    assert cli.main(["sample", "--model", str(folders("large")), *told, "--out", str(tmp_path)]) == 0
    assert job.read_manifest(tmp_path / "manifest.json")["recipe"]["quantize"] == "int4"


def test_other_models_are_not_quantised(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is no Stable Diffusion 3"):
        diffjax.load(tmp_path, quantize="int8")


def test_a_variant_of_one_component_is_read_and_remembered_apart(folders, tmp_path):
    shutil.copytree(folders("large"), tmp_path / "model")
    part = tmp_path / "model" / "text_encoder"
    rounded = {
        key: (tensor / 2).astype(np.float16) for key, tensor in safetensors.read(part / "model.safetensors").items()
    }
    safetensors.write(part / "model.fp16.safetensors", rounded)
    states = lambda **how: np.asarray(
        diffjax.load(tmp_path / "model", prompts=["a cat"], **how).text(["a cat"])["context"]
    )
    with pytest.warns(UserWarning, match="model.safetensors is read, not model.fp16.safetensors"):
        plain = states()
    assert np.array_equal(plain, states(variant="model.safetensors")) and not np.array_equal(
        plain, states(variant="fp16")
    )
