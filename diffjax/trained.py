"""Our own runs: what a config and its data make of each other, and a run's folder as a model."""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, PyTree
from ml_collections import ConfigDict

from diffjax import build, files, struct
from diffjax.data.pipeline import Tokenize
from diffjax.denoise import Apply, Denoiser
from diffjax.errors import UserError
from diffjax.model import Defaults, Model
from diffjax.predict import Prediction
from diffjax.process import Process
from diffjax.text import CaptionTokenizer
from diffjax.train.checkpoint import load_run
from diffjax.train.step import Objective

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step: mathematics, networks, and what they were told of the data.

    `shape` is that of one picture, `classes` the classes' names, `tokenize` turns captions into arrays, None without text.
    """

    config: ConfigDict
    process: Process
    prediction: Prediction
    network: nn.Module
    text: nn.Module | None
    tokenize: Tokenize | None
    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    @property
    def conditions(self) -> tuple[str, ...]:
        """What of a batch the network is told."""
        return ("tokens", "mask") if self.text else ("label",) if self.classes else ()

    def init(self, key: Key[Array, ""]) -> PyTree:
        """New parameters: `network`, and `text` where there is a text encoder."""
        network_key, text_key = jax.random.split(key)
        params, cond = {}, {"label": jnp.zeros(1, jnp.int32)} if self.classes else {}
        if self.text:
            told = jax.tree.map(jnp.asarray, self.tokenize([""]))
            params["text"] = self.text.init(text_key, told["tokens"], told["mask"])["params"]
            cond = self.encode(params, told)
        params["network"] = self.network.init(network_key, jnp.zeros((1, *self.shape)), jnp.zeros(1), **cond)["params"]
        return params

    def encode(self, params: PyTree, cond: dict[str, Array]) -> dict[str, Array]:
        """What the network reads of a batch's conditions: tokens become states."""
        if not self.text:
            return cond
        return self.text.apply({"params": params["text"]}, cond["tokens"], cond["mask"])

    def objective(self) -> Objective:
        """What training minimises."""
        config = self.config.loss
        return Objective(
            self.process,
            self.prediction,
            apply=Apply(self.network),
            encode=self.encode,
            weight=build.make("weight", build.WEIGHTS, config.weight),
            times=build.make("times", build.TIMES, config.times),
            uniforms=build.named("uniforms", build.UNIFORMS, config.uniforms),
            drop=config.drop if self.conditions else 0.0,
        )

    def defaults(self) -> Defaults:
        """The config's sampling."""
        config = self.config.sample
        return Defaults(config.steps, config.sampler, config.grid, config.guidance if self.conditions else None)

    def model(self, params: PyTree) -> Model:
        """The model that `params` make."""
        text = Prompts(params["text"], self.text, self.tokenize) if self.text else None
        denoiser = Denoiser(self.process, self.prediction, params["network"], Apply(self.network))
        return Model(denoiser, self.shape, self.defaults(), text=text, classes=self.classes, name=self.config.name)

    def preview(self, params: PyTree) -> Float[Array, "n h w c"]:
        """Pictures of the config's prompts, of the first classes, or of nothing; the same noise every time."""
        config = self.config.sample
        told: dict[str, Any] = {}
        if self.text:
            told["prompt"] = list(config.prompts)
        elif self.classes:
            told["label"] = [i % len(self.classes) for i in range(config.num)]
        num = len(config.prompts) if self.text else config.num
        return self.model(params).sample(jax.random.key(self.config.seed), num=num, **told)


@struct.dataclass
class Prompts:
    """`prompts(["a cat", ...]) -> cond` of a text encoder that was trained with its network."""

    params: PyTree
    text: nn.Module = struct.field(pytree_node=False)
    tokenize: Tokenize = struct.field(pytree_node=False)

    def __call__(self, prompts: list[str]) -> dict[str, Array]:
        told = self.tokenize(prompts)
        return _encode(self.text, self.params, told["tokens"], told["mask"])


@functools.partial(jax.jit, static_argnums=0)
def _encode(text: nn.Module, params: PyTree, tokens: Array, mask: Array) -> dict[str, Array]:
    return text.apply({"params": params}, tokens, mask)


def plan(config: ConfigDict, workdir: Path, data: Any) -> Plan:
    """The plan of a run on a data set; what it takes from the data is kept in `workdir`, where `load` finds it.

    Raises `UserError` when the config asks for classes or text that the data have not.
    """
    if config.classes and config.classes != data.num_classes:
        raise UserError(f"classes is {config.classes} and {data.name} has {data.num_classes}: set classes to that")
    names = data.class_names if config.classes else ()
    if not (workdir / "data.json").exists():
        files.write_json(workdir / "data.json", {"shape": [data.size, data.size, data.channels], "classes": names})
    if config.text and not (workdir / TOKENIZER).exists():
        captions = itertools.chain.from_iterable(data.captions())
        files.write_atomic(workdir / TOKENIZER, CaptionTokenizer.train(captions, config.text.tokens).to_json().encode())
    return _plan(config, workdir)


def load(workdir: str | Path, step: int | None = None, ema: bool = True) -> Model:
    """The model of a run's newest checkpoint (or that of `step`), its averaged parameters or the raw ones.

    Raises `UserError` as `load_run` does.
    """
    run = load_run(workdir, step, ema)
    model = _plan(run.config, run.workdir).model(jax.tree.map(jnp.asarray, run.params))
    return model.replace(revision=str(run.step))


def recalled(workdir: Path) -> Plan:
    """The plan of a run that was begun; no checkpoint is read. Raises `UserError` when there is none."""
    if not (workdir / "data.json").is_file():
        raise UserError(f"{workdir} holds no run (no data.json); train one with: diffjax train --workdir {workdir}")
    return _plan(ConfigDict(json.loads((workdir / "config.json").read_text())), workdir)


def _plan(config: ConfigDict, workdir: Path) -> Plan:
    told = json.loads((workdir / "data.json").read_text())
    tokenize = CaptionTokenizer.from_json((workdir / TOKENIZER).read_text()) if config.text else None
    return planned(config, tuple(told["shape"]), tuple(told["classes"]), tokenize)


def planned(config: ConfigDict, shape: tuple[int, int, int], classes: tuple[str, ...], tokenize: Any) -> Plan:
    """The plan of a config for data of that shape and those classes; `tokenize.size` is the vocabulary's."""
    text = build.text(config.text, tokenize.size) if config.text else None
    widths = {"context_width": text.width, "pooled_width": text.width} if text else {}
    return Plan(
        config,
        build.process(config.process),
        build.prediction(config.prediction),
        build.network(config, **widths),
        text,
        tokenize,
        shape,
        classes,
    )
