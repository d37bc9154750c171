"""The first stage of the emoji cascade: 1,000 pictures of 32 pixels from their names.

    diffjax train --config experiments/minimagen/emoji_base32.py --workdir runs/emoji_base32

The pixel transformer, which a CPU trains best; Imagen's own U-Net with --config.network=imagen.

Time: 18 minutes of CPU time, 30 on two cores that others used too, compilation included. Result, by `diffjax evaluate`:
of 64 training prompts 98.4% find their own picture among 1,000; PSNR 26.5 dB (the mean picture: 11.3 dB), in 25 steps
with guidance 2; others were not measured: `emoji.py`, the same network, draws best in 4 without.
"""

from ml_collections import ConfigDict

from diffjax.config.kinds import pixels


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return pixels(
        name="emoji_base32",
        data={"name": "openmoji", "subset": "1000", "size": 32},
        text={"name": "words", "tokens": 12},
        dit={"dtype": "auto"},
        imagen={
            "dim": 64,
            "mults": (1, 2, 3),
            "blocks": (1, 2, 2),
            "attention": (False, False, True),
            "cross_attention": (False, True, True),
            "patch": 2,
            "heads": 4,
        },
        optimizer={"schedule": {"final": 0.02}},
        train={"steps": 1000, "batch": 128, "ema": 0.998, "log_every": 20, "save_every": 100},
        sample={
            "guidance": 2.0,
            "num": 8,
            "prompts": ("red heart", "pizza", "cat face", "rocket", "sunflower", "ghost", "rainbow", "green apple"),
        },
    )
