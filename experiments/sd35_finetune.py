"""Stable Diffusion 3.5 medium taught your pictures, by low-rank adapters of its attention.

    diffjax train --config experiments/sd35_finetune.py --workdir runs/sd35 --config.data.path=PICTURES
    diffjax sample --run runs/sd35 --prompt "a photo of sks dog" --out pictures
    diffjax convert runs/sd35 adapters       # adapters/pytorch_lora_weights.safetensors, for diffusers

PICTURES is a folder of pictures with captions (a .txt beside each, or a metadata file); `--config.model` names another
hub id or a folder. --config experiments/sd35_finetune.py:full trains the whole transformer. With
--config.prior.weight=1 --config.prior.data.path=CLASS half of each batch are pictures of the class that yours are of,
so that it is not forgotten. For accelerators; no published weights could be had where this was written: at full size it
has not been run.
"""

from ml_collections import ConfigDict


def get_config(kind: str = "lora") -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    data = {"name": "captioned_folder", "path": "", "size": 1024, "enlarge": False, "templates": ("{}",)}
    adapted = {"rank": 16, "alpha": 16.0, "targets": "/attn2?/"}
    return ConfigDict(
        {
            "name": f"sd35_{kind}",
            "seed": 0,
            "model": "stabilityai/stable-diffusion-3.5-medium",
            "dtype": "bfloat16",
            "remat": True,
            "lora": adapted if kind == "lora" else None,
            "data": data,
            "prior": {"weight": 0.0, "data": dict(data)},
            "loss": {
                "weight": {"name": "plain"},
                "times": {"name": "logit_normal", "mean": 0.0, "std": 1.0},
                "uniforms": "antithetic",
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4 if kind == "lora" else 1e-5,
                "weight_decay": 0.0 if kind == "lora" else 0.01,
                "clip": 1.0,
                "schedule": {"name": "cosine", "warmup": 50, "final": 0.1},
            },
            "train": {
                "steps": 1000,
                "batch": 4,
                "accumulate": 1,
                "ema": 0.99,
                "parallel": "jit",
                "log_every": 10,
                "save_every": 200,
                "preview_every": 200,
                "keep_last": 2,
                "keep_best": 1,
            },
            "log": {"tensorboard": True, "wandb": ""},
            "sample": {"prompts": ("",)},
        }
    )
