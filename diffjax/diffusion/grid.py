"""Time grids: arrays of (t, s) pairs, shape (steps, 2), one step a row, from noise to image.

A grid is the only truth about which time comes next. Grids are made on the host; only their length is static. The
integers of a table of T steps stand at t = (k + 1) / T; each is visited once, so a grid of a table has at most T steps.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffjax.diffusion.process import Discrete, Process
from diffjax.utils.errors import UserError

Grid = Float[np.ndarray, "steps 2"]


def pairs(times: Float[np.ndarray, " steps+1"]) -> Grid:
    """The steps between consecutive times."""
    times = np.asarray(times, np.float64)
    return np.stack([times[:-1], times[1:]], axis=1)


def uniform(steps: int, start: float = 1.0, stop: float = 0.0) -> Grid:
    """Equal steps of t."""
    return pairs(np.linspace(start, stop, steps + 1))


def leading(steps: int, table: int = 1000, offset: int = 0) -> Grid:
    """The integers 0, T // N, 2 (T // N), ... of a table of T steps, then t = 0 (Song et al. 2020; Lin et al. 2024,
    table 2).

    Raises `UserError` where `offset`, which is added to each, leads past the table's end.
    """
    if leading_end(steps, table, offset) >= table:
        raise UserError(
            f"{steps} steps with an offset of {offset} lead past the end of the model's table of {table}: "
            f"take {most_leading(steps, table, offset)} steps, or the trailing grid"
        )
    return _integers(np.arange(steps)[::-1] * (table // steps) + offset, table)


def leading_end(steps: int, table: int, offset: int) -> int:
    """The largest integer of `leading`."""
    return (steps - 1) * (table // steps) + offset


def most_leading(steps: int, table: int, offset: int) -> int:
    """The most steps, up to `steps`, that `leading` can make with this offset."""
    return next(n for n in range(min(steps, table), 0, -1) if leading_end(n, table, offset) < table)


def linspace(steps: int, table: int = 1000) -> Grid:
    """N integers from T - 1 to 0, evenly spaced and rounded, then t = 0 (Lin et al. 2024, table 2)."""
    return _integers(np.round(np.linspace(0, table - 1, steps))[::-1], table)


def trailing(steps: int, table: int = 1000) -> Grid:
    """T - 1, T - 1 - T / N, ..., rounded, then t = 0 (Lin et al. 2024, table 2)."""
    return _integers(np.round(np.arange(table, 0, -table / steps)[:steps]) - 1, table)


def spaced(spacing: str, steps: int, table: int, offset: int = 0) -> Grid:
    """The grid of that name among the three of a table; `offset` is `leading`'s."""
    return (
        leading(steps, table, offset)
        if spacing == "leading"
        else {"linspace": linspace, "trailing": trailing}[spacing](steps, table)
    )


def _integers(k: np.ndarray, table: int) -> Grid:
    if len(k) > table:
        raise UserError(
            f"{len(k)} steps are more than the model's table has: take at most {table}, or the grid logsnr or karras"
        )
    return pairs(np.append((k + 1) / table, 0.0))


def check(grid: Grid, process: Process) -> None:
    """Raises `UserError` for what is no grid of a process: times in (0, 1] that fall from row to row, each row from
    where the one before ends, and none before the first entry of a table, where its network was not trained. The last
    row may stand still, as one published grid does.
    """
    rows = np.asarray(grid)
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
        raise UserError(
            f"a grid is an array of (t, s) pairs, one row a step, and this one has the shape {rows.shape}: see grid.pairs"
        )
    falls = (
        np.all(rows[:-1, 0] > rows[:-1, 1]) and np.all(rows[1:, 0] == rows[:-1, 1]) and 0 <= rows[-1, 1] <= rows[-1, 0]
    )
    if not (falls and 0 < rows[-1, 0] and rows[0, 0] <= 1):
        raise UserError(
            f"the times of a grid fall from at most 1 to at least 0, each row from where the last one ends; not so: {_shown(rows)}"
        )
    if isinstance(process, Discrete) and rows[-1, 0] * process.steps < 1 - 1e-3:
        raise UserError(
            f"this grid of {len(rows)} steps asks the network at t = {rows[-1, 0]:g}, before the first of its table of "
            f"{process.steps} steps, where it was not trained: take fewer steps, or the grid logsnr or karras"
        )


def _shown(rows: Grid) -> str:
    return ", ".join(f"({t:g}, {s:g})" for t, s in rows[:4]) + (", ..." if len(rows) > 4 else "")


def karras(process: Process, steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Grid:
    """sigma^(1/rho) evenly spaced from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5).

    sigma is the process's sigma / alpha. rho = 1 is even in sigma, a large rho even in its logarithm.
    """
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return _of_logsnr(process, -2 * np.log(ramp))


def logsnr(process: Process, steps: int, start: float, stop: float) -> Grid:
    """Log-SNR evenly spaced between the times `start` and `stop`, then t = 0 (Lu et al. 2022, section 3.4)."""
    ends = np.asarray(process.logsnr(jnp.asarray([start, stop])), np.float64)
    return _of_logsnr(process, np.linspace(*ends, steps))


def _of_logsnr(process: Process, values: np.ndarray) -> Grid:
    return pairs(np.append(np.asarray(process.inverse(jnp.asarray(values)), np.float64), 0.0))


def after(grid: Grid, strength: float) -> Grid:
    """The steps from number int(N - N strength) on, where image-to-image starts (Meng et al. 2021, SDEdit): at least
    one, rounded as the pipelines of Stable Diffusion 3 and Flux do.
    """
    return grid[int(len(grid) - len(grid) * strength) :]
