"""Time grids fitted to a model: those with which a solver of few steps ends nearest to its own fine solution.

The times lie between two ends of the log-SNR, at the running sums of `softmax(theta)`, so they stay in order; theta is
found by gradient descent through the sampler on a few seeds (the idea of Watson et al. 2022, arXiv:2202.05830, with
this error).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from diffjax import build
from diffjax.diffusion.guide import Denoise
from diffjax.diffusion.process import Process
from diffjax.models import fitted
from diffjax.models.model import Inputs, Model, Recipe
from diffjax.models.options import Method
from diffjax.utils import files, struct
from diffjax.utils.errors import UserError

NAMED = ("logsnr", "karras", "uniform")
FINE = 100
"""Least steps of the fine solution; it has ten times as many as the fitted one."""
RATE = 0.1
LEAST = 1e-3
"""Least share of the log-SNR's range in one step to start from."""


@dataclass(frozen=True)
class Fit:
    """A fitted grid, the error of it and of others on seeds that it was not fitted to (the root mean square of the
    difference from the fine solution), and what it was fitted `to` (`fitted.fitted_to`)."""

    grid: Float[np.ndarray, "steps 2"]
    errors: dict[str, float]
    to: dict[str, Any]


@struct.dataclass
class Remembered:
    """A denoiser that is computed again in the backward pass, so that only its inputs are kept."""

    denoise: Denoise

    @property
    def process(self) -> Process:
        return self.denoise.process

    def init(self, x: Array) -> Any:
        init = getattr(self.denoise, "init", None)
        return init(x) if init else ()

    def __call__(self, x: Array, t: Array, cond: Any) -> Any:
        return jax.checkpoint(lambda denoise, *given: denoise(*given))(self.denoise, x, t, cond)


@struct.dataclass
class Times:
    """theta -> grid: from the time `first`, over steps - 1 times between the log-SNRs `low` and `high`, to t = 0."""

    process: Process
    low: Float[Array, ""]
    high: Float[Array, ""]
    first: float = 1.0

    def grid(self, theta: Float[Array, " steps"]) -> Float[Array, "steps 2"]:
        """The grid of these parameters."""
        inner = self.low + (self.high - self.low) * jnp.cumsum(jax.nn.softmax(theta))[:-1]
        times = jnp.concatenate([jnp.full(1, self.first), self.process.inverse(inner), jnp.zeros(1)])
        return jnp.stack([times[:-1], times[1:]], axis=1)

    def theta(self, grid: Float[np.ndarray, "steps 2"]) -> Float[np.ndarray, " steps"]:
        """The parameters of the grid nearest to this one; each step has at least the share `LEAST`."""
        inner = (np.asarray(self.process.logsnr(jnp.asarray(grid[:-1, 1]))) - self.low) / (self.high - self.low)
        shares = np.diff(np.clip(inner, 0, 1), prepend=0.0, append=1.0)
        return np.log(np.maximum(shares, LEAST)).astype(np.float32)


def between(process: Process) -> Times:
    """The times between the ends of the log-SNR grid."""
    low, high = jnp.asarray(process.logsnr(jnp.asarray(build.ends(process), jnp.float32)))
    return Times(process, low, high)


def fit(
    model: Model,
    method: Method,
    *,
    seeds: int = 8,
    iterations: int = 60,
    prompt: Sequence[str] = (),
    label: Sequence[int | str] = (),
    shown: Callable[..., Any] = iter,
) -> Fit:
    """Fit a grid to a method on `seeds` images, and measure it on as many others; Adam makes `iterations` steps.

    The images take turns with the prompts and labels; `shown` may show the progress of an iterable. Raises `UserError`
    for a sampler that adds noise.
    """
    how = model.defaults.but(method)
    if how.steps < 2:
        raise UserError("a grid of one step has no time to fit: take 2 steps or more")
    model = model.against(method.guide)
    recipe = functools.partial(model.recipe, method)
    if recipe().sampler.eta:
        raise UserError(
            f"sampler {how.sampler} adds noise, so it has no fine solution: take unipc, dpmpp_2m, ipndm or another one"
        )
    batches = functools.partial(_batches, model, recipe(), {"prompt": prompt, "label": label})
    fine = recipe(steps=max(FINE, 10 * how.steps), grid="logsnr")
    solved = lambda numbers: [(inputs, fine.advance(inputs, fine.begin(inputs)).x) for inputs in batches(numbers)]
    known = {name: recipe(grid=name) for name in NAMED}
    if callable(model.defaults.grid):
        known["published"] = recipe()
    examples = solved(np.arange(seeds))
    best = min(known.values(), key=lambda one: error(one, examples))
    times = replace(between(model.denoiser.process), first=build.start(model.denoiser))
    grid = np.asarray(times.grid(descend(best, times, times.theta(best.grid), examples, shown(range(iterations)))))
    known[fitted.FITTED] = replace(best, grid=grid)
    others = solved(np.arange(seeds, 2 * seeds))
    return Fit(grid, {name: error(one, others) for name, one in known.items()}, fitted.fitted_to(model, method))


def descend(
    recipe: Recipe, times: Times, theta: Float[np.ndarray, " steps"], examples: list, turns: Iterable[int]
) -> Float[Array, " steps"]:
    """The parameters of least error among those that Adam passes from `theta` on; it descends the error's logarithm."""
    recipe, adam = replace(recipe, denoise=Remembered(recipe.denoise)), optax.adam(RATE)
    at: Any = jnp.asarray(theta)
    moments, best = adam.init(at), (np.inf, at)
    for _ in turns:
        parts = [_slope(at, times, recipe, *example) for example in examples]
        total, slope = jax.tree.map(lambda *values: sum(values), *parts)
        if total < best[0]:
            best = float(total), at
        change, moments = adam.update(slope / total, moments)
        at = optax.apply_updates(at, change)
    return best[1]


@jax.jit
@jax.value_and_grad
def _slope(theta: Array, times: Times, recipe: Recipe, inputs: Inputs, solution: Array) -> Float[Array, ""]:
    return _squares(replace(recipe, grid=times.grid(theta)), inputs, solution)


def _squares(recipe: Recipe, inputs: Inputs, solution: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(recipe.advance(inputs, recipe.begin(inputs)).x - solution))


def error(recipe: Recipe, examples: list) -> float:
    """The root mean square of the difference between the recipe's images and the solutions."""
    total = sum(float(_squares(recipe, *example)) for example in examples)
    return (total / sum(solution.size for _, solution in examples)) ** 0.5


def _batches(
    model: Model, recipe: Recipe, subject: Mapping[str, Sequence[Any]], numbers: np.ndarray
) -> Iterator[Inputs]:
    """What the images of these numbers have of their own, in batches that divide them."""
    batch = next(size for size in range(min(model.defaults.batch, len(numbers)), 0, -1) if len(numbers) % size == 0)
    turns = lambda values: [values[i % len(values)] for i in range(len(numbers))]
    cycled: dict[str, Any] = {name: turns(values) for name, values in subject.items() if values}
    if model.classes and "label" not in cycled:
        cycled["label"] = [i % len(model.classes) for i in range(len(numbers))]
    return model.inputs(jax.random.key(0), numbers, reads=recipe.reads, **cycled).parts(batch)


def keep(name: str, sampler: str, found: Fit) -> Path:
    """Write a fit where `fitted.stored` finds it."""
    place = fitted.path(name, sampler, len(found.grid), found.to)
    times = [float(t) for t in (*found.grid[:, 0], found.grid[-1, 1])]
    files.write_json(place, {"times": times, "errors": found.errors, "to": found.to})
    return place


def report(found: Fit) -> str:
    """The errors as a table, the best last."""
    rows = [
        ("grid", "error"),
        *((name, f"{value:.4g}") for name, value in sorted(found.errors.items(), key=lambda row: -row[1])),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def progress(turns: Iterable[int]) -> Iterable[int]:
    """The turns, with a bar and the time left."""
    from rich.console import Console
    from rich.progress import track

    return track(turns, "fitting", console=Console(stderr=True))
