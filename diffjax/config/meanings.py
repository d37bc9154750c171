"""What the arguments mean of all that a config can name: processes, weights, optimizers, networks, ...

Their defaults are those of what is named. An argument that is not here is shown without a meaning; a test holds that
none is missing.
"""

import dataclasses

from diffjax import build
from diffjax.config.fields import AUTO, DTYPE, Field
from diffjax.text import frozen

PARAM_DTYPE = Field("what its parameters are kept in", allowed=tuple(build.DTYPES))
REMAT = Field("compute activations again in the backward pass: slower, in less memory")
HEADS = Field("heads of attention", allowed="[1, inf)")
WIDTH = Field("channels of a token", allowed="[1, inf)")
HIDDEN = Field("channels inside the feed-forward layers", allowed="[1, inf)")
GROUPS = Field("groups of channels that are normalised together", allowed="[1, inf)")
POLICY = {"dtype": DTYPE, "param_dtype": PARAM_DTYPE}

PROCESSES = {
    "exploding": {
        "sigma_min": Field("standard deviation of the noise at t = 0", allowed="(0, inf)"),
        "sigma_max": Field("standard deviation of the noise at t = 1", allowed="(0, inf)"),
    },
    "linear": {"sigma_max": Field("standard deviation of the noise at t = 1", allowed="(0, inf)")},
    "discrete": {
        "betas": Field("which table of variances", allowed=tuple(build.BETAS)),
        "steps": Field("entries of the table", allowed="[1, inf)"),
        "zero_terminal_snr": Field("shift the table so that it ends in pure noise"),
    },
}

PREDICTIONS = {"edm": {"sigma_data": Field("standard deviation of the data", allowed="(0, inf)")}}

WEIGHTS = {
    "velocity": {"floor": Field("sigma below this counts as this: w = 1 / max(sigma, floor)^2", allowed="[0, inf)")},
    "min_snr": {"gamma": Field("w = min(SNR, gamma)", allowed="[0, inf)")},
    "sigmoid": {"bias": Field("log-SNR from which on less weight is given: w = SNR sigmoid(bias - logSNR)")},
    "edm": {"sigma_data": Field("standard deviation of the data: w = SNR + 1 / sigma_data^2", allowed="(0, inf)")},
    "p2": {
        "gamma": Field("the exponent of w = SNR / (k + SNR)^gamma", allowed="[0, inf)"),
        "k": Field("what is added to the SNR", allowed="(0, inf)"),
    },
}

TIMES = {
    "logit_normal": {
        "mean": Field("mean of z in t = sigmoid(z), z normal; above 0 favours noisy pictures"),
        "std": Field("standard deviation of z", allowed="(0, inf)"),
    },
    "lognormal_sigma": {
        "mean": Field("mean of log(sigma / alpha), which is normal"),
        "std": Field("standard deviation of log(sigma / alpha)", allowed="(0, inf)"),
    },
}

WARMUP = Field("steps in which the learning rate rises", allowed="[0, inf)")
FINAL = Field("factor of the learning rate at the last step", allowed="[0, 1]")
SCHEDULES = {
    "linear": {
        "warmup": WARMUP,
        "hold": Field("share of all steps up to which the learning rate stays; then it falls", allowed="[0, 1]"),
        "final": FINAL,
    },
    "cosine": {"warmup": WARMUP, "final": FINAL},
}

ADAM = {
    "weight_decay": Field("share of kernels that each step takes off, times the learning rate", allowed="[0, inf)"),
    "b1": Field("decay of Adam's mean of gradients", allowed="[0, 1)"),
    "b2": Field("decay of Adam's mean of squared gradients", allowed="[0, 1)"),
}
OPTIMIZERS = {
    "adamw": {"learning_rate": Field("largest step size", allowed="(0, inf)"), **ADAM},
    "muon": {
        "learning_rate": Field("largest step size of the kernels of blocks", allowed="(0, inf)"),
        "adam_learning_rate": Field("largest step size of all other parameters, by AdamW", allowed="(0, inf)"),
        "momentum": Field("decay of Muon's mean of gradients", allowed="[0, 1)"),
        **ADAM,
        "dtype": dataclasses.replace(DTYPE, meaning=f"what Muon's products read; {AUTO}"),
    },
}

ENCODER = {"path": Field('a folder or hub id; "": the usual one')}
TEXTS = {
    "words": {"width": WIDTH, "depth": Field("blocks", allowed="[1, inf)"), "heads": HEADS, "hidden": HIDDEN, **POLICY},
    **dict.fromkeys(frozen.HUB, ENCODER),
}

ABOUT = {
    "dit": "a transformer on patches of pixels (JiT, DiT)",
    "imagen": "Imagen's U-Net, for texts and for super-resolution",
    "subpixel": "residual blocks at one resolution (EDSR), for super-resolution",
    "unet": "the U-Net of DDPM; its defaults are those for CIFAR-10",
}
"""What each network is."""

NETWORKS = {
    "dit": {
        "patch": Field("pixels a side of a token", allowed="[1, inf)"),
        "width": WIDTH,
        "depth": Field("blocks", allowed="[1, inf)"),
        "heads": HEADS,
        "hidden": HIDDEN,
        "rank": Field("rank of each block's own modulation, beside the one that all share", allowed="[1, inf)"),
        "remat": REMAT,
        "scan": Field("compile one block instead of all: faster to compile, slower to run on a CPU"),
        **POLICY,
    },
    "imagen": {
        "dim": Field("channels at full resolution", allowed="[1, inf)"),
        "mults": Field("channels behind each level, as multiples of dim; every level halves the picture"),
        "blocks": Field("residual blocks of each level"),
        "attention": Field("whether a level has self-attention"),
        "cross_attention": Field("whether a level attends to the text"),
        "efficient": Field("halve before a level's blocks instead of behind them, for super-resolution"),
        "patch": Field("pixels a side that are folded into channels before all else", allowed="[1, inf)"),
        "heads": HEADS,
        "head_dim": Field("channels of a head", allowed="[1, inf)"),
        "groups": GROUPS,
        "remat": REMAT,
        **POLICY,
    },
    "subpixel": {
        "patch": Field("pixels a side that become channels", allowed="[1, inf)"),
        "width": Field("channels of the blocks", allowed="[1, inf)"),
        "depth": Field("residual blocks", allowed="[1, inf)"),
        "groups": GROUPS,
        **POLICY,
    },
    "unet": {
        "sample_size": Field("pixels a side, as its files say; any size is read"),
        "in_channels": Field("channels of the picture", allowed="[1, inf)"),
        "out_channels": Field("channels of the output", allowed="[1, inf)"),
        "center_input_sample": Field("read 2 x - 1 instead of x"),
        "time_embedding_dim": Field("channels of the time embedding; None: four times the first level's"),
        "freq_shift": Field("in the exponent of the frequencies of the time embedding"),
        "flip_sin_to_cos": Field("cosines before sines in the time embedding"),
        "down_block_types": Field("the block of each level on the way down; those with Attn have self-attention"),
        "mid_block_type": Field("the block in the middle; None: there is none"),
        "up_block_types": Field("the block of each level on the way up"),
        "block_out_channels": Field("channels of each level; every level but the last halves the picture"),
        "layers_per_block": Field("residual layers of a level on the way down", allowed="[1, inf)"),
        "mid_block_scale_factor": Field("what results in the middle are divided by"),
        "downsample_padding": Field("pixels around a picture that is halved; 0: on its right and lower side alone"),
        "downsample_type": Field("how levels with attention halve", allowed=("conv", "resnet")),
        "upsample_type": Field("how levels with attention double", allowed=("conv", "resnet")),
        "dropout": Field("share of activations that training leaves out", allowed="[0, 1)"),
        "act_fn": Field("the activation of residual layers", allowed=("silu", "swish", "gelu", "relu", "mish")),
        "attention_head_dim": Field("channels of a head of attention; None: one head"),
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": Field("the same of attention in the middle; None: norm_num_groups"),
        "norm_eps": Field("what is added to the variance that is divided by", allowed="(0, inf)"),
        "resnet_time_scale_shift": Field(
            "whether time is added, or scales and shifts", allowed=("default", "scale_shift")
        ),
        "add_attention": Field("self-attention in the middle"),
        "class_embed_type": Field("what labels are; None: numbers of classes", allowed=("timestep", "identity")),
        "remat": REMAT,
        **POLICY,
        "out_dtype": Field("what its output is", allowed=tuple(build.DTYPES)),
    },
}
"""What the fields of each network mean; their defaults are those of its module."""

GUIDES = {
    "low": Field("guidance acts while low < t", float, "[0, 1]"),
    "high": Field("and t <= high", float, "[0, 1]"),
    "rescale": Field("share of the guided output that is brought to the conditional one's deviation", float, "[0, 1]"),
    "two_passes": Field("evaluate the branches in turn: less memory", bool),
    "still": Field("of cfg_zero: no motion while t is above it", float, "[0, 1]"),
    "momentum": Field("of apg: what earlier directions add", float, "[-1, 1]"),
    "radius": Field("of apg: largest norm of the direction", float, "[0, inf)"),
    "parallel": Field("of apg: share of the direction along the conditional x0 that is kept", float, "[0, 1]"),
    "step": Field("of autoguidance: the step of an earlier checkpoint of the run", int, "[0, inf)"),
}
"""What a guide can have beside its name; without `low`, `high` and `rescale` it is as it is."""
