"""A text-to-image run that was never trained: random parameters, eight pictures with captions, a log."""

import json

import jax
import numpy as np
import optax
from PIL import Image

import diffjax.data
from diffjax import config as configs
from diffjax.train.checkpoint import Checkpoints
from diffjax.train.experiment import Experiment
from diffjax.train.state import create

CAPTIONS = ("red heart", "blue heart", "green heart", "red ball", "blue ball", "green ball", "red star", "blue star")
EXPERIMENT = """
import runpy

def get_config():
    config = runpy.run_path({experiment!r})["get_config"]()
    config.data.update(name="captioned_folder", path={pictures!r}, size=8, held_out="")
    config.text.update(tokens=4, width=8, depth=1, heads=2)
    config.dit.update(patch=4, width=16, depth=2, heads=2, hidden=16, rank=2, dtype="float32")
    config.sample.steps = 3
    return config
"""


def make(root, folder):
    """The run in `folder/run`."""
    data = folder / "data"
    data.mkdir()
    for number, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(caption)
    (folder / "tiny.py").write_text(
        EXPERIMENT.format(experiment=str(root / "experiments" / "emoji.py"), pictures=str(data))
    )
    config, run = configs.load(str(folder / "tiny.py")), folder / "run"
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    experiment = Experiment.begin(config, run, diffjax.data.load(config.data))
    params, draw = jax.jit(experiment.init)(jax.random.key(0)), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * draw.standard_normal(leaf.shape, np.float32), params)
    checkpoints = Checkpoints(run)
    checkpoints.save(create(params, optax.sgd(0.1), jax.random.key(0)).replace(step=5), "", 1.0)
    checkpoints.close()
    (run / "run.json").write_text("[]")
    rows = [{"step": step, "loss": 1.0, "loss_by_logsnr": {"-1": 2.0 / step, "3": 9.0 / step}} for step in (1, 3, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    return run
