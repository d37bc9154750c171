"""Orders of convergence: every solver on every process, on a Gaussian and on a mixture whose probability flow is known.

    python scripts/convergence.py          prints the table (a minute on 2 cores) and draws docs/convergence.png

Times run from 0.99 to 0.01, x starts on the exact solution and is compared with it at the end, in float64. The suite
asserts what `measure` returns. `Heun` along the flow is measured on a table whose log-SNR is linear in t: between the
entries of any other, the interpolated log-SNR has corners in t, which bound its error from below by a number of order
1 / T.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from diffjax.diffusion import grid, process, refine, sample
from diffjax.diffusion.analytic import Mixture

START, MIDDLE, STOP = 0.99, 0.5, 0.01


class Solver(NamedTuple):
    """A refinement, its order, the order that its own start-up allows, the clock that its grids are even in, and
    step counts.
    """

    refine: refine.Refine
    order: int
    own: int
    clock: str
    steps: tuple[int, int]
    evaluations: int = 1
    history: int = 0


SOLVERS = {
    "ddim": Solver(refine.chain(), 1, 1, "logsnr", (400, 800)),
    "heun eps": Solver(refine.heun("eps"), 2, 2, "power", (2000, 4000), evaluations=2),
    "heun flow": Solver(refine.heun("flow"), 2, 2, "time", (2450, 4900), evaluations=2),
    "extrapolate 2": Solver(refine.extrapolate(2), 2, 2, "logsnr", (1500, 3000), history=1),
    "extrapolate 3": Solver(refine.extrapolate(3), 3, 2, "logsnr", (200, 400), history=2),
    "unipc 2": Solver(refine.unipc(2), 3, 3, "logsnr", (250, 500), history=2),
    "unipc 3": Solver(refine.unipc(3), 4, 3, "logsnr", (200, 400), history=3),
    "adams 4": Solver(refine.adams(4), 4, 2, "power", (300, 600), history=3),
}


PROCESSES = {
    "flow": process.Flow(),
    "cosine": process.Cosine(),
    "exploding": process.Exploding(0.01, 50.0),
    "discrete": process.discrete(process.linear_betas()),
}
EVEN = process.Discrete(1 / (1 + np.exp(np.linspace(-9, 9, 100))))

MEANS = {"gaussian": [[0.3, -0.5], [0.3, -0.5]], "mixture": [[1.0, 0.4], [-0.7, -0.6]]}
VARIANCES = {"gaussian": [[1.0, 0.09], [1.0, 0.09]], "mixture": [[0.3, 0.1], [0.15, 0.2]]}
NOISE = np.array([[0.6, -0.4], [-1.1, 0.8], [1.3, 0.2]])


def process_for(name: str, solver: Solver) -> process.Process:
    """The process of that name, or its table that is smooth in t for the solver whose clock is t."""
    return EVEN if name == "discrete" and solver.clock == "time" else PROCESSES[name]


def problem(name: str, proc: process.Process) -> Mixture:
    """An anisotropic Gaussian (as a mixture of two equal ones: the same shapes) or a mixture of two."""
    return Mixture(proc, jnp.asarray([0.4, 0.0]), jnp.asarray(MEANS[name]), jnp.asarray(VARIANCES[name]))


def times(proc: process.Process, clock: str, steps: int, begin: float) -> np.ndarray:
    """Times from `begin` to STOP on a grid smooth in a clock: "time", "logsnr", or "power", (sigma / alpha)^(1/7).

    The steps of the last two grow along the grid by 0.6 to 1.4 of their mean: formulas that hold for equal steps only,
    and errors that cancel by symmetry, would show.
    """
    u = np.linspace(0, 1, steps + 1)
    if clock == "time":
        return begin + (STOP - begin) * u
    u = u - 0.4 * u * (1 - u)
    logsnr = np.asarray(proc.logsnr(jnp.asarray([begin, STOP])))
    if clock == "logsnr":
        values = logsnr[0] + (logsnr[1] - logsnr[0]) * u
    else:
        rho = np.exp(-logsnr / 14)
        values = -14 * np.log(rho[0] + (rho[1] - rho[0]) * u)
    return np.concatenate([[begin], np.asarray(proc.inverse(jnp.asarray(values[1:-1]))), [STOP]])


def exact(mixture: Mixture, x: np.ndarray, ts: np.ndarray, tolerance: float = 1e-13) -> np.ndarray:
    """The probability flow at ts from x at ts[0]: dz / d log(rho) = rho eps for z = x / alpha, rho = sigma / alpha.

    In these variables the processes are one; NumPy and SciPy only, nothing of the code under test but alpha and sigma.
    """
    alpha, sigma = (np.asarray(f(jnp.asarray(ts))) for f in (mixture.process.alpha, mixture.process.sigma))
    log_rho, z = np.log(sigma / alpha), [x / alpha[0]]
    for begin, end in itertools.pairwise(log_rho):
        solution = solve_ivp(_slope, (begin, end), z[-1].ravel(), "DOP853", rtol=tolerance, atol=1e-14, args=(mixture,))
        z.append(solution.y[:, -1].reshape(x.shape))
    return alpha[:, None, None] * np.stack(z)


def _slope(log_rho: float, z: np.ndarray, mixture: Mixture) -> np.ndarray:
    logits, means, variances = (np.asarray(leaf) for leaf in (mixture.logits, mixture.means, mixture.variances))
    total = variances + np.exp(2 * log_rho)
    centred = z.reshape(-1, 1, z.size // len(NOISE)) - means
    log_p = logits - 0.5 * np.sum(centred**2 / total + np.log(total), axis=-1)
    weight = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.exp(2 * log_rho) * np.sum(weight[..., None] * centred / total, axis=1).ravel()


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    """Rows that do nothing appended, so that one compilation serves every number of steps."""
    return np.concatenate([rows, np.zeros((length - len(rows), 2))])


def start(mixture: Mixture, solver: Solver, xs: np.ndarray, rows: np.ndarray, length: int) -> sample.State:
    """The state before step len(xs) - 1 as it would be had every earlier step been exact: x and all that the solver
    remembers.
    """
    run = run_of(mixture, solver)
    state = sample.start(run, jnp.asarray(xs[0]))
    for x, x_next, row in zip(xs[:-1], xs[1:], rows):
        state = sample.advance_part(state.replace(x=jnp.asarray(x)), _pad(row[None], length), run)
        if isinstance(state.memory, refine.Trail):
            state = state.replace(memory=state.memory.replace(x=jnp.asarray(x)))
        state = state.replace(x=jnp.asarray(x_next))
    return state


def run_of(mixture: Mixture, solver: Solver) -> sample.Run:
    """The solver on the mixture; its keys are not used."""
    keys = jax.random.split(jax.random.key(0), len(NOISE))
    return sample.Run(mixture, mixture.process, sample.Sampler(solver.refine), keys)


def ends(mixture: Mixture, solver: Solver, steps: int, begin: float) -> np.ndarray:
    """x at STOP: with exact history, from the solver's own start-up, and exactly; (3, images, dimensions)."""
    ts, length = times(mixture.process, solver.clock, steps, begin), max(solver.steps)
    scale = np.sqrt(np.asarray(mixture.process.alpha(begin) ** 2 + mixture.process.sigma(begin) ** 2))
    xs = exact(mixture, scale * NOISE, np.append(ts[: solver.history + 1], STOP))
    rows, run = grid.pairs(ts), run_of(mixture, solver)
    seeded = start(mixture, solver, xs[:-1], rows, length)
    with_history = sample.advance_part(seeded, _pad(rows[solver.history :], length), run).x
    own = sample.advance_part(sample.start(run, jnp.asarray(xs[0])), _pad(rows, length), run).x
    return np.stack([with_history, own, xs[-1]])


class Measured(NamedTuple):
    """Orders between the two step counts, with exact history and from the own start-up, and the last errors of both.

    `startup`: the order of what the own start-up adds, from MIDDLE, where x0 changes fast; from START it adds next
    to nothing.
    """

    order: float
    own: float
    startup: float
    error: float
    own_error: float


def measure(mixture: Mixture, solver: Solver) -> Measured:
    """The solver's orders on a problem."""
    rms = lambda end, a, b: float(np.sqrt(np.mean((end[a] - end[b]) ** 2)))
    order = lambda pair, a, b: float(
        np.log2(rms(pair[0], a, b) / rms(pair[1], a, b)) / np.log2(solver.steps[1] / solver.steps[0])
    )
    pair = [ends(mixture, solver, steps, START) for steps in solver.steps]
    middle = [ends(mixture, solver, steps, MIDDLE) for steps in solver.steps] if solver.history else None
    startup = order(middle, 0, 1) if solver.history else np.nan
    return Measured(order(pair, 0, 2), order(pair, 1, 2), startup, rms(pair[1], 0, 2), rms(pair[1], 1, 2))


COUNTS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


def curve(mixture: Mixture, solver: Solver) -> tuple[list[int], list[float]]:
    """Evaluations of the network and errors, from the solver's own start-up."""
    errors = []
    for steps in COUNTS:
        _, own, true = ends(mixture, solver, steps, START)
        errors.append(float(np.sqrt(np.mean((own - true) ** 2))))
    return [steps * solver.evaluations for steps in COUNTS], errors


def draw(curves: dict[str, dict[str, tuple[list[int], list[float]]]], path: Path) -> None:
    """Error against evaluations, one panel a problem, with the slopes 1 to 4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(10, 4.4), sharey=True, layout="constrained")
    for axis, (name, lines) in zip(axes, curves.items()):
        for (label, (evaluations, errors)), marker in zip(lines.items(), "o^v<>sDP"):
            axis.loglog(evaluations, errors, marker=marker, markersize=4, linewidth=1.2, label=label)
        for order in range(1, 5):
            corner = np.array([300, 750])
            axis.loglog(corner, 10.0 ** (-1.2 - 1.7 * order) * (corner / 300.0) ** -order, color="0.6", linewidth=1)
            axis.annotate(str(order), (780, 10.0 ** (-1.2 - 1.7 * order) * 2.6**-order), color="0.4", va="center")
        axis.set(title=f"{name}, flow process", xlabel="network evaluations")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("RMS error of the probability flow")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def main() -> None:
    """Print the table and draw the picture."""
    from rich.progress import track

    print(
        f"{'solver':14} {'process':10} {'problem':9} {'order':>6} {'measured':>9} {'own':>6} {'start-up':>9} "
        f"{'allows':>7} {'error':>8}"
    )
    for name, solver in track(SOLVERS.items(), "orders", transient=True):
        for proc in PROCESSES:
            for data in MEANS:
                m = measure(problem(data, process_for(proc, solver)), solver)
                print(
                    f"{name:14} {proc:10} {data:9} {solver.order:6} {m.order:9.2f} {m.own:6.2f} {m.startup:9.2f} "
                    f"{solver.own:7} {m.own_error:8.0e}"
                )
    lines = {data: {name: curve(problem(data, PROCESSES["flow"]), s) for name, s in SOLVERS.items()} for data in MEANS}
    draw(lines, Path(__file__).parent.parent / "docs" / "convergence.png")


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
