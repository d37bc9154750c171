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

from diffjax.config.kinds import finetune

KINDS = {
    "lora": {"lora": {"rank": 16}, "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.0}},
    "full": {"optimizer": {"learning_rate": 1e-5}},
}


def get_config(kind: str = "lora") -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return finetune(
        name=f"sd35_{kind}",
        model="stabilityai/stable-diffusion-3.5-medium",
        train={"steps": 1000, "batch": 4, "ema": 0.99, "log_every": 10, "save_every": 200, "preview_every": 200},
        **KINDS[kind],
    )
