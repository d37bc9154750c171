"""The one place where the strings of a config, or of a command line, become objects.

A choice is a table with a `name` and that choice's own arguments: `{"name": "logit_normal", "mean": 0.6}`. A name with
a colon is the user's own: `my_losses:flat` is `flat` of the module `my_losses` (`diffjax.user_code`). An unknown name
or argument raises `UserError`, naming the nearest one.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from diffjax import user_code
from diffjax.diffusion import grid as grids, guide as guides, loss, predict, process as processes
from diffjax.diffusion.refine import Chain, Refine, adams, extrapolate, heun, unipc
from diffjax.diffusion.sample import Sampler, ddim_law
from diffjax.nets.dit import DiT
from diffjax.nets.imagen import ImagenUNet
from diffjax.nets.orthogonal import orthogonal_kernel
from diffjax.nets.subpixel import SubPixel
from diffjax.nets.unet import UNet
from diffjax.text.learned import TextTransformer
from diffjax.utils import processor
from diffjax.utils.errors import UserError, unknown

Choice = Mapping[str, Any]

MUON = re.compile(r"(^|/)\w*blocks?(_\d+)?/(.*/)?(?!adapt|time_emb)\w+/kernel$")

BETAS = {
    "linear": processes.linear_betas,
    "scaled_linear": processes.scaled_linear_betas,
    "squared_cosine": processes.squared_cosine_betas,
}
PREDICTIONS = {
    "x0": predict.X0,
    "eps": predict.Eps,
    "score": predict.Score,
    "v": predict.V,
    "flow": predict.Velocity,
    "edm": predict.EDM,
}
WEIGHTS = {
    "plain": loss.plain,
    "x0": loss.x0_weight,
    "velocity": loss.velocity,
    "min_snr": loss.min_snr,
    "sigmoid": loss.sigmoid,
    "edm": loss.edm,
    "p2": loss.p2,
}
TIMES = {
    "uniform": loss.uniform,
    "table": loss.table,
    "logit_normal": loss.logit_normal,
    "lognormal_sigma": loss.lognormal_sigma,
}
UNIFORMS = {"independent": loss.independent, "antithetic": loss.antithetic}
TEXTS = {"words": TextTransformer}
NETWORKS = {"dit": DiT, "imagen": ImagenUNet, "subpixel": SubPixel, "unet": UNet}
SAMPLERS = {
    "ddpm": Sampler(Chain(()), eta=1.0),
    "ddim": Sampler(Chain(()), law=ddim_law),
    "euler": Sampler(Chain(())),
    "heun": Sampler(heun()),
    "dpmpp_2m": Sampler(extrapolate(2)),
    "dpmpp_2m_sde": Sampler(extrapolate(2), eta=1.0),
    "dpmpp_3m": Sampler(extrapolate(3)),
    "unipc": Sampler(unipc(2)),
    "ipndm": Sampler(adams(4, even=True)),
}
DETERMINISTIC = ("heun", "unipc", "ipndm")
QUALITIES = {
    "draft": {"steps": 10, "sampler": "unipc", "grid": "logsnr"},
    "good": {"steps": 25, "sampler": "unipc", "grid": "karras"},
    "reference": {"steps": 1000, "sampler": "ddpm"},
}
"""How to draw for a budget of evaluations, by docs/nfe.md; `reference` takes the publisher's own grid."""
GRIDS = {
    "uniform": lambda process, steps, first: grids.uniform(steps, first),
    "logsnr": lambda process, steps, first: _within(
        process, steps, first, lambda n: grids.logsnr(process, n, *ends(process))
    ),
    "karras": lambda process, steps, first: _within(
        process, steps, first, lambda n: grids.karras(process, n, *_sigmas(process))
    ),
    "leading": lambda process, steps, first: grids.leading(steps, _table(process)),
    "linspace": lambda process, steps, first: grids.linspace(steps, _table(process)),
    "trailing": lambda process, steps, first: grids.trailing(steps, _table(process)),
}
"""Grids of a process by their names, from the time `first`; those of a table stand where its entries do."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def make(kind: str, table: Mapping[str, Callable], choice: Choice, others: Sequence[str] = ()) -> Any:
    """`table[choice["name"]](**the rest of choice)`; `others` are fields that the caller reads, known to the
    error message.
    """
    arguments = dict(choice)
    maker = named(kind, table, arguments.pop("name"))
    known = parameters(maker)
    for name in arguments:
        if known is not None and name not in known:
            raise unknown(f"field of {kind} {choice['name']}", name, [*known, *others] or ["no field"])
    return maker(**arguments)


def named(kind: str, table: Mapping[str, Any], name: str) -> Any:
    """`table[name]`, or what the user's own code has by that name."""
    if user_code.is_own(name):
        return user_code.find(name)
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def parameters(maker: Callable) -> dict[str, Any] | None:
    """The arguments of a maker with their defaults (`inspect.Parameter.empty` without one); None where it takes any."""
    found = inspect.signature(maker).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
        return None
    return {name: parameter.default for name, parameter in found.items() if name not in ("parent", "name")}


def process(choice: Choice) -> processes.Process:
    """A process; `shift` other than 1 shifts it (`process.Shift`)."""
    arguments = dict(choice)
    shift = arguments.pop("shift", 1.0)
    inner = make("process", PROCESSES, arguments)
    return inner if shift == 1.0 else processes.Shift(inner, shift)


def prediction(choice: Choice) -> predict.Prediction:
    """What the network predicts."""
    return make("prediction", PREDICTIONS, choice)


def network(config: Mapping[str, Any] | ConfigDict, **fixed: Any) -> nn.Module:
    """The network that `config["network"]` names, with the fields of the table of that name (`config["dit"]`, if any)
    and `fixed`.

    The table of one's own, `my_nets:Mixer`, is `config["Mixer"]`. `config["classes"]` is the number of classes, 0
    without. Of `fixed`, a network takes what it reads; one that reads no low-res pictures must not be given any.
    """
    name = config["network"]
    read = parameters(named("network", NETWORKS, name))
    if "low_res" in fixed and read is not None and "low_res" not in read:
        raise UserError(f"network {name} reads no low-res pictures: take imagen or subpixel, or leave low_res out")
    fixed = {field: value for field, value in fixed.items() if read is None or field in read}
    classes = {"num_class_embeds": config["classes"] + 1} if name == "unet" else {"classes": config["classes"]}
    fields = {key: _static(key, value) for key, value in config.get(table_of(name), {}).items()}
    return make("network", NETWORKS, {"name": name, **fields, **(classes if config["classes"] else {}), **fixed})


def table_of(network: str) -> str:
    """Where a config has the fields of a network: under its name, of one's own under what stands behind the colon."""
    return network.rpartition(":")[2]


def text(choice: Choice, vocabulary: int) -> nn.Module:
    """The text encoder that is trained with the network, for so many tokens; `tokens` is how many of them a prompt has
    at most.
    """
    fields = {key: _static(key, value) for key, value in choice.items() if key != "tokens"}
    return make("text", TEXTS, {"vocabulary": vocabulary, **fields})


def sampler(choice: str | Refine | Sampler, eta: float | None = None) -> Sampler:
    """A sampler by its name, of a refinement, or as it is; `eta` other than None replaces its amount of noise.

    Raises `UserError` for an amount outside [0, 1], and for a noisy multistep or Heun method that has no
    stochastic form.
    """
    if eta is not None:
        within("eta", eta, 0.0, 1.0)
    if isinstance(choice, str):
        found = named("sampler", SAMPLERS, choice)
        if eta and choice in DETERMINISTIC:
            raise UserError(f"sampler {choice} is deterministic: leave eta out, or take ddpm, ddim or dpmpp_2m_sde")
    else:
        found = Sampler(choice) if isinstance(choice, Refine) else choice
    return found if eta is None else dataclasses.replace(found, eta=float(eta))


def grid(
    choice: str | Float[np.ndarray, "steps 2"], of: processes.Process, steps: int, first: float = 1.0
) -> Float[np.ndarray, "steps 2"]:
    """A grid of `steps` steps from the time `first`, by its name, or as it is."""
    return named("grid", GRIDS, choice)(of, steps, first) if isinstance(choice, str) else np.asarray(choice)


def start(denoiser: Any) -> float:
    """The time at which drawing begins: t = 1, or where sigma / alpha is 80 if the denoiser `is_blind` at t = 1."""
    return ends(denoiser.process)[0] if is_blind(denoiser, 1.0) else 1.0


def is_blind(denoiser: Any, t: float) -> bool:
    """Whether a denoiser's prediction says nothing of x0 at t; one in closed form, which makes none, says all."""
    return hasattr(denoiser, "prediction") and predict.is_blind(denoiser.prediction, denoiser.process, t)


def within(name: str, value: float, low: float, high: float) -> float:
    """The value. Raises `UserError` for one that is not a number from `low` to `high`, as NaN is not."""
    if not (_is_number(value) and low <= value <= high):
        ends = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
        raise UserError(f"{name} is {value}: it must be a number {ends}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0


def scale(guidance: Any) -> float | None:
    """A scale of guidance; None, 0 and 1 are no guidance, which evaluates the conditional branch alone.

    Raises `UserError` for a negative one, NaN and infinity.
    """
    if guidance is None:
        return None
    if not (_is_number(guidance) and 0 <= guidance < math.inf):
        raise UserError(f"guidance is {guidance}: give a scale above 1, such as 3; 0 or 1 is no guidance")
    return None if guidance in (0, 1) else float(guidance)


def rule(choice: str | Choice) -> dict[str, Any]:
    """A rule of guidance as a table of its name and fields; without a name it is classifier-free."""
    return {"name": choice} if isinstance(choice, str) else {"name": "cfg", **choice}


def guide(choice: str | Choice) -> Callable[..., guides.Guide]:
    """`(denoiser, scale, weak) -> guide` by a name of `GUIDES`, or a table of its name and fields.

    Every guide can be limited to times `low` < t <= `high`, outside of which only the conditional branch is evaluated,
    and have its output rescaled by `rescale` (phi of `guide.Rescale`). All numbers are traced.
    """
    arguments = rule(choice)
    given = {name: arguments.pop(name) for name in AROUND if name in arguments}
    around = {name: within(f"{name} of the guide", value, 0.0, 1.0) for name, value in given.items()}
    low, high = around.pop("low", 0.0), around.pop("high", 1.0)
    if low >= high:
        raise UserError(f"the guide acts while {low:g} < t <= {high:g}, which is never: give low below high")
    interval = (low, high) if {"low", "high"} & given.keys() else None
    return functools.partial(_guided, make("guide", GUIDES, arguments, AROUND), interval, around.get("rescale"))


def _guided(
    rule: Callable,
    interval: tuple[float, float] | None,
    rescale: float | None,
    denoiser: Any,
    scale: float,
    weak: Any = None,
) -> guides.Guide:
    found = rule(denoiser, jnp.float32(scale), weak)
    found = guides.Interval(found, *map(jnp.float32, interval)) if interval else found
    return found if rescale is None else guides.Rescale(found, denoiser.prediction, jnp.float32(rescale))


def _cfg(two_passes: bool = False) -> Callable[..., guides.Guide]:
    return lambda denoiser, scale, weak: guides.Guidance(denoiser, scale, not two_passes)


def _cfg_zero(still: float = 1.0, two_passes: bool = False) -> Callable[..., guides.Guide]:
    still = within("still of the guide", still, 0.0, 1.0)
    return lambda denoiser, scale, weak: guides.CFGZero(denoiser, scale, jnp.float32(still), not two_passes)


def _apg(
    momentum: float = 0.0, radius: float = math.inf, parallel: float = 0.0, two_passes: bool = False
) -> Callable[..., guides.Guide]:
    ranges = {"momentum": (momentum, -1.0, 1.0), "radius": (radius, 0.0, math.inf), "parallel": (parallel, 0.0, 1.0)}
    given = {name: jnp.float32(within(f"{name} of the guide", *values)) for name, values in ranges.items()}
    return lambda denoiser, scale, weak: guides.APG(denoiser, scale, **given, together=not two_passes)


def _autoguidance(step: int = -1) -> Callable[..., guides.Guide]:
    if not isinstance(step, int) or step < 0:
        raise UserError(f"step of the guide is {step}: give the step of an earlier checkpoint of the run")
    return lambda denoiser, scale, weak: guides.Autoguidance(denoiser, weak, scale)


def optimizer(choice: Choice, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run of `steps` steps and its schedule, a factor of every learning rate.

    Gradients are first scaled down to the norm `clip` where theirs is larger; 0 leaves them as they are.
    """
    arguments = dict(choice)
    clip = arguments.pop("clip")
    factor = make("schedule", SCHEDULES, {**arguments.pop("schedule"), "steps": steps})
    update = make("optimizer", OPTIMIZERS, {**arguments, "factor": factor})
    return optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), update), factor


def warmup_constant_linear(steps: int, warmup: int = 100, hold: float = 0.5, final: float = 0.0) -> optax.Schedule:
    """1 from step `warmup` (reached linearly) to step `hold * steps`, then linear to `final` at the last step."""
    start: Any = max(hold * steps, warmup)  # a fraction of a step will do, whatever optax declares
    return optax.join_schedules([_rise(warmup), optax.linear_schedule(1.0, final, steps - start)], [start])


def warmup_cosine(steps: int, warmup: int = 100, final: float = 0.0) -> optax.Schedule:
    """Up to 1 in `warmup` steps, then half a cosine down to `final` at the last step (Loshchilov and Hutter 2017)."""
    fall = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1), final)
    return optax.join_schedules([_rise(warmup), fall], [warmup])


def _rise(warmup: int) -> optax.Schedule:
    """(step + 1) / warmup, then 1. `optax.linear_schedule` subtracts from 1: its first steps have fewer digits."""
    return lambda step: jnp.minimum((step + 1) / max(warmup, 1), 1.0)


def adamw(
    factor: optax.Schedule, learning_rate: float = 1e-3, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices only."""
    rate = lambda step: learning_rate * factor(step)
    return optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=is_kernel)


def muon(
    factor: optax.Schedule,
    learning_rate: float = 0.02,
    adam_learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.99,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024; Nesterov, 5 Newton-Schulz steps) on the kernels of blocks, `adamw` elsewhere.

    `dtype` is what the products of Newton-Schulz read (`orthogonal`).
    """
    rate = lambda step: learning_rate * factor(step)
    orthogonalise = functools.partial(orthogonal_kernel, dtype=_static("dtype", dtype))
    ways: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(
            optax.trace(momentum, nesterov=True),
            optax.stateless(lambda updates, _: jax.tree.map(orthogonalise, updates)),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(rate),
        ),
        "adamw": adamw(factor, adam_learning_rate, weight_decay, b1, b2),
    }
    return optax.partition(ways, muon_or_adamw)


def muon_or_adamw(params: PyTree) -> PyTree:
    """ "muon" for every kernel inside a block, "adamw" for all others.

    Embeddings, the first and the last layer stand outside blocks; modulation, norms and biases are inside but no
    such kernels.
    """

    def label(path: tuple, leaf: Array) -> str:
        return "muon" if MUON.search(jax.tree_util.keystr(path, simple=True, separator="/")) else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def is_kernel(params: PyTree) -> PyTree:
    """Which leaves are kernels of layers: all but biases, scales, embeddings and null vectors."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _static(field: str, value: Any) -> Any:
    """A config's value as a module's field: dtypes by name, lists as tuples."""
    if field.endswith("dtype"):
        return DTYPES[processor.dtype()] if value == processor.AUTO else named("dtype", DTYPES, value)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _discrete(betas: str = "linear", steps: int = 1000, zero_terminal_snr: bool = False) -> processes.Discrete:
    table = named("betas", BETAS, betas)(steps)
    return processes.discrete(processes.zero_terminal_snr(table) if zero_terminal_snr else table)


def _table(of: processes.Process) -> int:
    if not isinstance(of, processes.Discrete):
        raise UserError(
            f"this grid counts the steps of a table and {type(of).__name__} has none: take uniform, logsnr or karras"
        )
    return of.steps


def _within(of: processes.Process, steps: int, first: float, make: Callable[[int], grids.Grid]) -> grids.Grid:
    """The grid that `make` makes of a number of steps, with its first step taken from the time `first`. One that
    reaches t = 0 (where a process has noise left) before its last step does without that step.
    """
    times = make(steps + 1)[:-1] if ends(of)[1] == 0 else make(steps)
    times[0, 0] = first
    return times


def ends(of: processes.Process) -> tuple[float, float]:
    """The times between which `logsnr` and `karras` run: EDM's sigma / alpha, 80 to 0.002, as far as the
    process reaches.
    """
    first = 1 / of.steps if isinstance(of, processes.Discrete) else 0.0
    start, stop = np.clip(of.inverse(-2 * jnp.log(jnp.asarray([80.0, 0.002]))), first, 1.0)
    return float(start), float(stop)


def _sigmas(of: processes.Process) -> tuple[float, float]:
    start, stop = np.exp(-np.asarray(of.logsnr(jnp.asarray(ends(of)))) / 2)
    return float(stop), float(start)


PROCESSES = {
    "flow": processes.Flow,
    "cosine": processes.Cosine,
    "exploding": processes.Exploding,
    "linear": processes.Linear,
    "discrete": _discrete,
}
GUIDES = {"cfg": _cfg, "cfg_zero": _cfg_zero, "apg": _apg, "autoguidance": _autoguidance}
"""Classifier-free guidance, CFG-Zero*, adaptive projected guidance, and an earlier checkpoint of the same run, of
that `step`.
"""
AROUND = ("low", "high", "rescale")
SCHEDULES = {"linear": warmup_constant_linear, "cosine": warmup_cosine}
OPTIMIZERS = {"adamw": adamw, "muon": muon}
