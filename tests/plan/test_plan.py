"""Costs said before a job runs: against hand counts, compiled programs and what the job is given."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffjax import cli, config, data, plan
from diffjax.nets import Cost
from diffjax.nets.unet import UNet
from diffjax.plan import rates
from diffjax.train.experiment import Experiment
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import hub, published
from diffjax.weights.scheduler import Scheduler, write_scheduler
from diffjax.weights.unet2d import FORMAT

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SPEED = rates.Rates(products16=4.0, products32=2.0, convolutions=1.0, bandwidth=8.0, launch=0.5)
ASKED = plan.Asked()


@pytest.fixture
def folder(tmp_path):
    module = UNet(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    files.write_json(tmp_path / "unet" / "config.json", FORMAT.config(module))
    write_scheduler(tmp_path, Scheduler())
    return tmp_path


@pytest.fixture
def calibrated(monkeypatch):
    """A calibration that takes no time; how often it was asked for."""
    asked = []
    monkeypatch.setattr(rates, "calibrate", lambda: asked.append(1) or SPEED)
    return asked


def test_time_is_the_sum_of_its_parts():
    assert SPEED.seconds(Cost(products16=8, products32=8, convolutions=8, traffic=8, launches=8)) == 2 + 4 + 8 + 1 + 4


def test_figures_of_a_product():
    x = jax.ShapeDtypeStruct((4, 10), jnp.float32)
    held = {"w": jax.ShapeDtypeStruct((10, 7), jnp.bfloat16)}
    found = plan.estimate(plan.Part("net", lambda held, x: x @ held["w"].astype(jnp.float32), held, (x,), 70, 3))
    assert (found.parameters, found.held, found.calls) == (70, 140, 3)
    assert found.cost.products32 == 2 * 4 * 10 * 7 and found.cost.launches == 1
    assert found.temporary == 4 * 7 * 4 + 10 * 7 * 4, "a product reads from memory, so what is cast is written"


def test_live_bytes_counts_what_is_alive_at_once():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    of = lambda function: plan.live_bytes(jax.make_jaxpr(function)(x).jaxpr)
    ordered = lambda x: jnp.sum(jax.lax.sort(jnp.tile(x, 8)))
    assert 8 * 4000 <= of(lambda x: ordered(x) + ordered(x + 1)) <= 2 * 8 * 4000
    assert of(lambda x: jnp.sum(jnp.tile(x, 8))) == 4, "what is summed is never written"
    square, weights = jnp.ones((1000, 1000)), 4 * 1000**2
    twice = lambda x: (x @ square * 2, jnp.sin(x @ square))
    assert of(twice) == 2 * 4000, "what several operations read value by value is computed again"
    layer = lambda x, w: (jnp.tanh(x @ w), x)
    stack = jnp.ones((3, 1000, 1000))
    loop = lambda unroll: of(lambda x: jax.lax.scan(layer, x, stack, unroll=unroll)[1].sum())
    assert loop(3) < loop(1) < 4 * weights, "an unrolled loop is no loop: what it stacks need not be written"
    layers = lambda unroll: of(lambda x: jax.grad(lambda x: jax.lax.scan(layer, x, stack, unroll=unroll)[0].sum())(x))
    assert layers(3) <= layers(1)


def test_live_bytes_are_those_of_a_platform():
    """A branch that no program of the platform has needs nothing; a GPU copies a layer's weights out of the stack."""
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    large, small = lambda x: jax.lax.sort(jnp.tile(x, 8))[:1000], lambda x: jax.lax.sort(x)
    of = lambda function, platform: plan.live_bytes(jax.make_jaxpr(function)(x).jaxpr, platform)
    chosen = lambda x: jax.lax.platform_dependent(x, tpu=small, default=large)
    assert of(chosen, "tpu") == of(small, "cuda") < of(large, "cuda") == of(chosen, "cuda")
    loop = lambda x: jax.lax.scan(lambda x, w: (w @ x, None), x, jnp.ones((9, 1000, 1000)))[0]
    assert of(loop, "cuda") - of(loop, "tpu") == 4 * 1000**2


def test_compiled_memory_of_what_replaces_what_was_held():
    held, x = jax.ShapeDtypeStruct((1000,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    part = lambda replaces: plan.Part("step", lambda held, x: held * x, held, (x,), 1000, 1, replaces)
    assert plan.compiled_bytes(part(False)) >= 4000
    assert plan.compiled_bytes(part(True)) < 1000


def test_estimated_memory_is_near_the_compiled_one(folder):
    part = plan.published(folder, ASKED, "toy").parts[0]
    assert (
        0.3 < plan.live_bytes(jax.make_jaxpr(part.call)(part.held, *part.given).jaxpr) / plan.compiled_bytes(part) < 3
    )


PARAMETERS = {
    "ddpm_256": {"network": 113_673_219},
    "ddpm_cifar10_32": {"network": 35_746_307},
    "sd35_large": {"transformer": 8_146_280_768, "text_encoder_3": 4_762_310_656, "vae": 83_819_683},
    "sd35_medium": {"transformer": 2_469_663_936},
}


@pytest.mark.parametrize("name", published.FOLDERS)
def test_packaged_models_need_no_network(name, monkeypatch):
    monkeypatch.setattr(hub, "fetch", None)
    expected = PARAMETERS.get(published.FOLDERS[name])
    if expected is None:
        with pytest.raises(UserError, match="draws nothing by itself"):
            plan.model(name, ASKED)
        return
    (job,) = plan.model(name, ASKED)
    found = {part.name: part.parameters for part in job.parts}
    assert found | expected == found
    assert (
        job.steps
        == {"google": 1000, "stabilityai": 4 if "turbo" in name else 50 if "medium" in name else 40}[name.split("/")[0]]
    )


def test_a_published_model(folder):
    (job,) = plan.model(str(folder), plan.Asked(steps=50, num=9, batch=4, sampler="heun"))
    (part,) = job.parts
    assert part.calls == 50 * 2 * 3
    assert part.given[0].shape == (4, 16, 16, 3)
    once = plan.estimate(plan.published(folder, plan.Asked(batch=1), "toy").parts[0])
    assert plan.estimate(part).cost.flops == pytest.approx(4 * once.cost.flops, rel=0.01)
    larger = plan.estimate(plan.published(folder, plan.Asked(batch=1, size=32), "toy").parts[0])
    assert larger.cost.convolutions == pytest.approx(4 * once.cost.convolutions, rel=0.01)
    half = plan.estimate(plan.published(folder, plan.Asked(batch=1, dtype="bfloat16"), "toy").parts[0])
    assert 2 * half.held == once.held


def test_what_a_picture_is_asked_to_be_is_counted(folder):
    figures = lambda **asked: plan.estimate(plan.published(folder, plan.Asked(batch=1, **asked), "toy").parts[0])
    square, wide = figures(size=32), figures(size=(16, 64))
    assert wide.cost.convolutions == pytest.approx(square.cost.convolutions, rel=0.01)
    (job,) = plan.model(str(folder), plan.Asked(size=(16, 64), grid="karras", eta=0.5, sampler="ddim"))
    assert "64 x 16 pixels" in job.title
    for asked, said in (
        ({"grid": "kerras"}, "did you mean karras"),
        ({"sampler": "unipc", "eta": 1.0}, "deterministic"),
    ):
        with pytest.raises(UserError, match=said):
            plan.model(str(folder), plan.Asked(**asked))


def test_a_guide_s_interval_is_counted_on_the_grid_that_is_asked_for():
    emoji = config.load(str(EXPERIMENTS / "emoji.py"))
    emoji.sample.guidance = 2.0
    guide = {"name": "cfg", "low": 0.5}
    calls = lambda **asked: plan.experiment(emoji, plan.Asked(steps=8, **asked))[1].parts[1].calls
    assert calls(batch=1, guide=guide, grid="uniform") == 8 * (1 + 4 / 8) / 2
    assert calls(batch=1, guide=guide, grid="logsnr") != calls(batch=1, guide=guide, grid="uniform")
    assert calls(batch=1, grid="fitted") == calls(batch=1) == 8
    with pytest.raises(UserError, match="the times of a fitted grid are not read"):
        calls(guide=guide, grid="fitted")


def test_an_experiment(folder):
    emoji = config.load(str(EXPERIMENTS / "emoji.py"))
    emoji.sample.guidance, emoji.train.batch = 2.0, 512  # a batch beside which the products of Muon are few
    training, drawing = plan.experiment(emoji, plan.Asked(num=20, steps=5))
    text, network = drawing.parts
    assert (text.calls, network.calls) == (1, 15)
    assert len(network.given[0]) == 16 and network.given[-1]["context"].shape[:2] == (16, emoji.text.tokens)
    step, forward = plan.estimate(training.parts[0]), plan.estimate(network)
    assert step.parameters == plan.tree_size((text.held, network.held))
    assert 3 < (step.cost.products16 / 512) / (forward.cost.products16 / 16) < 5
    assert step.held > 4 * 3 * step.parameters
    emoji.sample.guidance = None
    assert len(plan.experiment(emoji, ASKED)[1].parts[1].given[0]) == 8


def test_a_sampling_experiment(folder):
    settings = ConfigDict({"model": str(folder), "num": 3, "steps": 7, "sampler": "ddim"})
    (job,) = plan.config(settings, plan.Asked(steps=2, batch=1))
    assert (job.images, job.steps, job.parts[0].calls) == (3, 2, 6)


def test_the_calibration_is_kept(calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path))
    assert rates.of_device()[1] == rates.of_device("cpu")[1] == SPEED
    assert len(calibrated) == 1
    (kept,) = json.loads((files.home() / "calibration.json").read_text()).values()
    assert rates.Rates(**kept) == SPEED


def test_calibration_measures(monkeypatch):
    for name, value in (("ROUNDS", 1), ("SIDE", 64), ("CONVOLUTIONS", ((8, 16), (4, 32)))):
        monkeypatch.setattr(rates, name, value)
    found = rates.calibrate()
    assert (
        0 < found.launch < 1
        and min(found.products16, found.products32, found.convolutions, found.convolutions16, found.bandwidth) > 1e6
    )


def test_unknown_device():
    with pytest.raises(UserError, match="unknown device h10: did you mean h100"):
        rates.of_device("h10")


def narrow(said):
    """Whether it fits sixty columns, but for a path."""
    return all(len(line) <= 60 or "/" in line for line in said.splitlines())


def test_the_command(folder, calibrated, capsys):
    assert cli.main(["plan", "--model", str(folder), "--num", "2", "--device", "h100"]) == 0
    said = capsys.readouterr().out
    assert "1000 steps: " in said and " on one H100; 20 steps: " in said and "of 60 GB\n(estimated" in said
    assert narrow(said)
    assert cli.main(["plan", "--model", str(folder), "--num", "2", "--compile"]) == 0
    assert "\n(as compiled)" in capsys.readouterr().out
    assert (
        cli.main(["plan", "--config", str(EXPERIMENTS / "emoji.py"), "--config.train.steps=10", "--device", "t4"]) == 0
    )
    said = capsys.readouterr().out
    assert "training emoji: 10 steps of 128 images" in said and "images/s" in said and narrow(said)
    assert cli.main(["plan", "--run", str(folder)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["plan", "--run", str(folder), "--variant", "ema"]) == 2
    assert "--revision and --variant are of --model" in capsys.readouterr().err
    assert cli.main(["plan", "--model", str(folder), "--variant", "fp16"]) == 2
    assert "holds no weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.42, "0.42 s"),
        (38, "38 s"),
        (90, "90 s"),
        (130, "2.2 min"),
        (1860, "31 min"),
        (7560, "2.1 h"),
        (3e5, "3.5 days"),
    ],
)
def test_durations_in_words(seconds, words):
    assert plan.duration(seconds) == words


def test_parameters_are_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))
    folder, caption = tmp_path / "pictures", "a cat\nthe red cat\n"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "cat.png")
    (folder / "cat.txt").write_text(caption)
    emoji = config.load(str(EXPERIMENTS / "emoji.py"))
    emoji.data.update({"name": "captioned_folder", "path": str(folder)})
    (training, drawn) = plan.experiment(emoji, ASKED)
    assert not list(files.home().glob("data/captioned_pictures/pictures-*")), "nothing is prepared"
    run = Experiment.begin(emoji, tmp_path, data.load(emoji.data))
    assert training.parts[0].parameters == plan.tree_size(jax.eval_shape(run.init, jax.random.key(0)))
    assert sum(part.parameters for part in drawn.parts) == training.parts[0].parameters and training.note == ""
    emoji.data.path = str(tmp_path / "not there")
    more = plan.experiment(emoji, ASKED)[0]
    assert more.parts[0].parameters > training.parts[0].parameters and "the captions are not here yet" in plan.table(
        more, plan.Target("h100")
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample.guide.name=abg",), "unknown sample.guide.name abg: did you mean apg"),
        (("sample.guidance=-3",), "guidance is -3.0: give a scale above 1"),
    ],
)
def test_a_guide_that_cannot_be_is_said_before_training(words, said, capsys):
    assert (
        cli.main(
            [
                "plan",
                "--config",
                str(Path(__file__).parents[2] / "experiments" / "emoji.py"),
                *(f"--config.{word}" for word in words),
            ]
        )
        == 2
    )
    assert said in capsys.readouterr().err
