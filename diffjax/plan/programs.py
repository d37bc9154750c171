"""The jobs that can be planned: training and drawing, as programs on shapes."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffjax import build, weights
from diffjax.data import dataset
from diffjax.diffusion.process import Process, discrete
from diffjax.diffusion.refine import Heun
from diffjax.models import ddpm, fitted
from diffjax.models.model import Defaults
from diffjax.models.options import Asked, Size, sides
from diffjax.nets.unet import UNet
from diffjax.parallel import layout
from diffjax.plan.compiled import placed
from diffjax.plan.cost import Part, tree_bytes, tree_size
from diffjax.text import frozen
from diffjax.text.learned import CaptionTokenizer
from diffjax.train import facts
from diffjax.train.experiment import Experiment
from diffjax.train.parallel import by_jit
from diffjax.train.state import create
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted
from diffjax.weights.folder import component
from diffjax.weights.scheduler import read_scheduler

AT_MOST = f"counted with {facts.VOCABULARY} words: the captions are not here yet"


@dataclass(frozen=True)
class Way:
    """A way to keep the parts of a job in memory: those of a stage together, one stage after the other; the job's
    `loop` part may be split over several devices.
    """

    name: str
    stages: tuple[tuple[Part, ...], ...]
    devices: int = 1


@dataclass(frozen=True)
class Job:
    """The parts of a job that makes `steps` steps of `images` images; `loop` is the part that each step calls; a `note`
    says what is not known of it. Each of several devices can have some of the `batches`.

    Without `ways`, all parts are in memory together.
    """

    title: str
    parts: tuple[Part, ...]
    loop: str
    steps: int
    images: int
    note: str = ""
    ways: tuple[Way, ...] = ()
    batches: int = 1


def run(folder: str | Path, asked: Asked, shard: str | None = None) -> list[Job]:
    """The jobs of training a run, from its first step, and of drawing with it.

    Raises `UserError` when there is none.
    """
    found = Experiment.recall(Path(folder))
    return [training(found, shard), drawing(found, asked, str(folder))]


def experiment(config: ConfigDict, asked: Asked, shard: str | None = None) -> list[Job]:
    """The jobs of training an experiment and of drawing with it, before its data are there.

    A text encoder is counted with the words of the captions, or, where these are not at hand, with as many as it can
    have.
    """
    own = config.text and not frozen.is_frozen(config.text)
    tokenize = vocabulary(config) if own else None
    found = Experiment.before_data(config, tokenize)
    note = AT_MOST if isinstance(tokenize, facts.Blank) else ""
    return [replace(job, note=note) for job in (training(found, shard), drawing(found, asked, config.name))]


def vocabulary(config: ConfigDict) -> CaptionTokenizer | facts.Blank:
    """The tokenizer that a run will have, or the largest one where its captions are not at hand."""
    try:
        captions = dataset.captions(config.data)
    except UserError:
        captions = None
    if captions is None:
        return facts.Blank(config.text.tokens)
    return facts.learn_tokenizer(config, captions, config.data.get("templates", ("{}",)))


def published(folder: Path, asked: Asked, name: str) -> Job:
    """Drawing with a published pixel model. Raises `UserError` for what draws nothing by itself, as a text encoder."""
    dtype = build.named("dtype", build.DTYPES, asked.dtype or "float32")
    module = weights.describe(component(folder, "unet")).clone(dtype=dtype, param_dtype=dtype)
    if not isinstance(module, UNet):
        raise UserError(
            f"{name} is a {type(module).__name__}, which draws nothing by itself: plan the model that it serves"
        )
    scheduler = read_scheduler(folder)
    how, shape = chosen(asked, ddpm.defaults(scheduler, module)), _sized(ddpm.shape(module), asked.size)
    label = {"label": jnp.zeros(1, jnp.int32)} if module.num_class_embeds else {}
    process = discrete(scheduler.betas())
    return _drawing(name, shape, how, asked.num, module, process, label, [])


def drawing(experiment: Experiment, asked: Asked, name: str) -> Job:
    """Drawing with the model of an experiment."""
    how, denoiser = chosen(asked, experiment.defaults()), experiment.denoiser
    shape = _sized(experiment.shape, asked.size)
    encoders, params = [], {}
    if experiment.text:
        batch = experiment.batch_shapes(how.batch)
        encoders = [_network("text", experiment.text, (batch["tokens"], batch["mask"]), {}, 1)]
        params = {"text": encoders[0].held["params"]}
    cond = jax.eval_shape(experiment.blank_cond, params)
    return _drawing(name, shape, how, asked.num, denoiser.apply.module, denoiser.process, cond, encoders)


def training(experiment: Experiment, shard: str | None = None, state: PyTree = None) -> Job:
    """Training an experiment: its step, backward pass, optimizer and average included; its state split over devices in
    the way `shard`, or as its config says. `state` are the shapes of its first one, where they do not follow from it.
    """
    name, train, key = experiment.config.name, experiment.config.train, jax.random.key(0)
    mode = shard or train.shard
    state = state or jax.eval_shape(lambda: create(experiment.init(key), experiment.optimizer, key))
    batch = experiment.batch_shapes(train.batch)
    over = functools.partial(_over, experiment, mode, state, batch)
    step, size = experiment.step(), tree_size(state.params)
    hosted = tree_bytes((state.ema, state.optimizer)) if train.offload else 0
    how = {"replaces": True, "splits": mode != "data", "over": over, "hosted": hosted}
    part = Part("training", step, state, (batch,), size, train.steps, **how)
    title = f"training {name}: {counted(train.steps, 'step')} of {counted(train.batch, 'image')}"
    return Job(title, (part,), "training", train.steps, train.batch)


def _over(experiment: Experiment, mode: str, state: PyTree, batch: PyTree, devices: Sequence[Any]) -> tuple:
    """Training on several devices, as `Part.over`. Raises `UserError` for a batch that they cannot split."""
    train = experiment.config.train
    mesh = layout.mesh(mode, train.replicas, devices)
    layout.check_batch(train.batch, train.accumulate, mesh)
    rules = layout.RULES[mode]
    held = placed(state, layout.places(state, rules, mesh, train.offload))
    return by_jit(experiment.step(), mesh, rules, train.offload).step, held, (placed(batch, layout.rows(mesh)),)


def _drawing(
    name: str,
    shape: tuple[int, ...],
    how: Defaults,
    num: int,
    module: nn.Module,
    process: Process,
    cond: PyTree,
    encoders: Sequence[Part],
) -> Job:
    share, weaker = guided_share(how, process), is_weaker(how)
    rows = how.batch * (2 if share and not weaker else 1)
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), cond)
    inputs = jax.ShapeDtypeStruct((rows, *shape), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    network = lambda name, calls: _network(name, module, inputs, cond, calls)
    networks = [network("network", calls(how, num, share))]
    networks += [network("weaker network", share * calls(how, num, share))] if weaker else []
    title, batches = titled(name, shape, how, num), math.ceil(num / how.batch)
    return Job(title, (*encoders, *networks), "network", how.steps, num, batches=batches)


def chosen(asked: Asked, defaults: Defaults) -> Defaults:
    """How a model draws what is asked for: its defaults but for the method and the batch that are asked for."""
    return replace(defaults.but(asked), batch=asked.batch or defaults.batch)


def is_weaker(how: Defaults) -> bool:
    """Whether guidance leads away from another network, not from the null branch of the same."""
    return build.rule(how.guide or "cfg")["name"] == "autoguidance" and build.scale(how.guidance) is not None


def guided_share(how: Defaults, process: Process) -> float:
    """The share of the network's evaluations in which guidance evaluates its second branch: those in the guide's
    interval.

    Raises `UserError` for a grid that the process has not, and for an interval on a fitted grid, which is not read.
    """
    rule, grid = build.rule(how.guide or "cfg"), how.grid
    low, high = rule.get("low", 0.0), rule.get("high", 1.0)
    if isinstance(grid, str) and grid == fitted.FITTED:
        if (low, high) != (0.0, 1.0):
            raise UserError(
                "the times of a fitted grid are not read: leave low and high of the guide out, or take another grid"
            )
        grid = "uniform"
    rows = grid(how.steps) if callable(grid) else build.grid(grid, process, how.steps)
    times = np.concatenate([rows[:, 0], rows[:-1, 1]]) if evaluations(how) == 2 else rows[:, 0]
    return 0.0 if build.scale(how.guidance) is None else float(np.mean((times > low) & (times <= high)))


def evaluations(how: Defaults) -> int:
    """How often a step calls the denoiser."""
    return 2 if isinstance(build.sampler(how.sampler, how.eta).refine, Heun) else 1


def calls(how: Defaults, num: int, share: float) -> float:
    """How often drawing `num` pictures calls the network, a call of half the rows counting as half of one: `share` of
    the calls have the rows of both branches. A weaker network has calls of its own.
    """
    every = how.steps * evaluations(how) * math.ceil(num / how.batch)
    return every * (1 + share) / 2 if share and not is_weaker(how) else every


def titled(name: str, shape: tuple[int, ...], how: Defaults, num: int) -> str:
    """The job of drawing `num` pictures of a shape, in words, its size as width x height."""
    images = counted(num, "image") + ("" if how.batch == 1 else f" in batches of {how.batch}")
    guided = "" if build.scale(how.guidance) is None else f", guided by {how.guidance:g}"
    if guided and how.guide:
        guided += f" ({' '.join(f'{key}={value}' for key, value in build.rule(how.guide).items())})"
    return f"{name}: {images} of {shape[1]} x {shape[0]} pixels, {counted(how.steps, 'step')} of {how.sampler}{guided}"


def _network(name: str, module: nn.Module, inputs: tuple, named: PyTree, calls: float) -> Part:
    """A network called on inputs and named conditions, all of them shapes."""
    held = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    return Part(name, functools.partial(apply, module), held, (*inputs, named), tree_size(held), calls)


def apply(module: nn.Module, variables: PyTree, *given: Any) -> PyTree:
    """The program of a `Part`: the module called on inputs, then named conditions."""
    *inputs, named = given
    return module.apply(variables, *inputs, **named)


def _sized(shape: tuple[int, ...], size: Size | None) -> tuple[int, ...]:
    return shape if size is None else (*sides(size), shape[-1])
