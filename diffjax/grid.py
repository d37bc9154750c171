"""Time grids: arrays of (t, s) pairs, shape (steps, 2), one step a row, from noise to image.

A grid is the only truth about which time comes next. Grids are made on the host; only their length is static.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffjax.process import Process

Grid = Float[np.ndarray, "steps 2"]


def pairs(times: Float[np.ndarray, "steps+1"]) -> Grid:
    """The steps between consecutive times."""
    times = np.asarray(times, np.float64)
    return np.stack([times[:-1], times[1:]], axis=1)


def uniform(steps: int, start: float = 1.0, stop: float = 0.0) -> Grid:
    """Equal steps of t."""
    return pairs(np.linspace(start, stop, steps + 1))


def leading(steps: int, table: int = 1000, offset: int = 0) -> Grid:
    """The integers 0, T // N, 2 (T // N), ... of a table of T steps, then t = 0 (Song et al. 2020; Lin et al. 2024, table 2)."""
    return _integers(np.arange(steps)[::-1] * (table // steps) + offset, table)


def linspace(steps: int, table: int = 1000) -> Grid:
    """N integers from T - 1 to 0, evenly spaced and rounded, then t = 0 (Lin et al. 2024, table 2)."""
    return _integers(np.round(np.linspace(0, table - 1, steps))[::-1], table)


def trailing(steps: int, table: int = 1000) -> Grid:
    """T - 1, T - 1 - T / N, ..., rounded, then t = 0 (Lin et al. 2024, table 2)."""
    return _integers(np.round(np.arange(table, 0, -table / steps)[:steps]) - 1, table)


def _integers(k: np.ndarray, table: int) -> Grid:
    return pairs(np.append((k + 1) / table, 0.0))


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
    """The last `strength` of the steps: image-to-image starts there (Meng et al. 2021, SDEdit)."""
    return grid[len(grid) - max(1, round(strength * len(grid))) :]
