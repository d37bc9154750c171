"""What a job will cost, said before it runs: parameters, bytes, memory, floating-point operations and time.

A job is a list of parts: programs, and how often each is called. They are traced on shapes: of a model's files only the
configurations are read, and nothing is computed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffjax import build, pretrained, rates, trained, weights
from diffjax.errors import UserError
from diffjax.nets import Cost, program_cost
from diffjax.refine import Heun
from diffjax.train.state import create
from diffjax.train.step import make_step
from diffjax.weights import hub
from diffjax.weights.folder import component
from diffjax.weights.scheduler import read_scheduler

FEW = 20
"""The number of steps that a sampling job of more is compared with."""

VOCABULARY = 8192


@dataclass(frozen=True)
class Asked:
    """What is to be drawn; None is the model's own choice, as in `Model.sample`."""

    steps: int | None = None
    num: int = 1
    batch: int | None = None
    size: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Part:
    """A program `call(held, *given)` of the job, its arguments as shapes: what stays in memory, and what each call is given."""

    name: str
    call: Callable[..., PyTree]
    held: PyTree
    given: tuple[Any, ...]
    parameters: int
    calls: float


@dataclass(frozen=True)
class Job:
    """The parts of a job that makes `steps` steps of `images` images; `loop` is the part that each step calls."""

    title: str
    parts: tuple[Part, ...]
    loop: str
    steps: int
    images: int


@dataclass(frozen=True)
class Estimate:
    """One part's figures: parameters, the bytes it holds, the bytes of one call beside them, its calls and their cost."""

    name: str
    parameters: int
    held: int
    temporary: int
    calls: float
    cost: Cost


def estimate(part: Part, exact: bool = False) -> Estimate:
    """The figures of a part, from shapes alone, or, `exact`, with the memory that the compiler allocates."""
    program = jax.make_jaxpr(part.call)(part.held, *part.given).jaxpr
    cost = program_cost(program)
    temporary = compiled_bytes(part) if exact else live_bytes(program)
    return Estimate(part.name, part.parameters, tree_bytes(part.held), temporary, part.calls, cost)


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree: PyTree) -> int:
    """The number of values in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def live_bytes(program: Any) -> int:
    """The most bytes of intermediate values alive at once, if nothing were fused; inner programs count when they run."""
    size = lambda value: math.prod(value.aval.shape) * value.aval.dtype.itemsize if hasattr(value.aval, "shape") else 0
    last = {}
    for position, equation in enumerate(program.eqns):
        for value in equation.invars:
            if not hasattr(value, "val"):
                last[value] = position
    own = set(program.invars) | set(program.constvars)
    live, most = 0, 0
    for position, equation in enumerate(program.eqns):
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inside = max((live_bytes(value) for value in inner if hasattr(value, "eqns")), default=0)
        live += sum(size(value) for value in equation.outvars)
        most = max(most, live + inside)
        used = {value for value in equation.invars if not hasattr(value, "val")}
        dead = {value for value in used if last[value] == position} - own
        live -= sum(size(value) for value in dead) + sum(size(v) for v in equation.outvars if v not in last)
    return most


def compiled_bytes(part: Part) -> int:
    """The temporary bytes that the compiler allocates for a call: exact, at the price of compiling."""
    return jax.jit(part.call).lower(part.held, *part.given).compile().memory_analysis().temp_size_in_bytes


def run(folder: str | Path, asked: Asked) -> list[Job]:
    """The jobs of training a run, from its first step, and of drawing with it.

    Raises `UserError` when there is none.
    """
    plan = trained.recalled(Path(folder))
    return [training(plan), drawing(plan, asked, str(folder))]


def model(name: str, asked: Asked) -> list[Job]:
    """The job of drawing with a published model: a folder, or a hub id, of which only JSON files are fetched.

    Raises `UserError` as `diffjax.load` does.
    """
    return [published(hub.fetch(name, patterns=("*.json",)).folder, asked, name)]


def experiment(config: ConfigDict, asked: Asked) -> list[Job]:
    """The jobs of training an experiment and of drawing with it, before its data are there.

    A text encoder is counted with the largest vocabulary it can have.
    """
    shape = (config.data.size, config.data.size, 3)
    classes = tuple(str(i) for i in range(config.classes))
    plan = trained.planned(config, shape, classes, _Blank(config.text.tokens) if config.text else None)
    return [training(plan), drawing(plan, asked, config.name)]


def published(folder: Path, asked: Asked, name: str) -> Job:
    """Drawing with a published pixel model."""
    dtype = build.named("dtype", build.DTYPES, asked.dtype)
    module = weights.describe(component(folder, "unet")).clone(dtype=dtype, param_dtype=dtype)
    defaults = pretrained.defaults(read_scheduler(folder), module)
    shape = _sized(pretrained.shape(module), asked.size)
    label = {"label": jnp.zeros(1, jnp.int32)} if module.num_class_embeds else {}
    return _drawing(name, shape, defaults, asked, module, label, [])


def drawing(plan: trained.Plan, asked: Asked, name: str) -> Job:
    """Drawing with the model of a run."""
    defaults = plan.defaults()
    shape = _sized(plan.shape, asked.size)
    batch = asked.batch or defaults.batch
    encoders = []
    if plan.text:
        told = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, plan.tokenize([""] * batch)))
        encoders = [_network("text", plan.text, (told["tokens"], told["mask"]), {}, 1)]
        cond = jax.eval_shape(encoders[0].call, encoders[0].held, *encoders[0].given)
    else:
        cond = jax.eval_shape(lambda: plan.encode({}, jax.tree.map(jnp.asarray, plan.blank())))
    return _drawing(name, shape, defaults, asked, plan.network, cond | plan.blank_low_res(), encoders)


def training(plan: trained.Plan) -> Job:
    """Training a run: its step, backward pass, optimizer and average included."""
    config = plan.config
    optimizer, _ = build.optimizer(config.optimizer, config.train.steps)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: create(plan.init(key), optimizer, key))
    batch = {"image": jax.ShapeDtypeStruct((config.train.batch, *plan.shape), jnp.uint8)}
    told = plan.blank()
    batch |= {k: jax.ShapeDtypeStruct((config.train.batch, *v.shape[1:]), v.dtype) for k, v in told.items()}
    step = make_step(plan.objective(), optimizer, config.train.ema, config.train.accumulate)
    part = Part("training", step, state, (batch,), tree_size(state.params), config.train.steps)
    title = f"training {config.name}: {config.train.steps} steps of {config.train.batch} images"
    return Job(title, (part,), "training", config.train.steps, config.train.batch)


def _drawing(
    name: str, shape: tuple[int, ...], defaults: Any, asked: Asked, module: nn.Module, cond: PyTree, encoders: Sequence[Part]
) -> Job:
    steps, batch = asked.steps or defaults.steps, asked.batch or defaults.batch
    sampler = asked.sampler or defaults.sampler
    guidance = defaults.guidance if asked.guidance is None else asked.guidance
    rows = batch * (1 if guidance is None else 2)
    batches = math.ceil(asked.num / batch)
    cond = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), cond)
    inputs = jax.ShapeDtypeStruct((rows, *shape), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    evaluations = 2 if isinstance(build.sampler(sampler).refine, Heun) else 1
    network = _network("network", module, inputs, cond, steps * evaluations * batches)
    images = "1 image" if asked.num == 1 else f"{asked.num} images"
    images += "" if batch == 1 else f" in batches of {batch}"
    guided = "" if guidance is None else f", guided by {guidance:g}"
    title = f"{name}: {images} of {shape[0]} x {shape[1]} pixels, {steps} steps of {sampler}{guided}"
    return Job(title, (*encoders, network), "network", steps, asked.num)


def _network(name: str, module: nn.Module, inputs: tuple, named: PyTree, calls: float) -> Part:
    """A network called on inputs and named conditions, all of them shapes."""
    held = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    return Part(name, functools.partial(_apply, module), held, (*inputs, named), tree_size(held), calls)


def _apply(module: nn.Module, variables: PyTree, *given: Any) -> PyTree:
    *inputs, named = given
    return module.apply(variables, *inputs, **named)


def _sized(shape: tuple[int, ...], size: int | None) -> tuple[int, ...]:
    return shape if size is None else (size, size, shape[-1])


@dataclass(frozen=True)
class _Blank:
    """A tokenizer of the largest size, of which only the shapes of its tokens are known."""

    length: int
    size: int = VOCABULARY

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros((len(captions), self.length), np.int32), "mask": np.ones((len(captions), self.length), bool)}


def report(job: Job, device: str | None, exact: bool = False) -> str:
    """The table of a job and its sum in one line."""
    name, speed = rates.of_device(device)
    figures = [estimate(part, exact) for part in job.parts]
    rows = [("part", "parameters", "bytes", "calls", "FLOPs a call", "FLOPs in all", "time")]
    rows += [_row(figure, speed) for figure in figures]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    memory = sum(figure.held for figure in figures) + max(figure.temporary for figure in figures)
    room = rates.MEMORY.get(device)
    fits = "" if room is None else f" of {si(room)}B" + ("" if memory < room else ": too much")
    peak = f"peak memory: {si(memory)}B{fits} ({'as compiled' if exact else 'estimated; --compile measures it'})"
    return "\n".join([job.title, "", *table, "", peak, summary(job, figures, name, speed)])


def _row(figure: Estimate, speed: rates.Rates) -> tuple[str, ...]:
    total = figure.cost.times(figure.calls)
    return (
        figure.name,
        si(figure.parameters),
        f"{si(figure.held)}B",
        f"{figure.calls:g}",
        si(figure.cost.flops),
        si(total.flops),
        duration(speed.seconds(total)),
    )


def summary(job: Job, figures: Sequence[Estimate], name: str, speed: rates.Rates) -> str:
    """Such as `1000 steps: 31 min on this CPU; 20 steps: 38 s`."""
    seconds = {figure.name: speed.seconds(figure.cost.times(figure.calls)) for figure in figures}
    line = f"{job.steps} steps: {duration(sum(seconds.values()))} on {name}"
    if job.loop == "training":
        return f"{line}, {job.images * job.steps / seconds['training']:.3g} images/s"
    rest = sum(seconds.values()) - seconds[job.loop]
    fewer = f"; {FEW} steps: {duration(rest + seconds[job.loop] * FEW / job.steps)}" if job.steps > FEW else ""
    return line + fewer


def si(value: float) -> str:
    """Three digits with a prefix: 113.7e6 is `114 M`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Seconds in words: `0.4 s`, `38 s`, `31 min`, `2.1 h`, `3.5 days`."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min" if seconds > 600 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
