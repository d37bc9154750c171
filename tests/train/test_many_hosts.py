"""A job on several hosts, each a process of its own: it learns what one process learns, and ends as one."""

import json
import signal
import socket
import time

import many_hosts
import numpy as np
import pytest
import tensorflow_datasets as tfds
import toy_experiment
from PIL import Image
from test_step import distance

from diffjax.train.checkpoint import load_run

pytestmark = pytest.mark.slow

FLAGS = {"train.log_every": 1, "train.save_every": 5, "train.batch": 8, "sample.num": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, and a cache folder in which the programs of all tests are kept."""
    folder = tmp_path_factory.mktemp("hosts")
    draw = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(24):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    return folder


def start(place, workdir, number, devices=1, **changes):
    flags = {"data.path": place / "pictures", **FLAGS, **changes}
    arguments = ["train", "--config", toy_experiment.__file__, "--workdir", place / workdir]
    arguments += [f"--config.{name}={value}" for name, value in flags.items()]
    return many_hosts.start(
        number,
        arguments,
        devices,
        DIFFJAX_HOME=str(place / "home"),
        JAX_DISABLE_MOST_OPTIMIZATIONS="true",
    )


def losses(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(workdir, steps, processes, seconds=240):
    """Until so many steps are done."""
    for _ in range(10 * seconds):
        if len(losses(workdir)) >= steps:
            return
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.1)
    raise AssertionError(f"no step {steps} in {seconds} s")


def same(place, workdir, alone="alone"):
    np.testing.assert_allclose(losses(place / workdir), losses(place / alone), rtol=1e-6)
    for ema in (True, False):
        assert distance(load_run(place / workdir, ema=ema).params, load_run(place / alone, ema=ema).params) < 1e-6


@pytest.fixture(scope="module")
def alone(place):
    """What one process on one device learns."""
    many_hosts.finish(start(place, "alone", 1))
    return place / "alone"


@pytest.mark.parametrize(
    "number, devices, changes",
    [
        (2, 1, {}),
        (2, 2, {"train.shard": "fsdp"}),
        (2, 2, {"train.shard": "fsdp", "train.replicas": 2}),
        (2, 2, {"train.shard": "fsdp", "train.offload": True}),
        (2, 2, {"train.shard": "tensor"}),
        (2, 1, {"train.parallel": "pmap"}),
        (4, 1, {}),
        (4, 2, {"train.shard": "both"}),
    ],
    ids=["2", "2 fsdp", "2 hybrid", "2 offload", "2 tensor", "2 pmap", "4", "4 both"],
)
def test_several_hosts_learn_what_one_does(place, alone, number, devices, changes, request):
    workdir = request.node.callspec.id
    said = many_hosts.finish(start(place, workdir, number, devices, **changes))
    same(place, workdir)
    assert (place / workdir / "samples" / "0000008.png").is_file()
    assert f"hosts: 0 {socket.gethostname()}, 1" in said[0][1] and "step 8" not in said[1][1]


LONG = {"train.steps": 400, "train.save_every": 1000}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_host_stops_all_with_a_checkpoint(place, which, number):
    workdir = f"stopped {which} {number.name}"
    processes = start(place, workdir, 2, **LONG)
    wait_for(place / workdir, 4, processes)
    processes[which].send_signal(number)
    said = [process.communicate(timeout=120) for process in processes]
    status = [128 + signal.SIGTERM] * 2
    status[which] = 128 + number
    assert [process.returncode for process in processes] == status, said
    done = load_run(place / workdir).step
    assert 4 <= done < 400 and len(losses(place / workdir)) == done


def test_the_death_of_a_host_is_noticed_with_its_name(place):
    processes = start(place, "dead", 3, **LONG | {"train.batch": 6})
    wait_for(place / "dead", 4, processes)
    processes[1].kill()
    began = time.monotonic()
    said = [process.communicate(timeout=120) for process in processes]
    assert time.monotonic() - began < 60
    for i in (0, 2):
        assert processes[i].returncode == 1
        assert f"host {socket.gethostname()} (process 1) is gone: start all hosts again" in said[i][1], said[i]


def test_without_the_first_host_no_other_goes_on(place):
    processes = start(place, "headless", 2, **LONG)
    wait_for(place / "headless", 4, processes)
    processes[0].kill()
    processes[1].communicate(timeout=60)
    assert processes[1].returncode != 0


CHAIN = [(1, 1, {}), (1, 8, {"train.shard": "fsdp"}), (2, 1, {}), (2, 2, {"train.shard": "both"})]
"""Processes, devices of each, and how they split the state."""


def test_a_run_goes_on_with_any_number_of_hosts_and_devices(place):
    """1, 8, 2 and 4 devices: the same pictures in the same order, the same losses."""
    flags = {"train.steps": 24, "train.save_every": 1000}
    many_hosts.finish(start(place, "at once", 1, **flags))
    for turn, (number, devices, changes) in enumerate(CHAIN, 1):
        processes = start(place, "in turns", number, devices, **flags, **changes)
        if turn < len(CHAIN):
            wait_for(place / "in turns", len(losses(place / "in turns")) + 2, processes)
            processes[0].send_signal(signal.SIGTERM)
        many_hosts.finish(processes, 128 + signal.SIGTERM if turn < len(CHAIN) else 0)
        print(number, devices, len(losses(place / "in turns")))
    same(place, "in turns", "at once")


WITH_TEXT = f"""
from diffjax import config

def get_config():
    settings = config.load({toy_experiment.__file__!r})
    sizes = {{"width": 16, "depth": 1, "heads": 2, "hidden": 16}}
    settings.text = {{"name": "words", "tokens": 4, **sizes, "dtype": "float32"}}
    settings.sample.prompts = ("picture 3", "picture 5")
    return settings
"""


def test_all_commands_end_alike_on_one_host_and_two(place):
    """prepare from nothing; sample (files and shards) and evaluate of one run."""
    (place / "with_text.py").write_text(WITH_TEXT)
    ended = [commands(place, number) for number in (1, 2)]
    for name in ended[0] | ended[1]:
        assert ended[0][name] == ended[1][name], name
    assert len(ended[0]) == 11 + 3 + 2, [*ended[0]]  # drawn with their sheet, shards, records and evaluation


def commands(place, number):
    """What every command left behind, by name."""
    folder, run = place / f"by {number}", place / "with text"
    settings = [
        "--config",
        place / "with_text.py",
        f"--config.data.path={place / 'pictures'}",
        "--config.train.batch=8",
    ]
    draw = ["sample", "--run", run, "--prompt", "picture 3", "--prompt", "picture 5", "--num", 5, "--batch", 2]
    for words in (
        ["prepare", *settings],
        *([["train", *settings, "--workdir", run]] if number == 1 else []),
        [*draw, "--out", folder / "drawn"],
        [*draw, "--format", "webdataset", "--per-file", 4, "--out", folder / "shards"],
        ["evaluate", "--run", run, "--num", 16],
    ):
        many_hosts.finish(many_hosts.start(number, words, DIFFJAX_HOME=str(folder / "home")))
    drawn = {path.name: path.read_bytes() for path in (*folder.glob("drawn/*.png"), *folder.glob("shards/*.tar"))}
    (info,) = folder.rglob("dataset_info.json")
    records = tfds.builder_from_directory(info.parent).as_data_source()["train"]
    found = json.loads((run / "evaluation.json").read_text())
    return drawn | {"records": [repr(record) for record in records], "evaluation": found["prompts"]}
