"""Every sampler x variance x prediction x process x grid x number of steps x eta, through `Model.recipe`, against a
loop in float64.

The loop is written from the papers' formulas alone: it knows no function of diffjax. The toy network is the exact
denoiser of a Gaussian, a line in x for each time of the grid. Ten programs serve the whole space: process and
prediction are switched inside them. By default 60 combinations of four programs run; with `--slow` all.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build
from diffjax.diffusion import predict, sample
from diffjax.diffusion.denoise import Denoiser
from diffjax.diffusion.predict import Prediction
from diffjax.diffusion.process import Cosine, Discrete, Exploding, Flow, Linear, Process, Shift, fold, unit_noise
from diffjax.models.model import Defaults, Model
from diffjax.utils import struct
from diffjax.utils.errors import UserError

TABLE, ROWS = 12, 17
VARIANCES = {
    "small": sample.small,
    "large": sample.large,
    "learned": sample.learned,
    "learned_range": sample.learned_range,
}
PREDICTIONS = {name: make() for name, make in build.PREDICTIONS.items()} | {"straight": predict.Straight()}
STEPS, ETAS = (1, 2, 3, 9, 16), (None, 0.0, 0.4, 1.0)
MEAN, SPREAD = np.array([0.4, -0.7, 0.1]), np.array([0.05, 0.3, 1.0])
SECOND = np.array([0.1, 0.4, 0.9], np.float32)


def tabled(zero):
    alpha2 = np.cumprod(1 - np.linspace(0.01, 0.5, TABLE))
    return (np.append(alpha2[:-1], 0.0) if zero else alpha2).astype(np.float32)


PROCESSES = {
    "flow": Flow(),
    "cosine": Cosine(),
    "exploding": Exploding(0.01, 50.0),
    "linear": Linear(80.0),
    "discrete": Discrete(tabled(False)),
    "zero-terminal": Discrete(tabled(True)),
    "shifted flow": Shift(Flow(), 3.0),
    "shifted cosine": Shift(Cosine(), 0.3),
}
assert {type(process) for process in PROCESSES.values()} >= set(build.PROCESSES.values()) - {
    build.PROCESSES["discrete"]
}


# The formulas, in float64.


def coefficients(name, t):
    """(alpha, sigma, alpha', sigma') of a process at t."""
    if name.startswith("shifted"):
        by = 3.0 if name == "shifted flow" else 0.3
        inner, slope = t / (t + (1 - t) / by), by / (1 + (by - 1) * t) ** 2
        alpha, sigma, da, ds = coefficients(name.removeprefix("shifted "), inner)
        return alpha, sigma, slope * da, slope * ds
    if name == "flow":
        return 1 - t, t, -1.0, 1.0
    if name == "cosine":
        angle = np.pi / 2
        return np.sin(angle * (1 - t)), np.sin(angle * t), -angle * np.sin(angle * t), angle * np.cos(angle * t)
    if name == "exploding":
        sigma = 0.01 * 5000.0**t
        return 1.0, sigma, 0.0, sigma * np.log(5000.0)
    return (
        (1.0, 80 * t, 0.0, 80.0)
        if name == "linear"
        else table_coefficients(tabled(name == "zero-terminal").astype(float), t)
    )


def table_coefficients(alpha2, t):
    """Between its entries log-SNR is interpolated; where that is infinite, alpha^2, and to alpha = 0 alpha itself."""
    power = np.append(1.0, alpha2)
    place = t * TABLE
    place = np.round(place) if abs(place - np.round(place)) < 1e-3 else place
    low = min(int(place), TABLE - 1)
    w, a, b = place - low, power[low], power[low + 1]
    if a == 1:
        alpha, sigma = np.sqrt(1 - w * (1 - b)), np.sqrt(w * (1 - b))
        return alpha, sigma, -TABLE * (1 - b) / 2 / alpha, TABLE * (1 - b) / 2 / sigma if sigma else np.inf
    if b == 0:
        alpha = (1 - w) * np.sqrt(a)
        sigma = np.sqrt(1 - alpha**2)
        return alpha, sigma, -TABLE * np.sqrt(a), alpha * TABLE * np.sqrt(a) / sigma
    logit = lambda p: np.log(p / (1 - p))
    power, slope = 1 / (1 + np.exp(-(1 - w) * logit(a) - w * logit(b))), TABLE * (logit(b) - logit(a))
    alpha, sigma = np.sqrt(power), np.sqrt(1 - power)
    return alpha, sigma, alpha * sigma**2 * slope / 2, -sigma * alpha**2 * slope / 2


def point(name, alpha, sigma, da, ds):
    """(a, b) of y = a x0 + b eps."""
    n = np.sqrt(sigma**2 + alpha**2 / 4)
    return {
        "x0": (1, 0), "eps": (0, 1), "score": (0, -1 / sigma), "v": (-sigma, alpha), "flow": (da, ds),
        "straight": (-1, 1), "edm": (2 * sigma / n, -alpha / 2 / n),
    }[name]  # fmt: skip


class Loop:
    """One combination, drawn by the formulas from x with the noise z of each step."""

    def __init__(self, process, prediction, rows):
        self.times = np.append(rows[:, 0], rows[-1, 1]).astype(float)
        self.alpha, self.sigma, da, ds = np.array([coefficients(process, t) for t in self.times]).T
        asked = [values for values in zip(self.alpha, self.sigma, da, ds) if values[1] > 0]
        self.points = [point(prediction, *values) for values in asked]
        lines = [self._line(i) for i in range(len(asked))]
        self.slope, self.shift = (np.array(part, np.float32) for part in zip(*lines))
        self.largest = 1.0

    def _line(self, i):
        (a, b), alpha, sigma = self.points[i], self.alpha[i], self.sigma[i]
        total = alpha**2 * SPREAD + sigma**2
        slope = a * alpha * SPREAD / total + b * sigma / total
        return slope, a * MEAN - alpha * MEAN * slope

    def estimate(self, x, i):
        """(x0, eps) that the network says of x at time i."""
        (a, b), alpha, sigma = self.points[i], self.alpha[i], self.sigma[i]
        y = self.slope[i].astype(float) * x + self.shift[i]
        det = alpha * b - sigma * a
        self.largest = max(self.largest, np.abs(x).max())
        return (b * x - sigma * y) / det, (alpha * y - a * x) / det

    def clock(self, i):
        """lambda = log(alpha / sigma), infinite at both ends."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha[i]) - np.log(self.sigma[i])

    def draw(self, x, z, sampler, eta, variance):
        step = getattr(
            self, {"ddpm": "plain", "ddim": "plain", "euler": "plain", "dpmpp_2m_sde": "dpmpp_2m"}.get(sampler, sampler)
        )
        eta = {"ddpm": 1.0, "dpmpp_2m_sde": 1.0}.get(sampler, 0.0) if eta is None else eta
        variance = variance if sampler in ("ddpm", "euler") else "small"
        self.past, self.trail = [], None
        for i in range(len(self.times) - 1):
            x = step(x, i, z[i], eta, variance, sampler)
        return x

    def shares(self, i, eta, sampler):
        """r and tau: the share of the noise that is fresh."""
        r = self.alpha[i] * self.sigma[i + 1] / (self.alpha[i + 1] * self.sigma[i])
        return r, eta**2 * (1 - r**2) if sampler == "ddim" else 1 - r ** (2 * eta)

    def plain(self, x, i, z, eta, variance, sampler):
        (x0, eps), (r, tau), now, then = (
            self.estimate(x, i),
            self.shares(i, eta, sampler),
            self.sigma[i],
            self.sigma[i + 1],
        )
        of_eta = tau / (1 - r**2)
        posterior, added = then**2 * (1 - r**2), now**2 - (self.alpha[i] / self.alpha[i + 1]) ** 2 * then**2
        mixed = posterior ** ((1 - SECOND) / 2) * added ** ((1 + SECOND) / 2)
        published = {"small": posterior, "large": added, "learned": SECOND, "learned_range": mixed}[variance]
        return self.alpha[i + 1] * x0 + then * np.sqrt(1 - tau) * eps + np.sqrt(of_eta * published) * z * (then > 0)

    def exponential(self, x, i, x0, z, eta):
        """The exact step for a constant x0 (Lu et al. 2022b, eq. 9 and 14)."""
        keep, tau = self.sigma[i + 1] / self.sigma[i], self.shares(i, eta, "")[1]
        keep = keep * np.sqrt(1 - tau)
        return keep * x + (self.alpha[i + 1] - keep * self.alpha[i]) * x0 + self.sigma[i + 1] * np.sqrt(tau) * z

    def usable(self, i):
        """The past x0 that can be used in step i, with their u, the newest first."""
        h = self.clock(i + 1) - self.clock(i)
        if not np.isfinite(h):
            return []
        finite = itertools.takewhile(lambda one: np.isfinite(self.clock(one[0])), reversed(self.past))
        return [((self.clock(j) - self.clock(i)) / h, x0) for j, x0 in finite]

    def multistep(self, x, i, z, eta, order):
        x0, _ = self.estimate(x, i)
        refined = polynomial([(0.0, x0), *self.usable(i)[: order - 1]], (1 + eta) * (self.clock(i + 1) - self.clock(i)))
        self.past.append((i, x0))
        return self.exponential(x, i, refined, z, eta)

    def dpmpp_2m(self, x, i, z, eta, variance, sampler):
        return self.multistep(x, i, z, eta, 2)

    def dpmpp_3m(self, x, i, z, eta, variance, sampler):
        return self.multistep(x, i, z, eta, 3)

    def unipc(self, x, i, z, eta, variance, sampler):
        x0, _ = self.estimate(x, i)
        if self.trail and np.isfinite(h := self.clock(i) - self.clock(i - 1)):
            start, nodes = self.trail
            x = self.exponential(start, i - 1, polynomial([*nodes[:1], (1.0, x0), *nodes[1:]], h), 0, 0.0)
        nodes = [(0.0, x0), *self.usable(i)[:1]]
        self.trail = x, nodes
        self.past.append((i, x0))
        return self.exponential(x, i, polynomial(nodes, self.clock(i + 1) - self.clock(i)), 0, 0.0)

    def heun(self, x, i, z, eta, variance, sampler):
        x0, eps = self.estimate(x, i)
        end = self.alpha[i + 1] * x0 + self.sigma[i + 1] * eps
        if self.alpha[i] == 0 or self.sigma[i + 1] == 0:
            return end
        return self.along(x, i, (eps + self.estimate(end, i + 1)[1]) / 2)

    def along(self, x, i, slope):
        """A step of x / alpha, a line in sigma / alpha."""
        return self.alpha[i + 1] * (
            x / self.alpha[i] + (self.sigma[i + 1] / self.alpha[i + 1] - self.sigma[i] / self.alpha[i]) * slope
        )

    def ipndm(self, x, i, z, eta, variance, sampler):
        x0, eps = self.estimate(x, i)
        past = list(itertools.takewhile(lambda one: self.alpha[one[0]] > 0, reversed(self.past)))[:3]
        self.past.append((i, eps))
        if self.alpha[i] == 0:
            return self.alpha[i + 1] * x0 + self.sigma[i + 1] * eps
        weights = {
            0: [1],
            1: [3 / 2, -1 / 2],
            2: [23 / 12, -16 / 12, 5 / 12],
            3: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
        }[len(past)]
        return self.along(x, i, sum(w * e for w, e in zip(weights, [eps, *(e for _, e in past)])))


def polynomial(nodes, h):
    """The mean over u in [0, 1] of the polynomial through (u_i, x0_i), with weight e^(-(1 - u) h); of two nodes the
    published mean is that with weight 1 (Lu et al. 2022b, section 5; Zhao et al. 2023, section 3.4).
    """
    if len(nodes) == 1:
        return nodes[0][1]
    u, w = np.polynomial.legendre.leggauss(60)
    u, w = (u + 1) / 2, w * (1.0 if len(nodes) == 2 else np.exp(-(1 - (u + 1) / 2) * h))
    total = 0
    for i, (at, x0) in enumerate(nodes):
        base = np.prod([(u - other) / (at - other) for j, (other, _) in enumerate(nodes) if j != i], axis=0)
        total = total + np.sum(w * base) / np.sum(w) * x0
    return total


# The same by diffjax.


@struct.dataclass
class AnyProcess(Process):
    """One of the processes, by its number: traced."""

    number: Any
    all: tuple

    def alpha(self, t):
        return jax.lax.switch(
            self.number, [lambda t, one=one: one.alpha(t) * jnp.ones_like(t) for one in self.all], jnp.asarray(t)
        )

    def sigma(self, t):
        return jax.lax.switch(
            self.number, [lambda t, one=one: one.sigma(t) * jnp.ones_like(t) for one in self.all], jnp.asarray(t)
        )


@struct.dataclass
class AnyPrediction(Prediction):
    """One of the predictions, by its number: traced."""

    number: Any

    def point(self, process, t):
        return jax.lax.switch(
            self.number, [lambda t, one=one: one.point(process, t) for one in PREDICTIONS.values()], jnp.asarray(t)
        )


def network(params, x, t):
    """The line of the time that is nearest."""
    times, slope, shift = params
    i = jnp.argmin(jnp.abs(times - t[0]))
    return jnp.concatenate([slope[i] * x + shift[i], jnp.broadcast_to(SECOND, x.shape)], axis=-1)


def model(process, prediction, variance="small"):
    denoiser = Denoiser(PROCESSES[process], PREDICTIONS[prediction], None, network)
    return Model(denoiser, MEAN.shape, Defaults(deviation=VARIANCES[variance]))


def filled(values):
    values = np.asarray(values, np.float32)
    return np.concatenate([values, np.zeros((ROWS - len(values), *values.shape[1:]), np.float32)])


@functools.cache
def loop(process, prediction, grid, steps):
    """The formulas' loop on the grid of that name, or None where there is none."""
    try:
        return Loop(process, prediction, rows := model(process, prediction).recipe(grid=grid, steps=steps).grid), rows
    except UserError:
        return None


def run(combination, key):
    """(drawn, start, noise, loop)."""
    sampler, variance, prediction, process, grid, steps, eta = combination
    formulas, rows = loop(process, prediction, grid, steps)
    recipe = model(process, prediction, variance).recipe(sampler=sampler, grid=rows, eta=eta)
    number = lambda names, name: np.int32(list(names).index(name))
    any_process = AnyProcess(number(PROCESSES, process), tuple(PROCESSES.values()))
    params = (filled(formulas.times[: len(formulas.slope)]), filled(formulas.slope), filled(formulas.shift))
    denoiser = recipe.denoise.replace(
        process=any_process, prediction=AnyPrediction(number(PREDICTIONS, prediction)), params=params
    )
    x = np.float32(formulas.sigma[0]) * X
    recipe = recipe.replace(process=any_process, denoise=denoiser, grid=filled(rows))
    run = sample.Run(denoiser, any_process, recipe.sampler, keys(key))
    return np.asarray(sample.advance_part(start(run, x), recipe.grid, run).x), x, formulas


X = np.random.RandomState(0).standard_normal((2, 3)).astype(np.float32)
start = jax.jit(sample.start)


@functools.cache
def keys(seed):
    return jax.random.split(jax.random.key(seed), len(X))


@functools.cache
def noise(seed):
    return [np.asarray(unit_noise(fold(keys(seed), i), MEAN.shape)) for i in range(ROWS)]


def legal(prediction, process, grid, steps):
    """Whether there is such a grid, by what docs/ddpm.md says."""
    table, blind = process in ("discrete", "zero-terminal"), prediction in ("eps", "score")
    if grid in ("leading", "linspace", "trailing"):
        ends_in_noise = grid == "trailing" or (grid == "linspace" and steps > 1) or steps == TABLE
        return table and steps <= TABLE and not (process == "zero-terminal" and blind and ends_in_noise)
    return grid != "uniform" or not table or steps <= TABLE


def space():
    names = (build.SAMPLERS, VARIANCES, PREDICTIONS, PROCESSES, build.GRIDS, STEPS, ETAS)
    for combination in itertools.product(*names):
        if not (combination[0] in build.DETERMINISTIC and combination[-1]):
            yield combination


def checked(combinations):
    """(drawn, refused, the largest error) of combinations; each is as it must be."""
    drawn = refused = worst = 0
    for combination in combinations:
        sampler, variance, prediction, process, grid, steps, eta = combination
        if not legal(prediction, process, grid, steps):
            assert loop(process, prediction, grid, steps) is None, f"{combination} should be refused"
            refused += 1
            continue
        ours, x, formulas = run(combination, 0)
        formulas.largest = 1.0
        theirs = formulas.draw(x.astype(float), noise(0), sampler, eta, variance)
        assert np.isfinite(ours).all(), combination
        error = np.abs(ours - theirs).max() / max(formulas.largest, np.abs(theirs).max())
        assert error < 2e-5, f"{combination}: {error:.1e}"
        worst, drawn = max(worst, error), drawn + 1
        if eta == 0 or (eta is None and not build.SAMPLERS[sampler].eta):
            assert np.array_equal(ours, run(combination, 1)[0]), f"{combination} depends on the key"
    return drawn, refused, worst


@pytest.mark.parametrize(
    "samplers, number",
    [(("ddpm", "euler", "ddim", "dpmpp_2m"), 60), pytest.param(tuple(build.SAMPLERS), 1500, marks=pytest.mark.slow)],
)
def test_a_share_of_all_combinations(samplers, number):
    every = [one for one in space() if one[0] in samplers and (number > 60 or one[1] in ("small", "large"))]
    np.random.RandomState(1).shuffle(every)
    drawn, refused, worst = checked(every[:number])
    print(f"{drawn} combinations as the formulas have it, to {worst:.1e}; {refused} refused")


@pytest.mark.slow
def test_all_combinations(capsys):
    drawn, refused, worst = checked(space())
    with capsys.disabled():
        print(f"\n{drawn} combinations as the formulas have it, to {worst:.1e}; {refused} refused")
