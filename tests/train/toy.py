"""The emoji experiment made tiny, on any folder of pictures, without text: seconds instead of minutes."""

import runpy
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def get_config():
    config = runpy.run_path(EXPERIMENTS / "emoji.py")["get_config"]()
    config.data.update(name="captioned_folder", size=16)
    config.text = None
    config.network = "unet"
    config.unet = dict(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    config.optimizer.schedule.warmup = 2
    config.train.update(steps=8, batch=8, log_every=2, save_every=3)
    config.log.tensorboard = False
    config.sample.update(steps=2, num=2)
    return config
