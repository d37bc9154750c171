"""A signal at every point of the loop: no step is lost, and the run goes on bit for bit."""

import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from diffjax.data import pipeline
from diffjax.data.pipeline import Prefetch
from diffjax.parallel import devices
from diffjax.train import loop, metrics, sanity
from diffjax.train.checkpoint import Checkpoints, load_run
from diffjax.train.loop import WAYS, Training
from diffjax.train.metrics import Log
from diffjax.train.preview import Preview
from diffjax.train.state import create
from diffjax.train.step import gradient
from diffjax.utils.interrupt import Terminated, command

STEPS = 7
PANEL = SimpleNamespace(draw=lambda: np.zeros((8, 8, 3), np.uint8), lines=lambda early: [], learned=lambda: True)
OPTIMIZER = optax.adam(0.1)


class Numbers:
    """Batch number k of some random numbers."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        return np.random.default_rng(self.number).normal(size=(8, 4)).astype(np.float32)

    def get_state(self):
        return json.dumps(self.number).encode()

    def set_state(self, state, allow_change=False):
        self.number = json.loads(state)

    def close(self):
        pass


def step(state, batch, axis_name=None, parts=2):
    losses, gradients = gradient(lambda params, x: jnp.square(x @ params["w"] - 1), state.params, (batch,), parts)
    loss, norm = losses.mean(), optax.tree.norm(gradients)
    if axis_name:
        gradients, loss = jax.lax.pmean((gradients, loss), axis_name)
    updates, moments = OPTIMIZER.update(gradients, state.optimizer)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "finite": jnp.isfinite(loss),
        "bin_sum": jnp.zeros(10),
        "bin_count": jnp.zeros(10),
    }
    return state.replace(step=state.step + 1, params=params, ema=params, optimizer=moments), metrics


WAY = {name: way(step, devices.data_mesh(jax.devices()[:2])) for name, way in WAYS.items()}


class Sites:
    """The places of the loop where a signal may arrive, called by name; `at(name)` is told of each."""

    def __init__(self, at=lambda name: None):
        self.at = at

    def around(self, owner, name):
        call = getattr(owner, name)

        def noted(*arguments, **named):
            self.at(f"before {name} of {type(owner).__name__}")
            result = call(*arguments, **named)
            self.at(f"after {name} of {type(owner).__name__}")
            return result

        setattr(owner, name, noted)


def run(workdir, at=lambda name: None, way="jit", steps=STEPS, place=None):
    """Train, from the last checkpoint if there is one, with `at` called at every site."""
    sites = Sites(at)
    config = ConfigDict({"train": {"steps": steps, "batch": 8, "log_every": 2, "save_every": 3, "preview_every": 2}})
    config.update({"optimizer": {"learning_rate": 0.1}, "log": {"tensorboard": False, "wandb": ""}})
    preview = lambda ema: Preview(np.zeros((1, 8, 8, 3)), 1, [])
    experiment = SimpleNamespace(config=config, preview=preview, seen=True)
    experiment.holding = lambda frozen: experiment
    parallel, checkpoints = WAY[way], Checkpoints(workdir)
    batches = Prefetch(Numbers(), place or (lambda batch: (parallel.feed(batch), np.arange(8))))
    state = create({"w": jnp.zeros(4)}, OPTIMIZER, jax.random.key(0))
    if restored := checkpoints.restore(jax.eval_shape(lambda: state)):
        state, position = restored
        batches.set_state(position.encode())
    with Log(workdir, config, int(state.step), lambda step: 1.0) as log:
        here = Training(
            experiment, workdir, parallel, batches, checkpoints, log, parallel.place(state), int(state.step)
        )
        for owner, names in (
            (here, ("advance", "save", "show", "due")),
            (checkpoints, ("save", "last")),
            (checkpoints.manager, ("save", "wait_until_finished")),
            (log, ("flush", "add", "picture")),
            (batches, ("wait", "get_state")),
            (experiment, ("preview",)),
            (log.terminal, ("write",)),
        ):
            for name in names:
                sites.around(owner, name)
        try:
            here.run()
        finally:
            batches.close()
            checkpoints.close()
    return here


def learned(workdir):
    (workdir / "config.json").write_text("{}")
    found = load_run(workdir, ema=False)
    return found.step, found.params["w"].tobytes()


def losses(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_panel(monkeypatch):
    monkeypatch.setattr(loop.sanity, "look", lambda experiment, ema: PANEL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run learns, and all the sites that it passes."""
    sites, results = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity, "look", lambda experiment, ema: PANEL)
        for way in WAYS:
            folder = tmp_path_factory.mktemp(way)
            run(folder, sites.append if way == "jit" else lambda name: None, way)
            results[way] = learned(folder)
    return SimpleNamespace(sites=sites, results=results)


def stop_at(number, signals=(signal.SIGINT,)):
    """Send the signals at the site of that number."""
    passed = []

    def at(name):
        passed.append(name)
        if len(passed) == number + 1:
            for one in signals:
                signal.raise_signal(one)

    return at


def check(whole, folder, number, signals, way="jit"):
    """Stopped at that site a run has lost nothing and, called again, ends as one that was not stopped."""
    done, at = [], stop_at(number, signals)

    def counted(name):
        done.append(name)
        at(name)

    with pytest.raises(Terminated if signals[0] == signal.SIGTERM else KeyboardInterrupt), command():
        run(folder, counted, way)
    steps = done.count("after advance of Training")
    if steps:
        assert learned(folder)[0] == steps, (number, whole.sites[number])
        assert losses(folder)[-1] == steps
    run(folder, way=way)
    assert learned(folder) == whole.results[way], (number, whole.sites[number])


def test_a_signal_while_the_data_are_waited_for(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(pipeline, "CLOSE_SECONDS", 0.2)
    passed, placed, waited_for, never = [], [], threading.Event(), threading.Event()

    def at(name):
        passed.append(name)
        if name == "before wait of Prefetch" and passed.count("after advance of Training") == 4:
            waited_for.set()

    def place(batch):
        placed.append(batch)
        if len(placed) == 5:
            waited_for.wait()
            os.kill(os.getpid(), signal.SIGINT)
            never.wait()
        return WAY["jit"].feed(batch), np.arange(8)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, at, place=place)
    never.set()
    assert learned(tmp_path)[0] == 4
    run(tmp_path)
    assert learned(tmp_path) == whole.results["jit"]


@pytest.mark.parametrize("site", ["before advance of Training", "before picture of Log", "before write of Terminal"])
def test_a_failure_loses_no_step(tmp_path, site):
    def fail(name):
        passed.append(name)
        if name == site and passed.count(site) == 2:
            raise OSError("no")

    passed = []
    with pytest.raises(OSError, match="no"):
        run(tmp_path, fail)
    assert learned(tmp_path)[0] == passed.count("after advance of Training") > 0


def test_a_step_that_fails_spoils_no_checkpoint(tmp_path, monkeypatch):
    def fail(state, batch):
        if int(state.step) == 4:
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return WAYS["jit"](step, devices.data_mesh(jax.devices()[:2])).step(state, batch)

    fail.lower = WAY["jit"].step.lower
    monkeypatch.setitem(WAY, "jit", WAY["jit"]._replace(step=fail))
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        run(tmp_path)
    assert learned(tmp_path)[0] == 3


def test_the_first_step_says_that_it_compiles(capsys, monkeypatch):
    monkeypatch.setattr(metrics, "COMPILING_SECONDS", 0.05)
    terminal = metrics.Terminal(0, 9)
    with terminal.compiling():
        time.sleep(0.2)
    terminal.close()
    first, *later, last = capsys.readouterr().err.splitlines()
    assert first == "compiling the training step" and last.startswith("compiled in 0.")
    assert later and all(line.startswith("still compiling after") for line in later)


def a_few(sites):
    """The number of one site of each name, each from another part of the run."""
    chosen = {}
    for number, name in enumerate(sites):
        seen = chosen.setdefault(name, [])
        seen.append(number)
    return [numbers[index % len(numbers)] for index, numbers in enumerate(chosen.values())]


def test_a_signal_at_any_site_loses_no_step(whole, tmp_path):
    for number in a_few(whole.sites):
        check(whole, tmp_path / str(number), number, (signal.SIGINT,))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)], ids=["Ctrl-C twice", "SIGTERM"]
)
def test_a_signal_at_every_site_loses_no_step(whole, tmp_path, signals, way):
    for number in range(len(whole.sites)):
        check(whole, tmp_path / str(number), number, signals, way)
    print(f"{len(whole.sites)} sites")
