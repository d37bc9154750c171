"""The probability flow (Song et al. 2021, section 4.3): images to noise, and the log-likelihood of an image.

With z = x / alpha and rho = sigma / alpha it is the same equation for every process:

    dz / drho = eps,     log p(z_min) = log p(z_max) + integral of div eps over rho from rho_min to rho_max

Grids are those of sampling, noise to image, over times [t_min, t_max] at which neither alpha nor sigma is 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffjax.diffusion.grid import Grid
from diffjax.diffusion.guide import Denoise
from diffjax.diffusion.process import Images, Keys, Process, fold
from diffjax.diffusion.refine import Refine
from diffjax.diffusion.sample import DDIM, Sampler, solve
from diffjax.utils import struct
from diffjax.utils.errors import UserError


def backwards(process: Process, grid: Grid) -> Grid:
    """The steps of a grid from its last time to its first; `UserError` when it touches alpha = 0 or sigma = 0."""
    with jax.ensure_compile_time_eval():
        ends = np.asarray(process.logsnr(jnp.asarray([grid[-1, 1], grid[0, 0]])))
    if not np.isfinite(ends).all():
        raise UserError(
            f"the probability flow cannot run from t = {grid[-1, 1]:g} to {grid[0, 0]:g}: "
            "let the grid start and end where neither alpha nor sigma is 0, for instance at 0.999 and 0.001"
        )
    return grid[::-1, ::-1]


def invert(denoise: Denoise, x0: Images, grid: Grid, refine: Refine = DDIM.refine, cond: Any = None) -> Images:
    """x at the grid's first time, t_max, from which the same solver on the same grid draws x0 again.

    The image is taken for x at t_min: x = alpha(t_min) x0. That is off the flow from t = 0 by order (sigma / alpha)^2
    for a smooth density. Drawing from the result gives alpha(t_min) x0, up to the solver's error.
    """
    keys = jax.random.split(jax.random.key(0), len(x0))
    rows = backwards(denoise.process, grid)
    return solve(denoise, denoise.process.alpha(rows[0, 0]) * x0, rows, Sampler(refine), keys, cond)


@struct.dataclass
class Trace:
    """The exact divergence: one Jacobian-vector product a dimension."""

    def __call__(self, f: Callable[[Images], Images], z: Images) -> tuple[Images, Float[Array, " b"]]:
        """f(z) and div f, one number an image."""
        value, jvp = jax.linearize(f, z)

        def entry(i: Array) -> Array:
            along = jnp.broadcast_to(jnp.zeros(z[0].size, z.dtype).at[i].set(1).reshape(z.shape[1:]), z.shape)
            return jvp(along).reshape(len(z), -1)[:, i]

        return value, jnp.sum(jax.lax.map(entry, jnp.arange(z[0].size)), axis=0)


EXACT = Trace()


@struct.dataclass
class Hutchinson:
    """An unbiased estimate of the divergence: the mean of v . J v over `probes` vectors v of random signs, the same
    ones at all times (Grathwohl et al. 2019, section 3.1).

    Each image draws its v from its own key. The variance is the sum over i < j of (J_ij + J_ji)^2 / probes.
    """

    keys: Keys
    probes: int = struct.field(pytree_node=False, default=1)

    def __call__(self, f: Callable[[Images], Images], z: Images) -> tuple[Images, Float[Array, " b"]]:
        """f(z) and the estimate of div f, one number an image."""
        value, jvp = jax.linearize(f, z)

        def probe(i: Array) -> Array:
            signs = jax.vmap(lambda key: jax.random.rademacher(key, z.shape[1:], z.dtype))(fold(self.keys, i))
            return jnp.sum((signs * jvp(signs)).reshape(len(z), -1), axis=1)

        return value, jnp.mean(jax.lax.map(probe, jnp.arange(self.probes)), axis=0)


Divergence = Trace | Hutchinson
Variance = Float[Array, "..."] | float


def log_likelihood(
    denoise: Denoise, x0: Images, grid: Grid, variance: Variance, divergence: Divergence = EXACT, cond: Any = None
) -> Float[Array, " b"]:
    """log p(x0) in nats by Runge-Kutta of order 4 in log(rho), four evaluations a step.

    Besides the error of the steps there are two truncations. At t_min the density is that of x0 with noise of deviation
    rho_min added, which differs by rho_min^2 / 2 (laplacian p) / p. At t_max the prior of z is taken to be
    N(0, rho_max^2 + variance), with the data's `variance` (a number, or one per dimension): an error of order
    mean / rho_max and (deviation / rho_max)^3. Images of 256 levels have a density only after uniform noise of one
    level's width has been added. Raises `UserError` as `backwards` does.
    """
    return _integrate(denoise, x0, backwards(denoise.process, grid), variance, divergence, cond)


RUNGE_KUTTA = np.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]])
"""One row a stage: the share of the step at which it is evaluated, and its weight."""


@jax.jit
def _integrate(
    denoise: Denoise, x0: Images, rows: Grid, variance: Variance, divergence: Divergence, cond: Any
) -> Array:
    process = denoise.process
    log_rho = jnp.asarray(-process.logsnr(jnp.asarray(rows, x0.dtype)) / 2)

    def rate(z: Array, at: Array) -> tuple[Array, Array]:
        t = process.inverse(-2 * at)
        eps, div = divergence(lambda z: denoise(process.alpha(t) * z, t, cond).eps, z)
        return jnp.exp(at) * eps, jnp.exp(at) * div

    def step(carry: tuple[Array, Array], ends: Array) -> tuple[tuple[Array, Array], None]:
        (z, _), h = carry, ends[1] - ends[0]

        def stage(carry: tuple[Array, Array, Array], row: Array) -> tuple[tuple[Array, Array, Array], None]:
            slope, end, total = carry
            slope, div = rate(z + row[0] * h * slope, ends[0] + row[0] * h)
            return (slope, end + row[1] * h * slope, total + row[1] * h * div), None

        return jax.lax.scan(stage, (jnp.zeros_like(z), *carry), jnp.asarray(RUNGE_KUTTA, z.dtype))[0][1:], None

    (z, total), _ = jax.lax.scan(step, (x0, jnp.zeros(len(x0), x0.dtype)), log_rho)
    spread = jnp.exp(2 * log_rho[-1, 1]) + variance
    return total - 0.5 * jnp.sum((z**2 / spread + jnp.log(2 * jnp.pi * spread)).reshape(len(z), -1), axis=1)


def bits_per_dim(log_p: Float[Array, " b"], dims: int, levels: int = 256) -> Float[Array, " b"]:
    """-log2 P / dims of images in [-1, 1] of so many `levels`: a level is 2 / levels wide, so that
    log P = log p + dims log(2 / levels).
    """
    return -(log_p / dims + jnp.log(2 / levels)) / jnp.log(2)
