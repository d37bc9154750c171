"""From noise to the picture: what the sampler holds at every step, what the network says of it, and the move.

A step is `x_s = alpha_s x0 + sigma_s (r^eta eps + sqrt(1 - r^(2 eta)) z)` (`diffusion/sample.py`); its numbers are
shown for one pixel, the middle one's first channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffjax.diffusion import sample
from diffjax.diffusion.guide import Scale
from diffjax.diffusion.predict import Estimate
from diffjax.diffusion.process import Time, fold, unit_noise
from diffjax.diffusion.refine import Refine, Step as RefineStep
from diffjax.explain import pictures
from diffjax.explain.chart import Chart, Line
from diffjax.explain.formula import number
from diffjax.explain.section import Figure, Frame, Section, Shown, Slider
from diffjax.explain.subject import Subject, advance
from diffjax.models.model import Inputs, Recipe
from diffjax.utils import image, struct

FRAMES = 20
"""Steps that are shown at most."""


class Seen(NamedTuple):
    """A step from the inside: x_t and t where the network was asked, its estimate, and the pair that the solver made
    of it.
    """

    x: Float[Array, "b ..."]
    t: Time
    est: Estimate
    x0: Float[Array, "b ..."]
    eps: Float[Array, "b ..."]


@struct.dataclass
class Witness(Refine):
    """A refinement that remembers beside another one what its last step saw, and changes nothing."""

    refine: Refine
    blank: Seen

    def init(self, x: Array) -> Any:
        return self.refine.init(x), self.blank

    def before(self, step: RefineStep) -> RefineStep:
        return self.refine.before(step)

    def update(self, state: Any, est: Estimate, step: RefineStep) -> tuple[Any, Estimate, Array]:
        inner, refined, moved = self.refine.update(state[0], est, step)
        return (inner, Seen(step.x, jnp.asarray(step.t, jnp.float32), est, refined.x0, refined.eps)), refined, moved


called = jax.jit(lambda denoise, x, t, cond: denoise(x, t, cond))
"""A denoiser or a guide, called."""


def witnessed(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe with a witness."""
    state = jax.eval_shape(recipe.begin, inputs)
    cond = inputs.cond | ({"past": state.past} if jax.tree.leaves(state.past) else {})
    t = jnp.zeros((), jnp.float32)
    est = jax.eval_shape(called, recipe.denoise, state.x, t, cond)
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), Seen(state.x, t, est, est.x0, est.eps))
    return replace(recipe, sampler=replace(recipe.sampler, refine=Witness(recipe.sampler.refine, blank)))


@dataclass(frozen=True)
class Step:
    """Step `index` of a run, t -> s: what was `seen`, and x_s."""

    index: int
    t: float
    s: float
    seen: Seen
    after: Float[np.ndarray, "b ..."]


def run(recipe: Recipe, inputs: Inputs, frames: int = FRAMES) -> list[Step]:
    """The steps of a run, at most so many of them, evenly chosen."""
    recipe = witnessed(recipe, inputs)
    state, grid, steps, done = recipe.begin(inputs), recipe.grid, [], 0
    for index in np.unique(np.linspace(0, len(grid) - 1, min(frames, len(grid))).round().astype(int)).tolist():
        state = advance(recipe, inputs, state, grid[done : index + 1])
        done = index + 1
        seen = jax.tree.map(np.asarray, state.memory[1])
        steps.append(Step(index, float(seen.t), float(grid[index, 1]), seen, np.asarray(state.x)))
    return steps


def draw(subject: Subject, recipe: Recipe, prompt: str | None = None) -> Float[np.ndarray, "b ..."]:
    """The last state of the picture, or of that of another prompt, by the program of `walk`."""
    inputs = subject.inputs(recipe, prompt)
    recipe = witnessed(recipe, inputs)
    return np.asarray(advance(recipe, inputs, recipe.begin(inputs), recipe.grid).x)


class Move(NamedTuple):
    """The numbers of one move, of one value of the state: `x_s = alpha_s x0 + sigma_s (kept eps) + deviation z`."""

    alpha_t: float
    sigma_t: float
    logsnr: float
    alpha_s: float
    sigma_s: float
    r: float
    kept: float
    deviation: float
    x_t: float
    x0: float
    eps: float
    z: float
    x_s: float


def move(recipe: Recipe, inputs: Inputs, step: Step) -> Move:
    """Those of the first channel in the middle of the picture."""
    process, sampler, t, s = recipe.process, recipe.sampler, jnp.float32(step.t), jnp.float32(step.s)
    r = sample.ratio(process, t, s)
    kept, tau = sampler.law(r, sampler.eta)
    deviation = sampler.deviation(process, step.seen.est, t, s, tau)
    z = unit_noise(fold(inputs.keys, step.index), step.after.shape[1:], step.after.dtype)
    rows, columns = step.after.shape[1:3]
    middle = lambda x: float(jnp.broadcast_to(x, step.after.shape)[0, rows // 2, columns // 2, 0])
    of_t, of_s = (process.alpha(t), process.sigma(t), process.logsnr(t)), (process.alpha(s), process.sigma(s))
    values = step.seen.x, step.seen.x0, step.seen.eps, z, step.after
    return Move._make([*map(float, (*of_t, *of_s, r, kept)), middle(deviation), *map(middle, values)])


def section(subject: Subject, recipe: Recipe, inputs: Inputs, steps: Sequence[Step]) -> Section:
    """The picture, the walk as a slider, and how signal and noise change over it."""
    moves = [move(recipe, inputs, step) for step in steps]
    named = [{"step": step.index + 1, "t": step.t, "s": step.s, **of._asdict()} for step, of in zip(steps, moves)]
    eta = recipe.sampler.eta
    numbers = {"steps": len(recipe.grid), "sampler": subject.request.sampler, "eta": float(eta), "moves": named}
    slider = _slider(subject, len(recipe.grid), steps, moves, eta)
    return Section("walk", "From noise to the picture", (slider, _levels(recipe, steps)), numbers)


def _slider(subject: Subject, total: int, steps: Sequence[Step], moves: list[Move], eta: Scale) -> Figure:
    frames = tuple(_frame(subject, step, of, total, eta) for step, of in zip(steps, moves))
    plain = (
        "The computer begins with pure noise; at each step a network looks at what there is, guesses the clean picture "
        "and the noise in it, and a little of the noise is taken away. Move the slider to see every step."
    )
    if subject.model.decode is not None:
        plain += (
            " This model draws a smaller picture that only it can read, and a decoder turns it into pixels at the end: "
            "x_t and x0 are shown decoded, the noise is that of one of its channels."
        )
    exact = (
        "x_s = alpha_s x0 + sigma_s (r^eta eps + sqrt(1 - r^(2 eta)) z), with r = alpha_t sigma_s / (alpha_s sigma_t)"
    )
    return Figure("Step by step", plain, exact, "diffjax/diffusion/sample.py", (Slider("walk", "step", frames),))


def _frame(subject: Subject, step: Step, of: Move, total: int, eta: Scale) -> Frame:
    at = f"at step {step.index + 1} of {total}"
    views = (
        ("x", look_noisy(subject, step.seen.x, of.alpha_t, of.sigma_t), "x_t: what there is", "the noisy picture"),
        ("x0", look(subject, step.seen.est.x0), "x0: the picture as the network guesses it", "the guessed picture"),
        ("eps", look_noise(subject, step.seen.est.eps), "eps: the noise that it guesses", "the guessed noise"),
    )
    shown = tuple(
        Shown(f"walk-{step.index + 1:04d}-{name}", pixels, caption, f"{alt} {at}")
        for name, pixels, caption, alt in views
    )
    return Frame(f"step {step.index + 1} of {total}, t = {step.t:.4g}", shown, formulas(step, of, float(eta)))


def formulas(step: Step, of: Move, eta: float) -> tuple[str, ...]:
    """The numbers of a step, put into the formula of the move."""
    n = number
    fresh = f" + {n(of.deviation)} · {n(of.z)}" if of.deviation else ""
    return (
        f"t = {n(step.t)}: alpha_t = {n(of.alpha_t)}, sigma_t = {n(of.sigma_t)}, log-SNR = {n(of.logsnr)}",
        f"s = {n(step.s)}: alpha_s = {n(of.alpha_s)}, sigma_s = {n(of.sigma_s)}, r = {n(of.r)}, eta = {n(eta)}",
        f"in the middle, first channel: x_t = {n(of.x_t)}, x0 = {n(of.x0)}, eps = {n(of.eps)}"
        + (f", z = {n(of.z)}" if of.deviation else ""),
        f"x_s = {n(of.alpha_s)} · {n(of.x0)} + {n(of.sigma_s)} · {n(of.kept)} · {n(of.eps)}{fresh} = {n(of.x_s)}",
    )


def look(subject: Subject, x0: Float[Array | np.ndarray, "b ..."]) -> np.ndarray:
    """Pixels of a clean state, which a latent model decodes."""
    return image.to_uint8(subject.images(x0))[0]


def look_noisy(subject: Subject, x: Float[Array | np.ndarray, "b ..."], alpha: float, sigma: float) -> np.ndarray:
    """Pixels of a noised state."""
    if subject.model.decode is not None:
        return look(subject, x)
    return pictures.state(x[0], alpha, sigma)


def look_noise(subject: Subject, eps: Float[Array | np.ndarray, "b ..."]) -> np.ndarray:
    """Pixels of noise; of a latent model, its latents' first channel."""
    if subject.model.decode is not None:
        return pictures.noise(eps[0, ..., :1])
    return pictures.noise(eps[0])


def _levels(recipe: Recipe, steps: Sequence[Step]) -> Figure:
    process, fine = recipe.process, np.linspace(float(recipe.grid[-1, 1]), float(recipe.grid[0, 0]), 60)
    at = np.array([step.t for step in steps])
    curves = [("signal, alpha(t)", process.alpha), ("noise, sigma(t)", process.sigma)]
    lines = [Line(name, fine, np.asarray(of(jnp.asarray(fine))), i, dashed=True) for i, (name, of) in enumerate(curves)]
    lines += [
        Line(f"{name} at the steps", at, np.asarray(of(jnp.asarray(at))), i) for i, (name, of) in enumerate(curves)
    ]
    says = "How much of the picture and how much noise there is at each time: noise gives way as time falls to 0."
    plain = (
        "Drawing goes from left to right, time falling from 1 to 0: at each dot, a step, there is less noise and more "
        "of the picture than before."
    )
    exact = "x_t = alpha(t) x0 + sigma(t) eps, log-SNR = 2 log(alpha / sigma)"
    chart = Chart(says, "time t", "share", tuple(lines), falling=True)
    return Figure("How much is noise", plain, exact, "diffjax/diffusion/process.py", (chart,))
