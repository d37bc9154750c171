import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax import config as configs
from diffjax.errors import UserError
from diffjax.train import loop
from diffjax.train.checkpoint import load_run

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def command(pictures, workdir, **changes):
    flags = {"data.path": pictures, **changes}
    toy = os.path.join(os.path.dirname(__file__), "toy.py")
    return ["--config", toy, "--workdir", str(workdir), *(f"--config.{name}={value}" for name, value in flags.items())]


def train(pictures, workdir, **changes):
    """Train in this process."""
    _, toy, _, _, *flags = command(pictures, workdir, **changes)
    loop.train(configs.parse(toy, flags)[0], workdir)


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
    assert (tmp_path / "samples" / "0000008.png").is_file()
    assert (tmp_path / "run.json").is_file() and "compiled in" in capsys.readouterr().err
    train(pictures, tmp_path)
    assert "is finished: 8 of 8 steps" in capsys.readouterr().out
