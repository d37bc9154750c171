"""Orders of convergence: every solver on every process, on a Gaussian and on a mixture whose probability flow is known.

    python scripts/convergence.py          prints the table (2 minutes on 2 cores) and draws docs/convergence.png

Times run from 0.99 to 0.01, x starts on the exact solution and is compared with it at the end, in float64. The suite asserts
what `measure` returns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp

from diffjax import grid, process, refine, sample
from diffjax.analytic import Mixture, flow_map

START, STOP = 0.99, 0.01


class Solver(NamedTuple):
    """A refinement, its order, the order that its own start-up allows, the clock that its grids are even in, and step counts."""

    refine: refine.Refine
    order: int
    own: int
    clock: str
    steps: tuple[int, int]
    evaluations: int = 1
    history: int = 0


SOLVERS = {
    "ddim": Solver(refine.chain(), 1, 1, "logsnr", (400, 800)),
    "heun eps": Solver(refine.heun("eps"), 2, 2, "power", (1000, 2000), evaluations=2),
    "heun flow": Solver(refine.heun("flow"), 2, 2, "time", (1000, 2000), evaluations=2),
    "extrapolate 2": Solver(refine.extrapolate(2), 2, 2, "logsnr", (1500, 3000), history=1),
    "extrapolate 3": Solver(refine.extrapolate(3), 3, 2, "logsnr", (300, 600), history=2),
    "unipc 2": Solver(refine.unipc(2), 3, 3, "logsnr", (200, 400), history=2),
    "unipc 3": Solver(refine.unipc(3), 4, 3, "logsnr", (100, 200), history=3),
    "adams 4": Solver(refine.adams(4), 4, 2, "power", (200, 400), history=3),
}


def even_table(steps: int = 100) -> process.Discrete:
    """A table whose log-SNR is linear in t, so that interpolation between its entries is smooth in t."""
    return process.Discrete(1 / (1 + np.exp(np.linspace(-9, 9, steps))))


PROCESSES = {
    "flow": process.Flow(),
    "cosine": process.Cosine(),
    "exploding": process.Exploding(0.01, 50.0),
    "discrete": process.discrete(process.linear_betas()),
}

MEANS = {"gaussian": [[0.3, -0.5], [0.3, -0.5]], "mixture": [[1.0, 0.4], [-0.7, -0.6]]}
VARIANCES = {"gaussian": [[1.0, 0.09], [1.0, 0.09]], "mixture": [[0.3, 0.1], [0.15, 0.2]]}
UNIT = np.array([[0.6, -0.4], [-1.1, 0.8], [1.3, 0.2]])


def problem(name: str, proc: process.Process) -> Mixture:
    """An anisotropic Gaussian (as a mixture of two equal ones: the same shapes) or a mixture of two."""
    return Mixture(proc, jnp.asarray([0.4, 0.0]), jnp.asarray(MEANS[name]), jnp.asarray(VARIANCES[name]))


def times(proc: process.Process, clock: str, steps: int) -> np.ndarray:
    """Times from START to STOP, even in a clock: "time", "logsnr", or "power", (sigma / alpha)^(1/7)."""
    u = np.linspace(0, 1, steps + 1)
    u = u + 0.4 * u * (1 - u)
    if clock == "time":
        return START + (STOP - START) * u
    logsnr = np.asarray(proc.logsnr(jnp.asarray([START, STOP])))
    if clock == "logsnr":
        values = logsnr[0] + (logsnr[1] - logsnr[0]) * u
    else:
        rho = np.exp(-logsnr / 14)
        values = -14 * np.log(rho[0] + (rho[1] - rho[0]) * u)
    return np.concatenate([[START], np.asarray(proc.inverse(jnp.asarray(values[1:-1]))), [STOP]])


def exact(mixture: Mixture, x: np.ndarray, ts: np.ndarray, tolerance: float = 1e-13) -> np.ndarray:
    """The probability flow at ts from x at ts[0]: dz / d log(rho) = rho eps for z = x / alpha, rho = sigma / alpha.

    In these variables the processes are one; NumPy and SciPy only, nothing of the code under test but alpha and sigma.
    """
    alpha, sigma = (np.asarray(f(jnp.asarray(ts))) for f in (mixture.process.alpha, mixture.process.sigma))
    log_rho, z = np.log(sigma / alpha), [x / alpha[0]]
    for begin, end in zip(log_rho[:-1], log_rho[1:]):
        solution = solve_ivp(_slope, (begin, end), z[-1].ravel(), "DOP853", rtol=tolerance, atol=1e-14, args=(mixture,))
        z.append(solution.y[:, -1].reshape(x.shape))
    return alpha[:, None, None] * np.stack(z)


def _slope(log_rho: float, z: np.ndarray, mixture: Mixture) -> np.ndarray:
    logits, means, variances = (np.asarray(leaf) for leaf in (mixture.logits, mixture.means, mixture.variances))
    total = variances + np.exp(2 * log_rho)
    centred = z.reshape(-1, 1, z.size // len(UNIT)) - means
    log_p = logits - 0.5 * np.sum(centred**2 / total + np.log(total), axis=-1)
    weight = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.exp(2 * log_rho) * np.sum(weight[..., None] * centred / total, axis=1).ravel()


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    """Rows that do nothing appended, so that one compilation serves every number of steps."""
    return np.concatenate([rows, np.zeros((length - len(rows), 2))])


def start(mixture: Mixture, solver: Solver, xs: np.ndarray, rows: np.ndarray, length: int) -> sample.State:
    """The state before step len(xs) - 1 as it would be had every earlier step been exact: x and all that the solver remembers."""
    sampler = sample.Sampler(solver.refine)
    state = sample.start(sampler, jnp.asarray(xs[0]))
    for x, x_next, row in zip(xs[:-1], xs[1:], rows):
        state = advance(state.replace(x=jnp.asarray(x)), _pad(row[None], length), mixture, sampler)
        if isinstance(state.memory, refine.Trail):
            state = state.replace(memory=state.memory.replace(x=jnp.asarray(x)))
        state = state.replace(x=jnp.asarray(x_next))
    return state


def advance(state: sample.State, rows: np.ndarray, mixture: Mixture, sampler: sample.Sampler) -> sample.State:
    keys = jax.random.split(jax.random.key(0), len(UNIT))
    return sample.run(state, rows, None, mixture, mixture.process, sampler, {}, keys)


def ends(mixture: Mixture, solver: Solver, steps: int, length: int) -> np.ndarray:
    """x at STOP: with exact history, from the solver's own start-up, and exactly; (3, images, dimensions)."""
    ts = times(mixture.process, solver.clock, steps)
    scale = np.sqrt(np.asarray(mixture.process.alpha(START) ** 2 + mixture.process.sigma(START) ** 2))
    xs = exact(mixture, scale * UNIT, np.append(ts[: solver.history + 1], STOP))
    rows, sampler = grid.pairs(ts), sample.Sampler(solver.refine)
    seeded = start(mixture, solver, xs[:-1], rows, length)
    with_history = advance(seeded, _pad(rows[solver.history :], length), mixture, sampler).x
    own = advance(sample.start(sampler, jnp.asarray(xs[0])), _pad(rows, length), mixture, sampler).x
    return np.stack([with_history, own, xs[-1]])


class Measured(NamedTuple):
    """Orders between the two step counts: with exact history, from the own start-up, of what the start-up adds; last errors."""

    order: float
    own: float
    startup: float
    error: float
    own_error: float


def measure(mixture: Mixture, solver: Solver) -> Measured:
    """The solver's orders on a problem."""
    coarse, fine = (ends(mixture, solver, steps, max(solver.steps)) for steps in solver.steps)
    rms = lambda end, a, b: float(np.sqrt(np.mean((end[a] - end[b]) ** 2)))
    order = lambda a, b: float(np.log(rms(coarse, a, b) / rms(fine, a, b)) / np.log(solver.steps[1] / solver.steps[0]))
    return Measured(order(0, 2), order(1, 2), order(0, 1) if solver.history else np.inf, rms(fine, 0, 2), rms(fine, 1, 2))
