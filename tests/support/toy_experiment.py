"""The emoji experiment made tiny, on any folder of pictures, without text: seconds instead of minutes."""

from diffjax.config.kinds import pixels


def get_config():
    return pixels(
        name="emoji",
        data={"name": "captioned_folder", "size": 16},
        dit={"patch": 8, "width": 32, "depth": 1, "heads": 2, "hidden": 32, "rank": 4, "dtype": "float32"},
        optimizer={"name": "adamw", "learning_rate": 1e-3, "schedule": {"warmup": 2, "final": 0.1}},
        train={"steps": 8, "batch": 8, "ema": 0.998, "log_every": 2, "save_every": 3},
        log={"tensorboard": False},
        sample={"steps": 2, "num": 2},
    )
