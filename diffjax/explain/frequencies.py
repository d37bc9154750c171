"""When what was decided: the octaves of frequencies of the guessed picture, and when each came to stay.

The band b of a state are its cosine coefficients of frequencies in [2^b, 2^(b+1)) half waves a side; `settled` is
1 - |B_b(x0_k) - B_b(x0_K)|^2 / |B_b(x0_K)|^2 at step k, x0_K the last guess. For Gaussian data whose coefficients have
the variance L, the best guess (Wiener's filter) has settled a^2 L / (a^2 L + s^2) of them, a = alpha, s = sigma.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffjax.explain.chart import COLOURS, Chart, Line
from diffjax.explain.nearest import blocks, chosen
from diffjax.explain.section import Figure, Section, Table, Text
from diffjax.explain.subject import Subject
from diffjax.explain.walk import Step, run
from diffjax.models.model import Inputs, Recipe
from diffjax.utils.errors import UserError

SETTLED = 0.95
STEPS = 32
"""Steps of the walk in which it is looked for, at least."""

PICTURES = 2048
"""Training pictures that the variances are those of, at most."""


def coefficients(x: Float[np.ndarray, "... h w c"]) -> Float[np.ndarray, "... h w c"]:
    """The cosine transform (orthonormal, so that squares keep their sum)."""
    from scipy.fft import dctn

    return np.asarray(dctn(np.asarray(x, np.float64), axes=(-3, -2), norm="ortho"))


def bands(height: int, width: int) -> list[np.ndarray]:
    """For each octave, where its coefficients are, (height, width): the mean and the slowest waves first."""
    down, across = np.indices((height, width), float)
    side = max(height, width)
    frequency = np.hypot(down * side / height, across * side / width)
    octave = np.floor(np.log2(np.maximum(frequency, 1.0))).astype(int)
    return [octave == b for b in range(octave.max() + 1)]


def settled(guesses: Float[np.ndarray, "k h w c"]) -> Float[np.ndarray, "k bands"]:
    """How much of each octave of the last guess every guess has."""
    spectrum = coefficients(guesses)
    error, last = (spectrum - spectrum[-1]) ** 2, spectrum[-1] ** 2
    of = [(error[:, where].sum((1, 2)), last[where].sum()) for where in bands(*guesses.shape[1:3])]
    return np.stack([1 - part / max(whole, 1e-12) for part, whole in of], axis=1)


def commit(settled: Float[np.ndarray, "k bands"]) -> list[int]:
    """The step from which on each octave stays settled to 95%."""
    return [int(np.flatnonzero(np.append(True, of < SETTLED))[-1]) for of in settled.T]


def wiener(
    variance: Float[np.ndarray, "h w c"], power: Float[np.ndarray, "h w c"], alpha: np.ndarray, sigma: np.ndarray
) -> Float[np.ndarray, "k bands"]:
    """The same of Gaussian data of variances L, for a picture of power P: 1 - sum L s^2 / (a^2 L + s^2) / sum P."""
    a2, s2 = (np.asarray(of, np.float64)[:, None, None, None] ** 2 for of in (alpha, sigma))
    left = variance * s2 / np.maximum(a2 * variance + s2, 1e-12)
    return np.stack(
        [1 - left[:, of].sum((1, 2)) / max(power[of].sum(), 1e-12) for of in bands(*power.shape[:2])], axis=1
    )


def finer(subject: Subject, recipe: Recipe, inputs: Inputs, steps: Sequence[Step]) -> Sequence[Step]:
    """A walk of at least `STEPS` steps from the same noise; the given one where the model's grid has not so many."""
    if len(recipe.grid) >= STEPS:
        return steps
    try:
        return run(subject.recipe(steps=STEPS), inputs, STEPS)
    except UserError:
        return steps


def section(subject: Subject, recipe: Recipe, steps: Sequence[Step]) -> Section:
    """The octaves over a walk of many steps."""
    guesses = np.stack([step.seen.est.x0[0] for step in steps])
    found, power = settled(guesses), coefficients(guesses[-1]) ** 2
    variance = _variance(subject, guesses.shape[1:])
    times = np.array([step.t for step in steps])
    alpha, sigma = (np.asarray(of(jnp.asarray(times))) for of in (recipe.process.alpha, recipe.process.sigma))
    theory = wiener(power if variance is None else variance, power, alpha, sigma)
    first = commit(found)
    named = names(len(first))
    numbers: dict[str, Any] = {
        "t": times.tolist(),
        "bands": named,
        "settled": found.tolist(),
        "wiener": theory.tolist(),
        "variance_of": "this picture" if variance is None else "training pictures",
        "commit_t": [float(times[k]) for k in first],
    }
    figure = _figure(times, found, theory, first, named, variance is None)
    return Section("frequencies", "What was decided when", (figure,), numbers)


def _variance(subject: Subject, shape: tuple[int, ...]) -> Float[np.ndarray, "h w c"] | None:
    """The variance of each coefficient over the training pictures; None without pictures of the shape."""
    data = subject.data
    if data is None or subject.model.decode is not None or (data.size, data.size, data.channels) != tuple(shape):
        return None
    records = chosen(data)
    records = records[:: -(-len(records) // PICTURES)]
    spectra = np.concatenate([coefficients(rows.reshape(-1, *shape)) for _, rows in blocks(data, records)])
    return spectra.var(axis=0)


def names(count: int) -> list[str]:
    """The octaves in words, the slowest first."""
    return [
        "the mean and half waves" if b == 0 else f"{2**b} to {2 ** (b + 1)} half waves a side" for b in range(count)
    ]


def _figure(
    times: np.ndarray, found: np.ndarray, theory: np.ndarray, first: Sequence[int], named: Sequence[str], own: bool
) -> Figure:
    lines = []
    for b, name in enumerate(named):
        lines.append(Line(name, times, np.clip(found[:, b], 0, 1), b % COLOURS))
        lines.append(
            Line(f"{name}: Wiener", times, np.clip(theory[:, b], 0, 1), b % COLOURS, dashed=True, listed=False)
        )
    says = "How much of each octave of the last picture is there at each time: coarse ones come before fine ones."
    plain = (
        "A picture is a sum of waves, slow ones for large shapes and quick ones for edges and specks. Each line shows "
        "when the network had made up its mind about waves of one size: mostly large shapes first, details last."
    )
    exact = (
        "1 - |B_b(x0_k) - B_b(x0_K)|^2 / |B_b(x0_K)|^2; dashed, for Gaussian data: alpha^2 L / (alpha^2 L + sigma^2)"
    )
    of = "of this picture itself" if own else "of the training pictures"
    order = tuple((name, f"{times[k]:.2f}", str(k + 1)) for name, k in zip(named, first))
    blocks = (
        Chart(says, "time t", "settled", tuple(lines), falling=True, dashed="as Gaussian data would be (Wiener)"),
        Text(_order(first), strong=True),
        Table(("waves", "settled at t", f"step of {len(times)}"), order),
        Text(
            f"L are the variances {of}. Above its dashed line the network knew more than waves alone tell: that edges "
            "are sharp, and what the text or class says."
        ),
    )
    return Figure("From coarse to fine", plain, exact, "diffjax/explain/frequencies.py", blocks)


def _order(first: Sequence[int]) -> str:
    """What was decided before what, in words."""
    if max(first[:-1], default=0) == 0:
        return "Here almost all was decided in the first step: all that was asked for is one picture."
    if list(first) == sorted(first):
        return "Here it went from coarse to fine."
    return "Here it did not simply go from coarse to fine."
