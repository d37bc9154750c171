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

from diffjax.config.kinds import ddpm


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return ddpm(
        name="ddpm",
        data={"name": "cifar10", "size": 32, "flip": True},
        train={"save_every": 5000, "preview_every": 20000},
        sample={"guidance": 1.5},
    )
