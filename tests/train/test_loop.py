import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_experiment
from ml_collections import ConfigDict
from PIL import Image

from diffjax import config as configs
from diffjax.text.learned import CaptionTokenizer
from diffjax.train import facts, loop, metrics
from diffjax.train.checkpoint import load_run
from diffjax.train.experiment import Experiment
from diffjax.train.step import Objective
from diffjax.utils.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_devices():
    """Two are as good as eight here, and their programs smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.devices, "data_mesh", functools.partial(loop.devices.data_mesh, jax.devices()[:2]))
        yield


@pytest.fixture(scope="module")
def finished(pictures, few_devices, tmp_path_factory):
    """A run that is not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(pictures, workdir)
    return workdir


def command(pictures, workdir, **changes):
    flags = {"data.path": pictures, **changes}
    toy = toy_experiment.__file__
    return ["--config", toy, "--workdir", str(workdir), *(f"--config.{name}={value}" for name, value in flags.items())]


def train(pictures, workdir, init_from=None, allow_change=False, **changes):
    """Train in this process."""
    _, toy, _, _, *flags = command(pictures, workdir, **changes)
    config = configs.parse(toy, flags)[0]
    if init_from:
        with config.unlocked():
            config.init_from = ConfigDict(init_from)
    loop.train(config, workdir, allow_change)


def digest(workdir):
    """SHA-256 of everything a finished run has learned."""
    run = load_run(workdir, ema=False)
    leaves = jax.tree.leaves((run.params, load_run(workdir).params))
    return run.step, hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run(pictures, tmp_path, capsys):
    train(pictures, tmp_path)
    assert digest(tmp_path)[0] == 8
    assert [row["step"] for row in rows(tmp_path)] == [2, 3, 4, 6, 8]
    assert all((tmp_path / kind / "0000008.png").is_file() for kind in ("samples", "sanity"))
    said = capsys.readouterr().err
    assert (tmp_path / "run.json").is_file() and "compiled in" in said and "step 8: error of x0" in said
    train(pictures, tmp_path)
    assert "is finished: 8 of 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run"])
def test_an_object_store_is_no_workdir(pictures, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{place} is an address, .*: name a folder on a file system, and copy"):
        train(pictures, place)
    assert not list(tmp_path.iterdir())


def one_device():
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(arguments, **named):
    return subprocess.Popen(
        [sys.executable, "-m", "diffjax", "train", *arguments],
        env=one_device(),
        stderr=subprocess.PIPE,
        text=True,
        **named,
    )


def wait_for(path, lines, process):
    """Until the file has so many lines; fails when the process ends first."""
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(pictures, tmp_path):
    arguments = {"train.steps": 20, "train.save_every": 3, "train.log_every": 1}
    whole = start(command(pictures, tmp_path / "whole", **arguments))
    assert whole.wait() == 0, whole.communicate()
    killed = tmp_path / "killed"
    for lines, number in ((2, signal.SIGKILL), (8, signal.SIGINT), (13, signal.SIGKILL)):
        process = start(command(pictures, killed, **arguments), start_new_session=True)
        wait_for(killed / "metrics.jsonl", lines, process)
        os.killpg(process.pid, number)
        _, said = process.communicate()
        if number == signal.SIGINT:
            assert process.returncode == 130 and "Traceback" not in said, said
            assert load_run(killed).step == rows(killed)[-1]["step"]
    last = start(command(pictures, killed, **arguments))
    assert last.wait() == 0, last.communicate()
    assert digest(killed) == digest(tmp_path / "whole")
    numbers = lambda workdir: [(row["step"], row["loss"], row["grad_norm"]) for row in rows(workdir)]
    assert numbers(killed) == numbers(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_a_signal_after_a_random_delay_loses_no_step(pictures, tmp_path, tmp_path_factory, seed):
    """All that is done is in the checkpoint, and the run goes on bit for bit; delays from the start to past the end."""
    draw = np.random.default_rng(seed)
    number = (signal.SIGINT, signal.SIGTERM)[seed % 2]
    changes = ({}, {"train.parallel": "pmap"}, {"train.accumulate": 2}, {"data.crop": "random", "data.workers": 2})[
        seed % 4
    ]
    changes |= {"train.steps": 60, "train.save_every": 7, "train.log_every": 1, "train.preview_every": 10}
    whole = tmp_path_factory.getbasetemp() / f"whole{seed % 4}"
    if not whole.exists():
        assert start(command(pictures, whole, **changes)).wait() == 0
    process = start(command(pictures, tmp_path, **changes), start_new_session=True)
    if seed % 3:  # a third of the delays falls anywhere, the others while steps are made
        wait_for(tmp_path / "metrics.jsonl", 1, process)
    time.sleep(draw.uniform(0, 3) if seed % 3 else draw.uniform(0.3, 15))  # Python itself starts until then
    os.killpg(process.pid, number)
    _, said = process.communicate()
    assert process.returncode in (0, 128 + number) and "Traceback" not in said, (process.returncode, said)
    done = [row["step"] for row in rows(tmp_path)] if (tmp_path / "metrics.jsonl").exists() else []
    if done:
        assert load_run(tmp_path).step == done[-1]
    print(f"{number.name} at step {done[-1] if done else 0}: exit status {process.returncode}")
    assert start(command(pictures, tmp_path, **changes)).wait() == 0
    assert digest(tmp_path) == digest(whole)


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(pictures, tmp_path):
    arguments = {"data.crop": "random", "data.workers": 2, "train.steps": 1000, "train.log_every": 1}
    process = start(command(pictures, tmp_path, **arguments))
    wait_for(tmp_path / "metrics.jsonl", 3, process)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [pid for path in children for pid in path.read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    for _ in range(100):
        alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


def interrupt_at(step, monkeypatch):
    """Press Ctrl-C while that step runs."""
    add = metrics.Log.add

    def press(self, done, *rest):
        add(self, done, *rest)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(metrics.Log, "add", press)


def test_ctrl_c_saves_and_leaves(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train(pictures, tmp_path)
    assert digest(tmp_path)[0] == 5 and rows(tmp_path)[-1]["step"] == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(pictures, tmp_path)
    assert digest(tmp_path)[0] == 8


@pytest.mark.slow
def test_a_run_under_pmap_is_saved_and_goes_on(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train(pictures, tmp_path, **{"train.parallel": "pmap"})
    train(pictures, tmp_path, **{"train.parallel": "pmap"})
    assert digest(tmp_path)[0] == 8


def test_a_loss_that_is_not_finite_stops_the_run(pictures, tmp_path):
    with pytest.raises(UserError, match=r"step \d+: the loss is nan.*last good checkpoint is step \d+") as error:
        train(pictures, tmp_path, **{"optimizer.learning_rate": 1e38, "train.save_every": 1})
    broken = json.loads((tmp_path / "not_finite.json").read_text())
    assert f"step {broken['step']}:" in str(error.value) and len(broken["records"]) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_run(tmp_path, ema=False).params))


def test_more_steps_go_on_and_another_config_does_not(pictures, finished, tmp_path, capsys):
    run, moved, other = (tmp_path / name for name in ("run", "moved", "other"))
    shutil.copytree(finished, run)
    config = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="train.batch is 8 there and 16 here.*--allow-change"):
        train(pictures, run, **{"train.batch": 16})
    shutil.copytree(pictures, moved)
    shutil.copytree(pictures, other)
    (other / "0.png").write_bytes((other / "1.png").read_bytes())
    with pytest.raises(UserError, match="not the data that the checkpoint was trained on: content was"):
        train(other, run, **{"train.steps": 10})
    with pytest.raises(
        UserError, match="checkpoint 8 in .* does not fit this config: of params, network/.*--init-from"
    ):
        train(pictures, run, allow_change=True, **{"dit.depth": 2, "train.steps": 10})
    assert (run / "config.json").read_bytes() == config and not (run / "changes.json").exists()
    train(moved, run, allow_change=True, **{"train.steps": 10, "optimizer.learning_rate": 1e-4})
    said = capsys.readouterr().out
    assert "going on from step 8 of 10" in said and "changed: optimizer.learning_rate was 0.001 and is 0.0001" in said
    assert digest(run)[0] == 10 and [row["step"] for row in rows(run)] == [2, 3, 4, 6, 8, 9, 10]
    (entry,) = json.loads((run / "changes.json").read_text())
    assert sorted(entry["changes"]) == ["data.path", "optimizer.learning_rate", "train.steps"] and entry["step"] == 8


def test_a_run_begins_from_the_weights_of_another(pictures, finished, tmp_path, capsys):
    begin = {"init_from": {"run": str(finished), "step": 0, "weights": "ema"}}
    train(pictures, tmp_path / "second", **begin, **{"train.steps": 1, "optimizer.learning_rate": 1e-30})
    assert "arrays are taken" in capsys.readouterr().out
    before, after = load_run(finished).params, load_run(tmp_path / "second", ema=False).params
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=0, atol=1e-20), before, after))
    with pytest.raises(UserError, match="init_from"):
        train(pictures, tmp_path / "second", **{"train.steps": 2, "optimizer.learning_rate": 1e-30})


def damage(workdir, step):
    for path in (workdir / "checkpoints" / str(step) / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_corrupt_checkpoint_is_named_and_passed_over(pictures, tmp_path, monkeypatch, caplog, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train(pictures, tmp_path)
    damage(tmp_path, 5)
    train(pictures, tmp_path)
    assert "checkpoint 5 cannot be read" in caplog.text
    assert "going on from step 3 of 8" in capsys.readouterr().out and digest(tmp_path)[0] == 8
    learned = digest(tmp_path)
    damage(tmp_path, 8)  # of a run that is finished
    train(pictures, tmp_path)
    assert "checkpoint 8 cannot be read" in caplog.text
    assert "going on from step 6 of 8" in capsys.readouterr().out and digest(tmp_path) == learned
    for kind, content in (
        ("config.json", b""),
        ("run.json", b"[{"),
        ("metrics.jsonl", b"\xff\n5\n" + b'{"step": "a"}'),
    ):
        path = tmp_path / kind
        whole = path.read_bytes()
        path.write_bytes(content)
        if kind == "config.json":
            with pytest.raises(UserError, match="config.json is damaged: put it back from a copy"):
                train(pictures, tmp_path)
            with pytest.raises(UserError, match="config.json is damaged: put it back from a copy"):
                load_run(tmp_path)
            path.write_bytes(whole)
    train(pictures, tmp_path, **{"train.steps": 9})
    assert len(json.loads((tmp_path / "run.json").read_text())) == 1 and rows(tmp_path)[-1]["step"] == 9


def test_damaged_files_of_a_run_are_one_line(tmp_path):
    config = configs.load(toy_experiment.__file__)
    config.text = ConfigDict({"name": "words", "tokens": 4, "width": 8})
    whole = {
        "config.json": config.to_json_best_effort().encode(),
        "data.json": b'{"shape": [16, 16, 3], "classes": []}',
        "tokenizer.json": CaptionTokenizer.train(["a cat", "a dog"], 4).to_json().encode(),
    }

    def read(name, content):
        for other, right in whole.items():
            (tmp_path / other).write_bytes(right)
        (tmp_path / name).write_bytes(content)
        return Experiment.recall(tmp_path)

    assert read("data.json", whole["data.json"]).tokenize(["a dog"])["mask"].sum() == 2
    for name, right in whole.items():
        for content in (b"", right[: len(right) // 2], b"\xff" + right):
            with pytest.raises(UserError, match=f"{name} is damaged: put it back from a copy"):
                read(name, content)
    np.savez(
        tmp_path / "seen.npz",
        image=np.zeros((1, 16, 16, 3), np.uint8),
        caption=np.array(["a"]),
        label=[-1],
        mean=np.zeros(3),
    )
    assert facts.seen(tmp_path).caption == ["a"]
    for size in (0, 100, 400):
        (tmp_path / "seen.npz").write_bytes((tmp_path / "seen.npz").read_bytes()[:size])
        assert facts.seen(tmp_path) is None


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train.steps": 0}, "train.steps is 0: it must be at least 1"),
        ({"train.batch": 7}, "choose a multiple of 2"),
        ({"train.accumulate": 3}, "choose a multiple of 6"),
        ({"train.parallel": "pmpa"}, "did you mean pmap"),
        ({"network": "uunet"}, "did you mean unet"),
        ({"log.wandb": "project"}, "wandb is not installed: pip install wandb"),
        ({"sample.num": 0}, "sample.num is 0: it must be at least 1"),
        ({"sample.sampler": "dpmpp2m"}, "did you mean dpmpp_2m"),
        ({"dit.width": 33}, "network dit cannot be made for these pictures"),
        ({"classes": 10}, "classes is 10 and captioned_folder has 0"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(pictures, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train(pictures, tmp_path, **changes)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_what_does_not_fit_is_said_before_the_pictures_are_prepared(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    with pytest.raises(UserError, match="network dit cannot be made for these pictures"):
        train(pictures, tmp_path / "run", **{"dit.width": 33})
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_leaves_no_folder_where_the_pictures_are_prepared(finished, pictures, tmp_path):
    with pytest.raises(UserError, match="network dit cannot be made for these pictures"):
        train(pictures, tmp_path / "run", **{"dit.width": 33})
    assert not list(tmp_path.iterdir())


def test_the_step_is_traced_once_where_the_pictures_are_prepared(finished, pictures, tmp_path, monkeypatch):
    traced, losses = [], Objective.losses
    monkeypatch.setattr(Objective, "losses", lambda *given: traced.append(1) or losses(*given))
    train(pictures, tmp_path / "run", **{"train.steps": 1})
    assert len(traced) == 1
