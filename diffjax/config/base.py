"""The base: every field of an experiment with its default, what it can be, and what it means.

It is the one place where this is said: `diffjax config` and docs/configs.md are written from it. Defaults of the
arguments of what a name stands for (a process, a network, ...) are those of its signature.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffjax import build, user_code
from diffjax.config.fields import DTYPE, Choice, Field, Maybe, Place, Table, arguments
from diffjax.data import default_config
from diffjax.text import frozen

PARAM_DTYPE = Field("what its parameters are kept in", allowed=tuple(build.DTYPES))
REMAT = Field("compute activations again in the backward pass: slower, in less memory")
HEADS = Field("heads of attention", allowed="[1, inf)")
WIDTH = Field("channels of a token", allowed="[1, inf)")
HIDDEN = Field("channels inside the feed-forward layers", allowed="[1, inf)")
GROUPS = Field("groups of channels that are normalised together", allowed="[1, inf)")
POLICY = {"dtype": DTYPE, "param_dtype": PARAM_DTYPE}

DATA = {
    "name": Field(
        "openmoji; captioned_folder, class_folder, captioned_table or webdataset for pictures of one's own; or any "
        "TFDS data set, such as cifar10"
    ),
    "path": Field(
        "where one's own pictures are: the folder; of captioned_table a .csv, .tsv, .jsonl or .parquet file, a folder "
        'of them or a pattern such as "part-*"; of webdataset a .tar file, a folder of them or a pattern'
    ),
    "data_dir": Field('where prepared data are looked for and put; "": $TFDS_DATA_DIR, else the cache folder'),
    "split": Field('a TFDS split or slice: "train", "test", "train[:90%]"'),
    "held_out": Field(
        'the split that `diffjax evaluate` measures super-resolution on, such as "train[90%:]"; leave it out of split'
    ),
    "subset": Field('of openmoji: "all", "no_skin_tones", or so many, such as "200", everyday things first'),
    "size": Field("pixels a side of the square pictures; the shorter side is resized to it", allowed="[1, inf)"),
    "channels": Field("3 colours or 1 grey; 0: 1 where all pictures are grey, else 3", allowed=(0, 1, 3)),
    "background": Field("the CSS colour behind transparent pictures"),
    "crop": Field("the square's place: the center, or anywhere along the longer side", allowed=("center", "random")),
    "flip": Field("mirror half of the pictures, drawn anew each time"),
    "enlarge": Field("enlarge pictures smaller than size, instead of refusing them"),
    "caption": Field("any of a picture's captions each time, or always the first", allowed=("any", "first")),
    "templates": Field('texts around the caption, one chosen each time, such as ("{}", "a {}")'),
    "tag_dropout": Field(
        "probability of leaving out each comma-separated tag of a caption but the first", allowed="[0, 1]"
    ),
    "workers": Field("processes that decode; 0: threads of this one", allowed="[0, inf)"),
}

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
        "mean": Field("of z in t = sigmoid(z), z normal; above 0 favours noisy pictures"),
        "std": Field("standard deviation of z", allowed="(0, inf)"),
    },
    "lognormal_sigma": {
        "mean": Field("of log(sigma / alpha), which is normal"),
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
    "weight_decay": Field("of kernels, times the learning rate", allowed="[0, inf)"),
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
    },
}

ENCODER = {"path": Field('a folder or hub id; "": the usual one')}
TEXTS = {
    "words": {"width": WIDTH, "depth": Field("blocks", allowed="[1, inf)"), "heads": HEADS, "hidden": HIDDEN, **POLICY},
    **dict.fromkeys(frozen.HUB, ENCODER),
}

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

TOLD = ("context_width", "pooled_width", "classes", "low_res", "num_class_embeds")
"""Fields of networks that follow from the rest of a config."""


def table(config: Mapping[str, Any]) -> Table:
    """Every field of an experiment like this one; the tables of networks are those that the config has, and that of its
    network.
    """
    own = PUBLISHED if "model" in config else NEW | _networks(config)
    return Table("", COMMON | own)


def _networks(config: Mapping[str, Any]) -> dict[str, Table]:
    chosen = config.get("network")
    names = [name for name in build.NETWORKS if name in config or name == chosen] + [chosen] * user_code.is_own(chosen)
    return {build.table_of(name): network(name) for name in names}


def network(name: str) -> Table:
    """The fields of a network."""
    maker = build.named("network", build.NETWORKS, name)
    return dataclasses.replace(arguments(maker, name, NETWORKS.get(name, {}), TOLD), meaning=f"the network {name}")


def data() -> Table:
    """The fields of `config.data`, with the defaults of `diffjax.data`."""
    found = default_config().items()
    return Table(
        "where pictures come from",
        {name: dataclasses.replace(DATA[name], default=default) for name, default in found},
    )


def _loss(**others: Place) -> Table:
    return Table(
        "what training minimises",
        {
            "weight": Choice("the weight of a time's squared error of x0", build.WEIGHTS, WEIGHTS),
            "times": Choice("how times t in [0, 1] are drawn; t = 1 is pure noise", build.TIMES, TIMES),
            "uniforms": Field(
                "the random numbers that times are made of: spread evenly over the batch, or not",
                "antithetic",
                tuple(build.UNIFORMS),
            ),
            **others,
        },
    )


_SCHEDULE = Choice(
    "factor of the learning rates over the steps", build.SCHEDULES, SCHEDULES, given=("steps",), default="linear"
)
_CLIP = Field("largest norm of a gradient, longer ones are scaled down; 0: any", 1.0, "[0, inf)")

COMMON: dict[str, Place] = {
    "name": Field("what the experiment is called", str),
    "seed": Field("of parameters, noise and order: the same seed gives the same run", 0, "[0, inf)"),
    "data": data(),
    "loss": _loss(),
    "optimizer": Choice(
        "how parameters follow from gradients",
        build.OPTIMIZERS,
        OPTIMIZERS,
        {"clip": _CLIP, "schedule": _SCHEDULE},
        ("factor",),
    ),
    "train": Table(
        "how long, and what is kept",
        {
            "steps": Field("updates of the parameters", int, "[1, inf)"),
            "batch": Field("pictures of an update, on all devices together", int, "[1, inf)"),
            "accumulate": Field("micro-batches that a batch is computed in, for less memory", 1, "[1, inf)"),
            "ema": Field("decay of the running average of the parameters, which is what is sampled", 0.999, "[0, 1)"),
            "parallel": Field("how devices share a batch", "jit", ("jit", "pmap")),
            "log_every": Field("steps between numbers", 100, "[1, inf)"),
            "save_every": Field("steps between checkpoints", 1000, "[1, inf)"),
            "preview_every": Field("steps between previews; 0: at the end alone", 0, "[0, inf)"),
            "keep_last": Field("newest checkpoints that stay", 2, "[1, inf)"),
            "keep_best": Field("checkpoints of lowest loss that stay besides", 1, "[0, inf)"),
        },
    ),
    "log": Table(
        "where numbers and previews go, besides the run's folder",
        {
            "tensorboard": Field("write event files for TensorBoard", False),
            "wandb": Field('a project of Weights & Biases; "": none', ""),
        },
    ),
    "init_from": Maybe(
        Table(
            "the run whose weights it begins with, as far as they fit",
            {
                "run": Field("the folder of the run", str),
                "step": Field("its checkpoint; 0: the newest", 0, "[0, inf)"),
                "weights": Field("the averaged or the raw ones", "ema", ("ema", "raw")),
            },
        ),
        "begin with new weights",
    ),
}
"""Of every experiment that trains."""

NEW: dict[str, Place] = {
    "classes": Field("number of classes that a picture can be of, by which it is drawn; 0: none", 0, "[0, inf)"),
    "text": Maybe(
        Choice(
            "what reads captions: words is trained here, t5 and minilm are published encoders that stay as they are",
            build.TEXTS | {name: lambda path="": path for name in frozen.HUB},
            TEXTS,
            {"tokens": Field("length of a prompt, in tokens", 16, "[1, inf)")},
            ("vocabulary",),
            default="words",
        ),
        "no text is read",
    ),
    "low_res": Maybe(
        Table(
            "of a stage of super-resolution: the pictures that it draws larger",
            {
                "size": Field("their pixels a side; it divides data.size", int, "[1, inf)"),
                "most": Field("largest noise augmentation level that it is trained on", 0.3, "[0, 1)"),
            },
        ),
        "no stage of super-resolution",
    ),
    "process": Choice(
        "x_t = alpha(t) x0 + sigma(t) eps: how a picture becomes noise",
        build.PROCESSES,
        PROCESSES,
        {"shift": Field("factor of t / (1 - t): above 1, more noise at every t", 1.0, "(0, inf)")},
    ),
    "prediction": Choice("what the network is trained to predict", build.PREDICTIONS, PREDICTIONS),
    "network": Field("the network; its fields are in the table of that name", str, tuple(build.NETWORKS)),
    "loss": _loss(drop=Field("share of examples without text or class, for guidance", 0.1, "[0, 1]")),
    "sample": Table(
        "how previews, `diffjax sample` and `diffjax evaluate` draw when nothing else is said",
        {
            "sampler": Field("the solver", "dpmpp_2m", tuple(build.SAMPLERS)),
            "grid": Field("the times of its steps", "uniform", (*build.GRIDS, "fitted")),
            "steps": Field("steps from noise to picture", 25, "[1, inf)"),
            "guidance": Field("scale of guidance; 1: none, half the evaluations", 1.0),
            "guide": Maybe(
                Table(
                    "how guidance combines its branches; its other fields are that guide's",
                    {"name": Field("which guide", "cfg", tuple(build.GUIDES))},
                    open=True,
                ),
                "classifier-free guidance",
            ),
            "clip": Field("clip x0 to [-clip, clip] in every step; 0: not", 0.0, "[0, inf)"),
            "threshold": Field("quantile of |x0| that x0 is scaled down to, instead of clip; 0: not", 0.0, "[0, 1]"),
            "level": Field("noise augmentation level of the picture that super-resolution is given", 0.0, "[0, 1)"),
            "num": Field("pictures of a preview without text", 16, "[1, inf)"),
            "prompts": Field("texts of previews; (): captions of the first pictures", ()),
        },
    ),
}
"""Besides, of one that trains a new network."""

PUBLISHED: dict[str, Place] = {
    "model": Field("the published model: a hub id or a folder", str),
    "revision": Field('a branch, tag or commit of the hub; "": the newest', ""),
    "dtype": dataclasses.replace(DTYPE, default="bfloat16"),
    "remat": dataclasses.replace(REMAT, default=True),
    "lora": Maybe(
        Table(
            "low-rank adapters, which alone are trained",
            {
                "rank": Field("their rank", 16, "[1, inf)"),
                "alpha": Field("their output counts alpha / rank times", 16.0, "(0, inf)"),
                "targets": Field("a pattern (regular expression) of the layers that have one", "/attn2?/"),
            },
        ),
        "train the whole network",
    ),
    "prior": Table(
        "pictures of the class that yours are of, so that it is not forgotten (DreamBooth)",
        {"weight": Field("what they count in the loss; 0: there are none", 0.0, "[0, inf)"), "data": data()},
    ),
    "sample": Table("how previews are drawn", {"prompts": Field("texts of previews", ("",))}),
}
"""Besides, of one that trains a published model."""
