import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import diffjax
import diffjax.data
from diffjax import config as configs, loading
from diffjax.evaluate import metrics, runs
from diffjax.sampling import job
from diffjax.train.checkpoint import Checkpoints, checksum
from diffjax.train.experiment import Experiment
from diffjax.train.state import create
from diffjax.utils import image
from diffjax.utils.errors import UserError

EXPERIMENT = """
import runpy

def get_config():
    config = runpy.run_path({experiment!r})["get_config"]()
    config.data.update(name="captioned_folder", path={pictures!r}, size=8, held_out="")
    config.text.update(tokens=4, width=8, depth=1, heads=2)
    config.dit.update(patch=4, width=16, depth=1, heads=2, hidden=16, rank=2, dtype="float32")
    return config
"""
SAME = "the same"


@pytest.fixture(scope="module")
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    for number, caption in enumerate(["red", "green", "blue", "dark grey", "light grey", SAME, SAME]):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    experiment = str(request.config.rootpath / "experiments" / "emoji.py")
    (folder / "tiny.py").write_text(EXPERIMENT.format(experiment=experiment, pictures=str(folder)))
    return configs.load(str(folder / "tiny.py"))


def save(config, workdir, steps=(3, 5)):
    """A run that was never trained, its parameters drawn by the step."""
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(config.to_json())
    experiment = Experiment.begin(config, workdir, diffjax.data.load(config.data))
    checkpoints = Checkpoints(workdir)
    for step in steps:
        params = experiment.init(jax.random.key(step))
        checkpoints.save(create(params, optax.sgd(0.1), jax.random.key(0)).replace(step=step), "", 1.0)
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    return save(config, tmp_path_factory.mktemp("run"))


def test_a_run_is_loaded_by_its_folder(run, monkeypatch):
    loaded = diffjax.load(run)
    assert (loaded.name, loaded.revision, loaded.shape) == (str(run), "5", (8, 8, 3))
    assert diffjax.load(run, revision="3").revision == "3"
    first, last = (jax.tree.leaves(diffjax.load(run, revision=step)) for step in ("3", "5"))
    assert checksum(first) != checksum(last) == checksum(jax.tree.leaves(loaded))
    images = loaded.sample(jax.random.key(0), num=2, steps=2, prompt=["red", "green blue"])
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


def test_loading_casts_the_network(run):
    half = diffjax.load(run, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.denoiser.params)} == {"bfloat16"}
    full = diffjax.load(run).sample(jax.random.key(0), steps=2, prompt="red")
    assert np.allclose(half.sample(jax.random.key(0), steps=2, prompt="red"), full, atol=0.1)


@pytest.mark.parametrize(("revision", "said"), [("4", "no checkpoint of step 4"), ("main", "give the step")])
def test_a_revision_that_is_not_there_is_said(run, revision, said):
    with pytest.raises(UserError, match=said):
        diffjax.load(run, revision=revision)


def test_what_holds_no_model_is_said(tmp_path, config):
    with pytest.raises(UserError, match="holds no model: give a run's folder"):
        diffjax.load(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        diffjax.load(tmp_path / "missing")
    early = save(config, tmp_path / "early", steps=())
    with pytest.raises(UserError, match="no checkpoint yet"):
        diffjax.load(early)


def test_a_damaged_run_is_said(tmp_path, config):
    run = save(config, tmp_path / "damaged", steps=(1,))
    for path in (run / "checkpoints" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        diffjax.load(run)


def test_a_job_with_a_real_run(run, tmp_path):
    request = job.Request(str(run), prompts=("red", "blue"), num=2, steps=3)
    job.generate(request, tmp_path / "first")
    recipe = json.loads((tmp_path / "first" / "manifest.json").read_text())["recipe"]
    assert (recipe["revision"], recipe["checksum"]) == ("5", checksum(jax.tree.leaves(diffjax.load(run))))
    assert job.replay(tmp_path / "first" / "manifest.json", tmp_path / "second")


def test_a_prompt_longer_than_the_encoder_reads_is_refused(run, tmp_path):
    with pytest.raises(
        UserError,
        match="'red green blue grey red' has 5 tokens of which 4 are read: it loses 'red': say it in fewer words",
    ):
        job.generate(job.Request(str(run), prompts=("red green blue grey red",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_measured(run, capsys):
    result = runs.measure(run, num=4, steps=2)
    assert result == json.loads((run / "evaluation.json").read_text())
    assert (result["step"], result["num"], result["among"]) == (5, 4, 7)
    assert 0 <= result["top1"] <= 1 and len(result["prompts"]) == 4
    assert np.isclose(np.mean([prompt["psnr"] for prompt in result["prompts"]]), result["psnr"])
    said = capsys.readouterr().out
    assert "retrieval top-1 among 7" in said and "training" in said and "held-out" not in said
    assert image.read_png(run / "evaluation.png")[0].ndim == 3
    assert runs.measure(run, num=4, steps=2)["prompts"] == result["prompts"]


def test_held_out_prompts_are_measured_beside_the_training_prompts(config, tmp_path, capsys):
    parted = config.copy_and_resolve_references()
    parted.data.update(split="train[:4]", held_out="train[3:]")
    parted.train.steps = 3
    run = save(parted, tmp_path / "parted", steps=(3,))
    result = runs.measure(run, num=8, steps=2)
    assert result == json.loads((run / "evaluation.json").read_text())
    held_out = result["held_out_prompts"]
    assert (result["among"], held_out["among"]) == (8, 8)
    captions = [said[0] for said in diffjax.data.load(config.data).captions()]
    known = {word for text in captions[:4] for word in text.split()}
    only = lambda texts: [text for text in texts if text != SAME and known & {*text.split()}]
    assert [row["prompt"] for row in result["prompts"]] == only(captions[:3]), "the fourth is in both"
    assert [row["prompt"] for row in held_out["prompts"]] == only(captions[4:]), "of known words"
    assert f"{len(held_out['prompts'])} held-out prompt" in " ".join(capsys.readouterr().out.split())
    assert image.read_png(run / "held_out.png")[0].ndim == 3


def test_prompts_are_drawn_by_the_seed_from_those_that_can_be_read(run, config):
    data, model = diffjax.data.load(config.data), diffjax.load(run)
    captions = ["zebra", "red", "", "blue", "green zebra"]
    assert runs.chosen_prompts(model, data, captions, 64, 0) == {1: "red", 3: "blue", 4: "green zebra"}
    few = [runs.chosen_prompts(model, data, captions, 2, seed) for seed in range(8)]
    assert all(len(chosen) == 2 for chosen in few) and len(set(map(tuple, few))) > 1
    with pytest.raises(UserError, match="nothing can be compared"):
        runs.chosen_prompts(model, data, ["zebra"], 64, 0)


def test_every_brace_of_a_template_is_the_caption(run, config):
    twice = config.data.copy_and_resolve_references()
    twice.templates = ("{} beside {}", "{0} {x}")
    data = dataclasses.replace(diffjax.data.load(config.data), config=twice)
    assert runs.chosen_prompts(diffjax.load(run), data, ["", "red"], 64, 0) == {1: "red beside red"}


def test_a_run_is_measured_as_its_config_draws(run):
    sampling = runs.measure(run, num=2)["sampling"]
    assert sampling == {"sampler": "dpmpp_2m", "grid": "uniform", "guidance": 1.0, "steps": 8, "seed": 0}
    assert runs.measure(run, num=2, steps=3, grid="logsnr")["sampling"] == sampling | {"steps": 3, "grid": "logsnr"}


def test_perfect_pictures_and_the_floors(config):
    data = diffjax.data.load(config.data)
    chosen = [0, 2, 3]
    every = data.examples(range(7))["image"]
    found = metrics.retrieval(every[chosen], data.examples(chosen), [data])
    assert found["top1"] == 1.0 and np.isinf(found["psnr"]) and "class" not in found
    mean = every.mean(axis=0)
    floors = [10 * np.log10(255**2 / np.mean((every[i] - mean) ** 2)) for i in chosen]
    assert np.isclose(found["floors"]["mean_picture_psnr"], np.mean(floors))
    apart = np.mean((every[chosen].astype(float)[:, None] - every) ** 2, axis=(2, 3, 4))
    nearest = [10 * np.log10(255**2 / np.min(row[row > 0])) for row in apart]
    assert np.isclose(found["floors"]["nearest_other_psnr"], np.median(nearest))


def test_pictures_of_other_prompts_are_not_retrieved(config):
    data = diffjax.data.load(config.data)
    every = data.examples(range(7))["image"]
    found = metrics.retrieval(every[[1, 0, 2]], data.examples([0, 1, 2]), [data])
    assert np.isclose(found["top1"], 1 / 3)


class Classed:
    """Pictures of one pixel with classes."""

    num_classes = 2

    def __init__(self, grey, label):
        self.image, self.label = np.array(grey, np.uint8).reshape(-1, 1, 1, 1), np.array(label)

    def __len__(self):
        return len(self.label)

    def examples(self, chosen):
        return {"image": self.image[list(chosen)], "label": self.label[list(chosen)]}


def test_the_class_of_the_nearest_picture_is_compared_among_all_splits(monkeypatch):
    monkeypatch.setattr(metrics, "AT_ONCE", 2)
    train, held_out = Classed([10, 60, 90], [0, 1, 0]), Classed([100, 150], [0, 1])
    drawn = np.array([92, 150, 100], np.uint8).reshape(-1, 1, 1, 1)  # own 100, 150, 150; nearest 90, 150, 100
    found = metrics.retrieval(drawn, held_out.examples([0, 1, 1]), [train, held_out])
    assert (found["among"], found["top1"], found["class"]) == (5, 1 / 3, 2 / 3)


def test_only_text_is_measured(config, tmp_path):
    plain = config.copy_and_resolve_references()
    plain.text = None
    with pytest.raises(UserError, match="without text"):
        runs.measure(save(plain, tmp_path / "plain", steps=(1,)), num=1)


def test_a_run_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError):
        runs.measure(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--num is 0"):
        runs.measure(tmp_path, num=0)


def test_distances_are_exact():
    a, b = (np.random.default_rng(i).integers(0, 256, (3, 50)).astype(float) for i in (0, 1))
    exact = [[int(sum((int(x) - int(y)) ** 2 for x, y in zip(u, v))) for v in b] for u in a]
    assert (metrics.squared_distances(a, b) == exact).all()
    assert loading.load is diffjax.load
