import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import build, cli, config
from diffjax.parallel import devices
from diffjax.train import facts, record
from diffjax.train.experiment import Experiment
from diffjax.train.parallel import by_jit, by_pmap
from diffjax.train.state import create
from diffjax.train.step import make_step
from diffjax.utils.errors import UserError

FILES = sorted(Path(__file__).parents[1].glob("experiments/*.py"))
SMALL = {
    "dit": dict(width=16, depth=1, heads=2, hidden=16, rank=2),
    "unet": dict(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ),
}  # fmt: skip


@dataclasses.dataclass
class Data:
    """What an experiment is told of its data."""

    size: int
    num_classes: int
    name: str = "data"
    channels: int = 3

    @property
    def class_names(self):
        return tuple(f"class {i}" for i in range(self.num_classes))

    @property
    def config(self):
        return config.ConfigDict({"templates": ("{}",)})

    def __len__(self):
        return 2

    def captions(self):
        return [("red heart", "love"), ("pizza",)]

    def images(self, indices):
        return np.zeros((len(indices), self.size, self.size, self.channels), np.uint8)

    def examples(self, indices):
        return {"image": self.images(indices), "captions": self.captions(), "label": np.zeros(len(indices), np.int32)}


def ways(file):
    """The experiment with each of the networks that it has a table for."""
    settings = config.load(str(file))
    return [(file.stem, name) for name in build.NETWORKS if name in settings] if "network" in settings else []


def experiment(name, network, small=False):
    settings = config.load(str(next(file for file in FILES if file.stem == name)))
    settings.network = network
    if small:
        settings[network].update(SMALL[network])
        settings.data.size = 16
        if settings.text:
            settings.text.update(width=16, heads=2, hidden=16)
    return settings


def begun(settings, workdir):
    return Experiment.begin(settings, workdir, Data(settings.data.size, settings.classes))


def batch(found, size):
    rows = {"image": np.zeros((size, *found.shape), np.uint8)}
    if found.text:
        rows |= found.tokenize(["a red heart"] * size)
    if found.classes:
        rows["label"] = np.arange(size, dtype=np.int32) % len(found.classes)
    return rows


CASES = [case for file in FILES for case in ways(file)]
STEPPED = [
    case if case in (("emoji", "dit"), ("cifar10", "unet")) else pytest.param(*case, marks=pytest.mark.slow)
    for case in CASES
]


@pytest.mark.parametrize("name, network", STEPPED)
def test_an_experiment_has_the_size_it_says(name, network, tmp_path):
    settings = experiment(name, network)
    found = begun(settings, tmp_path)
    state = jax.eval_shape(lambda: create(found.init(jax.random.key(0)), found.optimizer, jax.random.key(1)))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    low, high = {"emoji": (6e6, 1.2e7), "emoji64": (4e7, 8e7), "cifar10": (2e7, 4.5e7), "ddpm_train": (3.5e7, 3.6e7)}[
        name
    ]
    assert low < parameters < high
    after, metrics = jax.eval_shape(found.step(), state, batch(found, settings.train.batch))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name, network", STEPPED)
def test_an_experiment_takes_a_step_and_draws(name, network, tmp_path):
    settings = experiment(name, network, small=True)
    settings.sample.update(steps=2, num=2, prompts=settings.sample.prompts[:2])
    found = begun(settings, tmp_path)
    state = jax.jit(lambda: create(found.init(jax.random.key(0)), found.optimizer, jax.random.key(1)))()
    after, metrics = jax.jit(make_step(found.objective(), found.optimizer))(state, batch(found, 4))
    assert metrics["finite"] and metrics["grad_norm"] > 0
    assert any(jax.tree.leaves(jax.tree.map(lambda old, new: bool(jnp.any(old != new)), state.params, after.params)))
    images = found.preview(after.ema).images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()


def trained_on(way, number, workdir):
    """The parameters and the losses of a few steps of the small emoji experiment in float32."""
    settings = experiment("emoji", "dit", small=True)
    settings.dit.update(dtype="float32", depth=2)
    settings.optimizer.dtype = "float32"
    found = begun(settings, workdir)
    parallel = way(make_step(found.objective(), found.optimizer), devices.data_mesh(jax.devices()[:number]))
    new = lambda: create(found.init(jax.random.key(0)), found.optimizer, jax.random.key(1))
    state = parallel.place(jax.jit(new)())
    losses = []
    for seed in range(4):
        images = np.random.default_rng(seed).integers(0, 256, (16, *found.shape), dtype=np.uint8)
        state, metrics = parallel.step(state, parallel.feed(batch(found, 16) | {"image": images}))
        losses.append(float(metrics["loss"]))
    return jax.device_get(parallel.gather(state).params), losses


@pytest.mark.slow
def test_one_device_and_eight_train_alike(tmp_path):
    params, losses = trained_on(by_jit, 1, tmp_path)
    for way in (by_jit, by_pmap):
        others, again = trained_on(way, 8, tmp_path)
        difference = optax.tree.norm(jax.tree.map(np.subtract, others, params)) / optax.tree.norm(params)
        assert difference < 1e-6
        np.testing.assert_allclose(again, losses, rtol=1e-6)


def test_previews_leave_out_what_no_caption_says(tmp_path):
    settings = experiment("emoji", "dit", small=True)
    settings.sample.prompts = ("zebra", "a pizza")
    with pytest.warns(UserWarning, match="no caption has a word of 'zebra' in sample.prompts: previews go without"):
        found = begun(settings, tmp_path)
    assert found.prompts() == ["a pizza"]
    settings.sample.prompts = ("zebra",)
    assert found.prompts() == ["red heart", "pizza"]


def test_words_of_a_run_are_listed(tmp_path, capsys):
    settings = experiment("emoji", "dit", small=True)
    settings.sample.prompts = ("pizza",)
    with record.claim(tmp_path / "run", settings):
        begun(settings, tmp_path / "run")
    assert cli.main(["words", "--run", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "      1  heart", "      1  love", "      1  pizza", "      1  red", "4 words of 3 captions"
    ]  # fmt: skip
    with record.claim(tmp_path / "classes", classes := experiment("cifar10", "unet", small=True)):
        begun(classes, tmp_path / "classes")
    assert cli.main(["words", "--run", str(tmp_path / "classes")]) == 2
    assert "learned no words from captions: it reads classes: class 0, class 1" in capsys.readouterr().err


def test_words_of_templates_are_known():
    words = facts.learn_tokenizer(experiment("emoji", "dit"), Data(16, 0).captions(), ("{}", "an icon of {}")).words
    assert (words.counts["icon"], words.counts["pizza"]) == (3, 2) and words.read(
        "icon of a pizza"
    ).text == "an icon of pizza"


@pytest.mark.parametrize(
    ("name", "size"),
    [("emoji", 20), ("cifar10", 27), ("ddpm_train", 20), ("minimagen/base64", 20), ("minimagen/emoji_super128", 66)],
)
def test_a_size_that_the_network_cannot_cut_is_refused_before_training(name, size):
    settings = config.load(str(Path(__file__).parents[1] / "experiments" / f"{name}.py"))
    settings.text, settings.data.size = None, size
    if settings.get("low_res"):
        settings.low_res.size = 33
    with pytest.raises(
        UserError, match=rf"data.size={size}: this {settings.network} reads multiples of \d+ pixels; change data.size"
    ):
        Experiment.before_data(settings)
