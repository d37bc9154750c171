"""The emoji experiment made tiny, on any folder of pictures, without text: seconds instead of minutes."""

import runpy
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def get_config():
    config = runpy.run_path(EXPERIMENTS / "emoji.py")["get_config"]()
    config.data.update(name="captioned_folder", size=16, crop="center", workers=0)
    config.text = None
    config.dit.update(patch=8, width=32, depth=1, heads=2, hidden=32, rank=4, dtype="float32")
    for field in ("adam_learning_rate", "schedule"):
        del config.optimizer[field]
    schedule = dict(name="linear", warmup=2, hold=0.5, final=0.1)
    config.optimizer.update(name="adamw", learning_rate=1e-3, schedule=schedule)
    config.train.update(steps=8, batch=8, log_every=2, save_every=3)
    config.log.tensorboard = False
    config.sample.update(steps=2, num=2)
    return config
