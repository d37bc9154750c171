"""Time grids: arrays of (t, s) pairs, shape (steps, 2), one step a row, from noise to image.

A grid alone says which time comes next. Grids are made on the host; only their length is static. The steps of a table,
k = 0 ... T - 1, stand at t = (k + 1) / T. Each is visited once, so a grid of them has at most T rows.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffjax.diffusion.process import Discrete, Process
from diffjax.utils.errors import UserError

HostGrid = Float[np.ndarray, "steps 2"]
Grid = HostGrid | Float[Array, "steps 2"]


def pairs(times: Float[np.ndarray, " steps+1"]) -> HostGrid:
    """The steps between consecutive times."""
    times = np.asarray(times, np.float64)
    return np.stack([times[:-1], times[1:]], axis=1)


def uniform(steps: int, start: float = 1.0, stop: float = 0.0) -> HostGrid:
    """Equal steps of t."""
    return pairs(np.linspace(start, stop, steps + 1))


def leading(steps: int, table: int = 1000, offset: int = 0) -> HostGrid:
    """N steps k = 0, T // N, 2 (T // N), ... of a table, from the largest down, then t = 0 (Song et al. 2020; Lin et
    al. 2024, table 2).

    `offset` is added to each k. Raises `UserError` where that leads past the table's end.
    """
    if _largest(steps, table, offset) >= table:
        raise UserError(
            f"{steps} steps with an offset of {offset} lead past the end of the model's table of {table}: "
            f"take {most_leading(steps, table, offset)} steps, or the trailing grid"
        )
    return _integers(np.arange(steps)[::-1] * (table // steps) + offset, table)


def _largest(steps: int, table: int, offset: int) -> int:
    """The largest k of `leading`."""
    return (steps - 1) * (table // steps) + offset


def most_leading(steps: int, table: int, offset: int) -> int:
    """The largest number of steps, up to `steps`, that `leading` can make with this offset."""
    return next(n for n in range(min(steps, table), 0, -1) if _largest(n, table, offset) < table)


def linspace(steps: int, table: int = 1000) -> HostGrid:
    """N steps k from T - 1 to 0, evenly spaced and rounded, then t = 0 (Lin et al. 2024, table 2)."""
    return _integers(np.round(np.linspace(0, table - 1, steps))[::-1], table)


def trailing(steps: int, table: int = 1000) -> HostGrid:
    """N steps k = T - 1, T - 1 - T / N, ..., rounded, then t = 0 (Lin et al. 2024, table 2)."""
    return _integers(np.round(np.arange(table, 0, -table / steps)[:steps]) - 1, table)


def _integers(k: np.ndarray, table: int) -> HostGrid:
    if len(k) > table:
        raise UserError(f"{len(k)} steps exceed the model's table: take at most {table}, or the grid logsnr or karras")
    return pairs(np.append((k + 1) / table, 0.0))


def check(grid: Grid, process: Process) -> None:
    """Raises `UserError` for an array that is no grid, and for one that asks the network of a table before its first
    step, where it was not trained.

    The times of a grid lie in [0, 1] and fall from row to row, and each row begins where the one before ends. Only the
    last row may stand still, as one published grid does.
    """
    rows = np.asarray(grid)
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
        raise UserError(f"a grid is an array of (t, s) pairs, not of the shape {rows.shape}: see grid.pairs")
    (t, s), shown = rows.T, ", ".join(f"({t:g}, {s:g})" for t, s in rows[:4])
    falls = np.all(t[:-1] > s[:-1]) and np.all(t[1:] == s[:-1]) and 0 <= s[-1] <= t[-1] and 0 < t[-1] and t[0] <= 1
    if not falls:
        rule = "the times of a grid fall from at most 1 to at least 0, each row from where the last one ends"
        raise UserError(f"{rule}; not so: {shown}{', ...' if len(rows) > 4 else ''}")
    if isinstance(process, Discrete) and t[-1] * process.steps < 1 - 1e-3:
        raise UserError(
            f"this grid of {len(rows)} steps asks the network at t = {t[-1]:g}, before the first of its table of "
            f"{process.steps} steps, where it was not trained: take fewer steps, or the grid logsnr or karras"
        )


def karras(process: Process, steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> HostGrid:
    """sigma^(1/rho) evenly spaced from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5).

    sigma is the process's sigma / alpha. rho = 1 is even in sigma, a large rho even in its logarithm.
    """
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return _of_logsnr(process, -2 * np.log(ramp))


def logsnr(process: Process, steps: int, start: float, stop: float) -> HostGrid:
    """Log-SNR evenly spaced between the times `start` and `stop`, then t = 0 (Lu et al. 2022, section 3.4)."""
    ends = np.asarray(process.logsnr(jnp.asarray([start, stop])), np.float64)
    return _of_logsnr(process, np.linspace(ends[0], ends[1], steps))


def _of_logsnr(process: Process, values: np.ndarray) -> HostGrid:
    return pairs(np.append(np.asarray(process.inverse(jnp.asarray(values)), np.float64), 0.0))


def after(grid: Grid, strength: float) -> Grid:
    """The steps from number int(N - N strength) on, where image-to-image starts (Meng et al. 2021, SDEdit): at least
    one, rounded as the pipelines of Stable Diffusion 3 and Flux do.
    """
    return grid[int(len(grid) - len(grid) * strength) :]
