"""Models written for other programs: read again, and by diffusers, they draw the same pictures."""

from pathlib import Path

import jax
import numpy as np
import pytest
import toys
from PIL import Image

import diffjax
from diffjax import cli, config, convert
from diffjax.diffusion import predict, process
from diffjax.diffusion.process import Discrete, discrete
from diffjax.diffusion.refine import Clip, Threshold
from diffjax.train import loop
from diffjax.utils.errors import UserError
from diffjax.weights.scheduler import Scheduler

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "ddpm_train.py"
STEPS = 5


def trained(folder, classes):
    """A run of two steps of the experiment made small, on noise in two folders."""
    draw = np.random.default_rng(0)
    for number in range(8):
        place = folder / "pictures" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
    settings = config.load(str(EXPERIMENT))
    settings.data.update(name="class_folder", path=str(folder / "pictures"), size=16)
    settings.classes = classes
    settings.unet.update(
        block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    settings.optimizer.schedule.warmup = 0
    settings.train.update(steps=2, batch=8, log_every=1, preview_every=0)
    settings.sample.update(steps=2, num=2)
    settings.log.tensorboard = False
    with pytest.MonkeyPatch.context() as patch:
        toys.train_on_one(patch)
        loop.train(settings, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.slow), 2])
def converted(tmp_path_factory, request):
    """The folder of a run, without and with classes, and the one it was converted to."""
    folder = tmp_path_factory.mktemp("ddpm")
    run = trained(folder, request.param)
    assert cli.main(["convert", str(run), str(folder / "out")]) == 0
    return run, folder / "out"


def inputs():
    draw = np.random.RandomState(0)
    return draw.randn(1, 16, 16, 3).astype(np.float32), draw.randn(STEPS, 1, 16, 16, 3).astype(np.float32)


def drawn(folder):
    init, noise = inputs()
    model = diffjax.load(folder)
    assert model.classes in ((), ("class0", "class1")) and (model.has_null or not model.classes)
    told = {"label": 1, "guidance": 1.0} if model.classes else {}
    return np.asarray(model.sample(jax.random.key(0), steps=STEPS, init=init, noise=noise, **told))


def by_diffusers(folder):
    """The same run in their own loop."""
    import diffusers
    import torch

    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler.set_timesteps(STEPS)
    init, noise = (torch.from_numpy(np.moveaxis(x, -1, -3).copy()) for x in inputs())
    x, told = init, {"class_labels": torch.ones(1, dtype=torch.long)} if pipeline.unet.config.num_class_embeds else {}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for i, t in enumerate(pipeline.scheduler.timesteps):
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, i=i, **k: noise[i])
            x = pipeline.scheduler.step(pipeline.unet(x, t, **told).sample, t, x).prev_sample
    return x.permute(0, 2, 3, 1).numpy()


def test_a_run_and_its_conversion_draw_the_same(converted):
    run, out = converted
    assert np.array_equal(drawn(run), drawn(out))
    assert (out / "model_index.json").exists()


@pytest.mark.reference
def test_diffusers_draws_the_same(converted):
    with jax.default_matmul_precision("highest"):
        assert np.abs(drawn(converted[1]) - by_diffusers(converted[1])).max() <= 1e-4


def test_a_conversion_converts_to_itself(converted, tmp_path):
    convert.convert_model(str(converted[1]), tmp_path / "again")
    for file in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (converted[1] / file).read_bytes()


def test_orbax(converted, tmp_path):
    import orbax.checkpoint as ocp

    assert cli.main(["convert", str(converted[0]), str(tmp_path / "out"), "--to", "orbax"]) == 0
    params = diffjax.load(converted[0]).denoiser.params
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore((tmp_path / "out").absolute())["network"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_what_cannot_be_converted(converted, monkeypatch, capsys, tmp_path):
    assert cli.main(["convert", str(converted[0]), str(converted[1])]) == 2
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setattr(convert, "load", lambda name, **_: toys.model())
    assert cli.main(["convert", "toy", str(tmp_path / "out")]) == 2
    assert "--to orbax keeps the parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_published_tables_are_known_by_name(fields):
    of = discrete(Scheduler(**fields).betas())
    found = Scheduler(**convert._table(of))
    assert found == Scheduler(**fields)


def test_another_table_is_written_as_betas():
    of = discrete(np.linspace(0.01, 0.3, 20, dtype=np.float32))
    again = discrete(Scheduler(**convert._table(of)).betas())
    assert np.allclose(again.alpha2, of.alpha2, rtol=1e-6)


def test_the_scheduler_says_what_the_model_does():
    model = toys.model(bound=Clip(2.0), grid="trailing")
    table = Discrete(discrete(process.linear_betas()).alpha2)
    model = model.replace(denoiser=model.denoiser.replace(process=table, prediction=predict.V()))
    said = convert.scheduler(model)
    assert (said.prediction_type, said.clip_sample_range, said.timestep_spacing) == ("v_prediction", 2.0, "trailing")
    model = model.replace(denoiser=model.denoiser.replace(prediction=predict.Velocity()))
    with pytest.raises(UserError, match="predicts eps, v or x0"):
        convert.scheduler(model)
    held = toys.model(bound=Threshold(0.9))
    held = held.replace(denoiser=held.denoiser.replace(process=table))
    assert convert.scheduler(held).thresholding and not convert.scheduler(held).clip_sample
