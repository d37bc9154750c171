"""The closed form as a model: prompts as weights of training pictures, drawing, where pixels are from, and the job."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax import cli
from diffjax.models import closed_form
from diffjax.parallel import devices
from diffjax.sampling import job
from diffjax.sampling.folder import read_manifest
from diffjax.text.reading import Reworded
from diffjax.utils import image
from diffjax.utils.errors import UserError

SIZE = 12
CAPTIONS = ("frog", "red heart", "blue heart", "cat face", "salt and pepper", "rocket")
EXPERIMENT = """
from ml_collections import ConfigDict

def get_config():
    data = {{"name": "captioned_folder", "path": {path!r}, "size": {size}}}
    return ConfigDict({{"model": "closed_form", "closed_form": {{"data": data, "mixing": 0.5}}, "num": 2, "steps": 4}})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def experiment(folder):
    file = folder.parent / "closed.py"
    file.write_text(EXPERIMENT.format(path=str(folder), size=SIZE))
    return file


@pytest.fixture(scope="module")
def model(experiment):
    return diffjax.load(experiment)


def table(folder, **fields):
    return {"data": {"name": "captioned_folder", "path": str(folder), "size": SIZE}, **fields}


def weights(model, prompt):
    """The weight of each picture by its caption, where it has any."""
    names = [group[0] for group in model.text.captions]
    return {name: weight for name, weight in zip(names, model.text.weights(prompt)) if weight}


@pytest.mark.parametrize("prompt", ["frog + red heart", "frog and red heart", "red heart, frog", "frog & red heart"])
def test_names_share_the_weight(model, prompt):
    assert weights(model, prompt) == {"frog": 0.5, "red heart": 0.5}


def test_what_a_name_matches(model):
    assert weights(model, "heart") == {"red heart": 0.5, "blue heart": 0.5}
    assert weights(model, "rocket + heart") == {"rocket": 0.5, "red heart": 0.25, "blue heart": 0.25}
    assert weights(model, "a Frog!") == {"frog": 1.0}
    assert weights(model, "salt and pepper") == {"salt and pepper": 1.0}
    assert weights(model, "frog rocket") == {"frog": 0.5, "rocket": 0.5}
    assert set(weights(model, "")) == set(CAPTIONS)


def test_unknown_words_are_refused_or_left_out(model):
    with pytest.raises(UserError, match=r'no caption has a word of "rokcet" \(near: rocket\): name what') as said:
        model.sample(jax.random.key(0), prompt="frog + rokcet", steps=2)
    assert "\n" not in str(said.value)
    with pytest.warns(Reworded, match='"shiny frog" is read as "frog": no caption has "shiny"'):
        assert set(model.text(["shiny frog"])) == {"logits", "windows"}


def test_mixing_is_the_size_of_windows(folder):
    sides = closed_form.largest_window(np.array([2.0, 200.0]), 32, 0.5)
    np.testing.assert_allclose(sides, [11.4, 27.0], atol=0.1)
    factors = [closed_form.load(table(folder, mixing=m)).text(["frog + rocket"])["windows"][0] for m in (0.0, 0.5, 1.0)]
    assert factors[0] > 3 * factors[1] > 9 * factors[2]


def test_one_name_is_its_picture_and_two_are_new(model):
    found = model.denoiser.data.planes[0].transpose(2, 1, 3, 0)
    own = [found[[group[0] for group in model.text.captions].index(name)] for name in ("frog", "rocket")]
    alone = model.sample(jax.random.key(0), prompt="frog")
    np.testing.assert_allclose(alone[0], own[0], atol=1e-4)
    mixed = np.asarray(model.sample(jax.random.key(1), prompt="frog + rocket", num=3))
    nearest = np.minimum(*(np.abs(mixed - picture).max(-1) for picture in own))
    assert np.median(nearest) < 0.05
    for name in (0, 1):
        assert np.abs(mixed - own[name]).max((1, 2, 3)).min() > 0.3


def test_guidance(model):
    key, prompt = jax.random.key(0), "frog + rocket"
    plain = model.sample(key, prompt=prompt, num=2)
    for guide in ("cfg", {"name": "apg", "rescale": 0.7}):
        guided = model.sample(key, prompt=prompt, num=2, guidance=4.0, guide=guide)
        assert np.isfinite(guided).all() and np.abs(guided - plain).max() > 0.01
    against = model.sample(key, prompt=prompt, negative_prompt="frog", num=2, guidance=4.0)
    assert np.isfinite(against).all() and np.abs(against - plain).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"machine": "ideal"}, "ideal"),
        ({"machine": "broken"}, "moves"),
        ({"machine": "circular", "windows": "mnist_unet"}, "moves"),
        ({"windows": "covariance", "process": {"name": "cosine"}}, "mixes"),
    ],
)
def test_machines(folder, fields, begins):
    model = closed_form.load(table(folder, **fields))
    drawn = np.asarray(model.sample(jax.random.key(0), prompt="frog + rocket", steps=3))
    assert drawn.shape == (1, SIZE, SIZE, 3) and np.isfinite(drawn).all()
    found = closed_form.sources(model, drawn[0], model.condition(1, "frog + rocket"))
    np.testing.assert_allclose(found.shares.sum(0), 1, atol=1e-4)
    allowed = [i for i, group in enumerate(model.text.captions) if group[0] in ("frog", "rocket")]
    assert found.allowed == 2 and np.delete(found.shares, allowed, axis=0).max() == 0
    if begins == "ideal":
        assert found.bits.max() < 1e-3 and len(found.parts()) == 1


def test_sources_of_a_picture_that_was_glued(model):
    """The left half of one picture beside the right half of another: each half has its source."""
    planes = np.asarray(model.denoiser.data.planes[0]).transpose(2, 1, 3, 0)
    glued = np.concatenate([planes[2, :, : SIZE // 2], planes[5, :, SIZE // 2 :]], axis=1)
    found = closed_form.sources(model, glued, model.condition(1))
    assert (found.own[:, :4] == 2).all() and (found.own[:, -4:] == 5).all()
    assert [i for i, _ in found.parts()[:2]] in ([2, 5], [5, 2])
    assert found.allowed == len(CAPTIONS) and found.bits[:, 0].max() < 0.01
    common = closed_form.Sources(np.full((4, 2, 2), 0.25, np.float32), 4)
    assert (common.own == -1).all() and common.parts() == []
    np.testing.assert_allclose(common.bits, 2, atol=1e-6)
    assert closed_form.mosaic(model, image.to_uint8(glued), found).shape[-1] == 3


def test_the_command_draws_traces_and_replays(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "start", lambda: None)
    command = ["sample", "--config", str(experiment), "--prompt", "frog + rocket", "--seed", "3"]
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 0
    recipe = read_manifest(tmp_path / "a" / "manifest.json")["recipe"]
    assert (recipe["num"], recipe["steps"], recipe["seed"]) == (2, 4, 3)
    assert recipe["closed_form"]["machine"] == "local" and recipe["checksum"] is not None
    drawn = sorted(path.name for path in (tmp_path / "a").glob("0*.png"))
    assert sorted(path.name for path in (tmp_path / "a" / "provenance").iterdir()) == drawn and len(drawn) == 2
    again = ["sample", "--replay", str(tmp_path / "a" / "manifest.json"), "--out", str(tmp_path / "b")]
    assert cli.main(again) == 0
    assert "2 of 2 images: the same, byte for byte" in capsys.readouterr().out
    for overrides, said in [
        (["--prompt", "qqq"], 'no caption has a word of "qqq"'),
        (["--config.closed_form.mixing=2.0"], "mixing is 2.0: it must be a number from 0 to 1"),
        (["--size", "64"], "draws no picture 64 pixels wide"),
        (["--label", "frog"], "was trained without classes: leave the label out"),
    ]:
        assert cli.main([*command[:3], *overrides, "--out", str(tmp_path / "c")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert cli.main(["plan", *command[1:3]]) == 2 and "has no network to plan for" in capsys.readouterr().err
    assert cli.main(["config", *command[1:3]]) == 0 and "the closed form that draws" in capsys.readouterr().out


def test_another_caption_or_picture_is_another_recipe(folder, experiment):
    request = job.configured(cli.parse(["sample", "--config", str(experiment), "--out", "x"]).config)
    model = closed_form.load(request.closed_form)
    recipe = job.recipe_of(request, model)
    planes = model.denoiser.data.planes
    data = dataclasses.replace(model.denoiser.data, planes=planes.at[0, 0, 0, 0, 0].add(0.1))
    other = dataclasses.replace(model, denoiser=dataclasses.replace(model.denoiser, data=data))
    assert job.recipe_of(request, other)["checksum"] != recipe["checksum"]


def test_tables_that_cannot_be(folder):
    for fields, said in [
        ({"machin": "local"}, "did you mean machine"),
        ({"machine": "locale"}, "did you mean local"),
        ({"windows": "mnist"}, "unknown windows mnist"),
        ({"machine": "broken", "windows": "covariance"}, "unknown windows covariance"),
        ({"data": {}}, "closed_form has no data"),
    ]:
        with pytest.raises(UserError, match=said):
            closed_form.load(table(folder) | fields)
