"""Training on from a published model, at toy size: it learns, keeps what is frozen, and its results can be used."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import reference
import sd3_folder
import toys
from PIL import Image
from test_step import distance

import diffjax
from diffjax import config, convert, plan, weights
from diffjax.data import dataset
from diffjax.data.dataset import default_config
from diffjax.data.pipeline import batches
from diffjax.nets import lora
from diffjax.parallel import devices, hosts
from diffjax.train import latents, ready
from diffjax.train.checkpoint import load_run
from diffjax.train.finetune import FineTuning
from diffjax.train.loop import train
from diffjax.utils.errors import UserError
from diffjax.weights import lora as lora_file

DATA_MESH = devices.data_mesh
ADAMW = functools.partial(optax.adamw, eps=1e-3)
"""Its epsilon is large, since the sign of a gradient that is zero but for rounding is anybody's."""
FILE = Path(__file__).parents[2] / "experiments" / "sd35_finetune.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny published model, and four captioned pictures."""
    folder = tmp_path_factory.mktemp("finetune")
    sd3_folder.write(folder / "model", t5=False)
    module = sd3_folder.TRANSFORMERS["large"].clone(num_layers=2)
    form = weights._format_of(module)
    weights.save(
        folder / "model" / "transformer", module, reference.params(form, module, reference.checkpoint(form, module))
    )
    (folder / "pictures").mkdir()
    for i, colour in enumerate(("red", "blue", "white", "black")):
        Image.new("RGB", (16, 16), colour).save(folder / "pictures" / f"{colour}.png")
        (folder / "pictures" / f"{colour}.txt").write_text(f"a cat {i}")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    toys.train_on_one(monkeypatch)


def experiment(place, kind):
    settings = config.load(f"{FILE}:{kind}")
    settings.model = str(place / "model")
    for data in (settings.data, settings.prior.data):
        data.path, data.size = str(place / "pictures"), 16
    settings.dtype, settings.remat, settings.log.tensorboard = "float32", False, False
    settings.optimizer.update(learning_rate=0.02, schedule={"name": "cosine", "warmup": 5, "final": 0.1})
    settings.train.update(steps=60, batch=8, log_every=60, save_every=30, preview_every=0)
    return settings


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_adapters_are_trained_beside_a_frozen_model(place, tmp_path):
    settings = experiment(place, "lora")
    settings.lora.targets, settings.train.log_every = "/attn/|proj_out", 10
    train(settings, tmp_path / "run")
    logged = losses(tmp_path / "run")
    assert logged[-1] < 0.7 * logged[0], logged
    model = diffjax.load(tmp_path / "run", prompts=["a cat 0"])
    before = diffjax.load(place / "model", prompts=[]).denoiser.params
    kernel = model.denoiser.params["blocks_0"]["attn"]["to_q"]["kernel"]
    assert isinstance(kernel, lora.LowRank) and np.abs(kernel.adapter.b).max() > 0
    np.testing.assert_array_equal(kernel.kernel, before["blocks_0"]["attn"]["to_q"]["kernel"])
    convert.convert_model(str(tmp_path / "run"), tmp_path / "out")
    again = diffjax.load(place / "model", prompts=[], lora=tmp_path / "out" / lora_file.FILE)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.denoiser.params, model.denoiser.params))
    with pytest.raises(
        UserError, match="`diffjax convert .*run OUT` it, and give .* adapters with the published model"
    ):
        diffjax.load(tmp_path / "run", lora=tmp_path / "out")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_and_its_config_are_planned(place, kind, tmp_path):
    settings = experiment(place, kind)
    found = dataset.load(settings.data)
    run = FineTuning.begin(settings, tmp_path, found)
    training, drawing = plan.config(settings, plan.Asked())
    (part,) = training.parts
    state, batch = part.held, part.given[0]
    first = jax.eval_shape(lambda: run.first_state(run.base.denoiser.params, jax.random.key(0)))
    assert jax.tree.map(shape_of, state) == jax.tree.map(shape_of, first)
    real = next(run.batches((0, 1)))
    assert {name: real[name].shape for name in run.reads} == {name: leaf.shape for name, leaf in batch.items()}
    assert plan.estimate(part).cost.flops > 0 and drawing.parts[-1].given[0].shape[1:3] == (8, 8)


def shape_of(leaf):
    return leaf.shape, leaf.dtype


def test_previews_take_the_frozen_parameters_of_the_device(place, tmp_path, monkeypatch):
    settings, seen = experiment(place, "lora"), []
    settings.train.update(steps=2, preview_every=1)

    def preview(self, params):
        kernel = self.model(params).denoiser.params["blocks_0"]["attn"]["to_q"]["kernel"].kernel
        seen.append(isinstance(kernel, jax.Array) and not kernel.is_deleted())
        raise UserError("nothing is drawn")

    monkeypatch.setattr(FineTuning, "preview", preview)
    train(settings, tmp_path / "run")
    assert seen == [True, True]
    training, _ = plan.of_run(str(tmp_path / "run"), plan.Asked())
    assert training.parts[0].name == "training"


def test_what_is_read_is_encoded_beforehand_in_parts(place, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path))
    settings = experiment(place, "lora")
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "meet", lambda: None)
        patch.setattr(hosts, "first", lambda function: function())
        patch.setattr(hosts, "count", lambda: 2)
        for process in range(2):
            patch.setattr(hosts, "index", lambda process=process: process)
            found = ready.make_ready(settings)
            assert len([*tmp_path.glob("latents/*/*.npy")]) == 2 * (process + 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.np*")}
    FineTuning.begin(settings, tmp_path / "run", found)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.np*")} == before and len(before) > 4


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What one device trains, of each kind, once."""

    @functools.cache
    def run(kind):
        workdir = tmp_path_factory.mktemp(kind) / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optax, "adamw", ADAMW)
            train(short(place, kind), workdir)
        return workdir

    return run


def short(place, kind, **changes):
    settings = experiment(place, kind)
    settings.optimizer.update(learning_rate=0.002, clip=0.5)
    settings.train.update(steps=3, log_every=1, save_every=2, **changes)
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("mode, replicas", [("data", 1), ("fsdp", 1), ("fsdp", 2), ("tensor", 1), ("both", 1)])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_eight_devices_train_what_one_does(place, alone, kind, mode, replicas, tmp_path, monkeypatch):
    """Adapters beside a base that is split too, and the whole model; a run goes on with the state split otherwise, part
    of it in the memory of the host.
    """
    with monkeypatch.context() as patch:
        patch.setattr(devices, "data_mesh", DATA_MESH)
        patch.setattr(optax, "adamw", ADAMW)
        split = short(place, kind, shard=mode, replicas=replicas)
        split.train.steps = 2
        train(split, tmp_path / "run")
        split.train.update(steps=3, shard="fsdp" if mode == "tensor" else "tensor", replicas=1, offload=True)
        train(split, tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone(kind)), rtol=1e-6)
    for ema in (True, False):
        ours, one = (load_run(workdir, ema=ema).params for workdir in (tmp_path / "run", alone(kind)))
        assert distance(ours, one) < 1e-6


@pytest.mark.slow
def test_all_of_a_model_is_trained(place, tmp_path):
    settings = experiment(place, "full")
    settings.train.update(steps=4, save_every=2)
    settings.prior.weight = 1.0
    train(settings, tmp_path / "run")
    convert.convert_model(str(tmp_path / "run"), tmp_path / "out")
    _, params = weights.load(tmp_path / "out" / "transformer")
    trained = diffjax.load(tmp_path / "run", prompts=[]).denoiser.params
    assert jax.tree.all(jax.tree.map(np.array_equal, params, trained))
    before = diffjax.load(place / "model", prompts=[]).denoiser.params
    assert np.abs(params["proj_out"]["kernel"] - before["proj_out"]["kernel"]).max() > 0


def test_half_of_a_batch_is_of_the_class(tmp_path):
    def rows(first):
        read = latents.Latents(tuple(paths[first : first + 3]), (("a",),) * 3)
        return batches(read, default_config(), 2, 0, lambda texts: {"context": np.zeros((len(texts), 1))}, (0, 1), {})

    paths = [tmp_path / f"{i}.npy" for i in range(6)]
    for i, path in enumerate(paths):
        np.save(path, np.full((1, 1, 1), i, np.float32))
    both = latents.Paired(rows(0), rows(3), 0.25)
    first, state, second = next(both), both.get_state(), next(both)
    assert (first["image"].ravel() < 3).tolist() == [True, True, False, False]
    assert first["weight"].tolist() == [2, 2, 0.5, 0.5]
    both.set_state(state)
    assert all(np.array_equal(second[name], again) for name, again in next(both).items())
    both.close()


def test_what_cannot_be_precomputed_is_said(place, tmp_path):
    settings = experiment(place, "lora")
    settings.data.flip = True
    with pytest.raises(UserError, match="set data.flip=False"):
        train(settings, tmp_path / "run")


def test_grey_pictures_are_encoded_in_three_channels(place, tmp_path):
    Image.new("L", (16, 16), 77).save(tmp_path / "a.png")
    grey = diffjax.data.load({"name": "captioned_folder", "path": str(tmp_path), "size": 16})
    Image.new("RGB", (16, 16), (77, 77, 77)).save(tmp_path / "a.png")
    coloured = diffjax.data.load({"name": "captioned_folder", "path": str(tmp_path), "size": 16})
    base = diffjax.load(place / "model")
    assert (grey.channels, coloured.channels) == (1, 3)
    found = [latents.encode(base, data).paths[0].name for data in (grey, coloured)]
    assert found[0] == found[1]
