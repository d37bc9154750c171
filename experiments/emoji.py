"""Two hundred emoji from their names, at 32 pixels, on a laptop: what `bash scripts/demo.sh` trains.

    diffjax train --config experiments/emoji.py --workdir runs/emoji

A pixel transformer with patches of 8 learns x0 along straight lines from noise (`Flow`), with a velocity loss and Muon.

Time: three and a half minutes on 2 CPU cores with AVX512-BF16, compilation included (160 images/s). Where bfloat16
would be emulated it is trained in float32 (`dtype` "auto"); on two cores with AVX2 only bfloat16 took 15 minutes and
float32 was a quarter faster, so about 12 are to be expected there. Half of the 488 steps will not do: 280, in float32,
gave 16.4 dB.

Result, by `diffjax evaluate --num 200` on 2 cores with avx512f and avx512_bf16, without amx (the mean picture: 11.0
dB). Every row is dpmpp_2m on the uniform grid, and in every one each prompt finds its own picture among 200:

    steps  guidance  evaluations  PSNR
        1      1               1  26.9 dB
        2      1               2  30.1 dB
        4      1               4  30.5 dB   the default
        8      1               8  30.6 dB
       25      2              50  26.4 dB
"""

from ml_collections import ConfigDict

from diffjax.config.kinds import pixels


def get_config() -> ConfigDict:
    """The experiment; any field can be overridden with --config.FIELD=VALUE."""
    return pixels(
        name="emoji",
        data={"name": "openmoji", "subset": "200", "size": 32},
        text={"name": "words", "tokens": 12},
        dit={"dtype": "auto"},
        optimizer={"schedule": {"final": 0.02}},
        train={"steps": 488, "batch": 64, "ema": 0.998, "log_every": 20, "save_every": 100},
        sample={
            "steps": 4,
            "prompts": ("red heart", "pizza", "cat face", "rocket", "sunflower", "ghost", "rainbow", "green apple"),
        },
    )
