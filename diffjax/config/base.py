"""The base: every field of an experiment with its default, what it can be, and what it means.

It is the one place where this is said: `diffjax config` and docs/configs.md are written from it. Defaults of the
arguments of what a name stands for (a process, a network, ...) are those of its signature, their meanings those of
`meanings`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffjax import build, user_code
from diffjax.config.fields import DTYPE, Choice, Field, Maybe, Place, Table, arguments_of
from diffjax.config.meanings import (
    ABOUT,
    GUIDES,
    NETWORKS,
    OPTIMIZERS,
    PREDICTIONS,
    PROCESSES,
    REMAT,
    SCHEDULES,
    TEXTS,
    TIMES,
    WEIGHTS,
)
from diffjax.data import default_config
from diffjax.parallel import layout
from diffjax.text import frozen

DATA = {
    "name": Field(
        "openmoji, tinted_openmoji (its objects in eight colours); captioned_folder, class_folder, captioned_table or "
        "webdataset for pictures of one's own; or any TFDS data set, such as cifar10"
    ),
    "path": Field(
        "where one's own pictures are: the folder of captioned_folder and class_folder (a subfolder for each class); a "
        ".csv, .tsv, .jsonl or .parquet file of captioned_table, a .tar file of webdataset, a folder of such files, or "
        'a pattern such as "part-*"'
    ),
    "data_dir": Field('where prepared data are looked for and put; "": $TFDS_DATA_DIR, else the cache folder'),
    "split": Field('a TFDS split or slice: "train", "test", "train[:90%]"'),
    "held_out": Field('the split that is kept for `diffjax evaluate`, such as "train[90%:]"; leave it out of split'),
    "subset": Field(
        'of openmoji: "all", "no_skin_tones", or so many, such as "200", everyday things first; tinted_openmoji has no '
        "skin tones"
    ),
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

TOLD = ("context_width", "pooled_width", "classes", "low_res", "num_class_embeds")
"""Fields of networks that follow from the rest of a config."""


def table(config: Mapping[str, Any]) -> Table:
    """Every field of an experiment like this one; the tables of networks are those that the config has, and that of its
    network.
    """
    if "model" in config:
        return Table("", FIRST | PUBLISHED | LAST | PUBLISHED_LAST)
    return Table("", FIRST | NEW | _networks(config) | LAST | NEW_LAST)


def _networks(config: Mapping[str, Any]) -> dict[str, Table]:
    chosen = config.get("network", "")
    names = [name for name in build.NETWORKS if name in config or name == chosen] + [chosen] * user_code.is_own(chosen)
    return {build.table_of(name): network(name) for name in names}


def network(name: str) -> Table:
    """The fields of a network."""
    maker = build.named("network", build.NETWORKS, name)
    return dataclasses.replace(
        arguments_of(maker, name, NETWORKS.get(name, {}), TOLD), meaning=ABOUT.get(name, f"the network {name}")
    )


def data() -> Table:
    """The fields of `config.data`, with the defaults of `diffjax.data`."""
    defaults = default_config()
    fields = {name: dataclasses.replace(field, default=defaults[name]) for name, field in DATA.items()}
    return Table("where pictures come from", fields)


def _loss(**others: Place) -> Table:
    return Table(
        "what training minimises",
        {
            "weight": Choice(
                "weight of the squared error at each time: plain is 1 for what is predicted, all others are for x0",
                build.WEIGHTS,
                WEIGHTS,
            ),
            "times": Choice(
                "how times t in [0, 1] are drawn, t = 1 is pure noise; table: the steps of a discrete process",
                build.TIMES,
                TIMES,
            ),
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

FIRST: dict[str, Place] = {
    "name": Field("what the experiment is called", str),
    "seed": Field("the same seed gives the same parameters, noise and order of pictures", 0, "[0, inf)"),
    "data": data(),
}

LAST: dict[str, Place] = {
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
            "shard": Field(
                "what devices split: the batch alone (data), the state too, by its largest axes (fsdp), large products "
                "(tensor), or both",
                "data",
                tuple(layout.RULES),
            ),
            "replicas": Field(
                "whole copies of a state that is split; as many as there are hosts: each host has one (hybrid)",
                1,
                "[1, inf)",
            ),
            "offload": Field(
                "keep the average and the optimizer's moments in the memory of the hosts, from where a step fetches "
                "them as it ends: slower, in less memory of devices",
                False,
            ),
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
"""Of every experiment that trains: what comes before and behind that of its kind."""

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
                "max_level": Field("largest noise augmentation level that it is trained on", 0.3, "[0, 1)"),
            },
        ),
        "no stage of super-resolution",
    ),
    "process": Choice(
        "how a picture becomes noise: x_t = alpha(t) x0 + sigma(t) eps, from t = 0 to t = 1",
        build.PROCESSES,
        PROCESSES,
        {"shift": Field("factor of t / (1 - t): above 1, more noise at every t", 1.0, "(0, inf)")},
    ),
    "prediction": Choice(
        "what the network predicts: the picture x0, the noise eps, or a mix of both", build.PREDICTIONS, PREDICTIONS
    ),
    "network": Field("its fields are in the table of that name", str, tuple(build.NETWORKS)),
}
"""Of one that trains a new network; the tables of networks come behind it."""

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
}
"""Of one that trains a published model."""

NEW_LAST: dict[str, Place] = {
    "loss": _loss(drop=Field("share of examples without text or class, for guidance", 0.1, "[0, 1]")),
    "sample": Table(
        "how previews, `diffjax sample` and `diffjax evaluate` draw when nothing else is said",
        {
            "sampler": Field("the solver", "dpmpp_2m", tuple(build.SAMPLERS)),
            "grid": Field("the times of its steps", "uniform", (*build.GRIDS, "fitted")),
            "steps": Field("steps from noise to picture", 25, "[1, inf)"),
            "guidance": Field("scale of guidance; 0 or 1: none, half the evaluations", 1.0),
            "guide": Maybe(
                Table(
                    "how guidance combines its branches; its other fields are that guide's",
                    {"name": Field("", "cfg", tuple(build.GUIDES))},
                    GUIDES,
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

PUBLISHED_LAST: dict[str, Place] = {
    "sample": Table("how previews are drawn", {"prompts": Field("texts of previews", ("",))}),
}
