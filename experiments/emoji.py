"""Two hundred emoji from their names, at 32 pixels, on a laptop: what `bash scripts/demo.sh` trains.

    diffjax train --config experiments/emoji.py --workdir runs/emoji

A pixel transformer with patches of 8 learns x0 along straight lines from noise (`Flow`), with a velocity loss and Muon.

Time: three and a half minutes on 2 CPU cores, compilation included (160 images/s). Result, by `diffjax evaluate`: of 64 training
prompts 100% find their own picture among 200; PSNR 25.6 dB (the mean picture: 11.0 dB). Two cores with AVX2 only took 15
minutes (26.3 dB); without AVX512-BF16, --config.dit.dtype=float32 is a quarter faster.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "name": "emoji",
            "seed": 0,
            "data": {"name": "openmoji", "path": "", "subset": "200", "size": 32, "background": "white"},
            "classes": 0,
            "text": {"name": "words", "tokens": 12, "width": 256, "depth": 1, "heads": 4},
            "process": {"name": "flow", "shift": 1.0},
            "prediction": {"name": "x0"},
            "network": "dit",
            "dit": {"patch": 8, "width": 256, "depth": 6, "heads": 4, "hidden": 672, "rank": 32, "dtype": "bfloat16"},
            "loss": {
                "weight": {"name": "velocity", "floor": 0.1},
                "times": {"name": "logit_normal", "mean": 0.6, "std": 1.0},
                "uniforms": "antithetic",
                "drop": 0.1,
            },
            "optimizer": {
                "name": "muon",
                "learning_rate": 0.02,
                "adam_learning_rate": 2e-3,
                "weight_decay": 0.01,
                "clip": 1.0,
                "schedule": {"name": "linear", "warmup": 100, "hold": 0.5, "final": 0.02},
            },
            "train": {
                "steps": 488,
                "batch": 64,
                "accumulate": 1,
                "ema": 0.998,
                "parallel": "jit",
                "log_every": 20,
                "save_every": 100,
                "preview_every": 0,
                "keep_last": 2,
                "keep_best": 1,
            },
            "log": {"tensorboard": True, "wandb": ""},
            "sample": {
                "sampler": "dpmpp_2m",
                "grid": "uniform",
                "steps": 25,
                "guidance": 2.0,
                "num": 16,
                "prompts": ("red heart", "pizza", "cat face", "rocket", "sunflower", "ghost", "rainbow", "green apple"),
            },
        }
    )
