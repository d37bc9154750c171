"""A DDPM of your own: the U-Net, noise table and loss of `google/ddpm-*`, on any TFDS set or folder of pictures.

    diffjax train --config experiments/ddpm_train.py --workdir runs/ddpm
    diffjax train --config experiments/ddpm_train.py --workdir runs/ddpm-classes --config.classes=10
    diffjax train --config experiments/ddpm_train.py --workdir runs/ddpm-mine \
        --config.data.name=captioned_folder --config.data.path=pictures     # class_folder: a class for each subfolder
    diffjax convert runs/ddpm ddpm          # a folder that diffusers.DDPMPipeline.from_pretrained loads

Time: 8.5 hours on one H100 as `diffjax plan` predicts it; not measured. For 256 pixels take the six levels of
`google/ddpm-cat-256`: --config.data.size=256 --config.unet.block_out_channels="(128, 128, 256, 256, 512, 512)" and its
blocks. The learning rate, the average and the number of steps are those of Ho et al. 2020, appendix B. How many steps
to draw with, and which guidance, was not measured.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ConfigDict(
        {
            "name": "ddpm",
            "seed": 0,
            "data": {"name": "cifar10", "path": "", "split": "train", "size": 32, "flip": True},
            "classes": 0,
            "text": None,
            "process": {"name": "discrete", "betas": "linear", "steps": 1000, "zero_terminal_snr": False},
            "prediction": {"name": "eps"},
            "network": "unet",
            "unet": {
                "block_out_channels": (128, 256, 256, 256),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 2,
                "norm_num_groups": 32,
                "dtype": "float32",
                "remat": False,
            },
            "loss": {
                "weight": {"name": "plain"},
                "times": {"name": "table"},
                "uniforms": "independent",
                "drop": 0.1,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-4,
                "weight_decay": 0.0,
                "b2": 0.999,
                "clip": 1.0,
                "schedule": {"name": "linear", "warmup": 5000, "hold": 1.0, "final": 1.0},
            },
            "train": {
                "steps": 800000,
                "batch": 128,
                "accumulate": 1,
                "ema": 0.9999,
                "parallel": "jit",
                "log_every": 100,
                "save_every": 5000,
                "preview_every": 20000,
                "keep_last": 2,
                "keep_best": 1,
            },
            "log": {"tensorboard": True, "wandb": ""},
            "sample": {
                "sampler": "ddpm",
                "grid": "leading",
                "steps": 1000,
                "clip": 1.0,
                "guidance": 1.5,
                "num": 16,
                "prompts": (),
            },
        }
    )
