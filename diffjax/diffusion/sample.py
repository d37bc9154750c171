"""Sampling: a chain of refinements, then one move, scanned over a grid of times.

    x_s = alpha_s x0 + sigma_s (r^eta eps + sqrt(1 - r^(2 eta)) z),    r = alpha_t sigma_s / (alpha_s sigma_t)

eta = 0 is DDIM (Euler for flows), eta = 1 the posterior of DDPM (Song et al. 2020, eq. 12, with eta as a power).
tau = 1 - r^(2 eta) is the share of fresh noise in the variance sigma_s^2.

Published DDPMs add noise of another deviation than sigma_s sqrt(tau): `large`, `learned`, `learned_range`. At eta = 1
these are as published. At any other eta they are multiplied by sqrt(tau / (1 - r^2)), so that eta = 0 adds no noise.
They belong to the plain steps of DDPM only (`is_ancestral`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffjax.diffusion.grid import Grid
from diffjax.diffusion.guide import Denoise, Scale
from diffjax.diffusion.predict import Estimate, is_blind
from diffjax.diffusion.process import Images, Keys, Process, Time, fold, image_keys, root, unit_noise
from diffjax.diffusion.refine import Chain, Refine, Step
from diffjax.utils import struct
from diffjax.utils.errors import UserError

Law = Callable[[Time, Scale], tuple[Array, Array]]
"""(r, eta) -> (the factor of eps, tau), with factor^2 + tau = 1. Each is computed by itself, since 1 minus the other
loses digits in float32 where r is near 0 or 1.
"""

Deviation = Callable[[Process, Estimate, Time, Time, Array], Array]
"""(process, estimate, t, s, tau) -> the deviation of the noise in x_s."""

Noise = Float[Array, "steps b ..."]


def power_law(r: Time, eta: Scale) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """r^eta and tau = 1 - r^(2 eta); 0^0 = 1."""
    safe, still = jnp.where(r > 0, r, 1.0), jnp.asarray(eta) == 0
    tau = jnp.where(r > 0, -jnp.expm1(2 * eta * jnp.log(safe)), jnp.where(still, 0.0, 1.0))
    return jnp.where(r > 0, safe**eta, jnp.where(still, 1.0, 0.0)), tau


def ddim_law(r: Time, eta: Scale) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """sqrt(1 - eta^2 + eta^2 r^2) and tau = eta^2 (1 - r^2) (Song et al. 2020, eq. 16)."""
    eta2 = jnp.asarray(eta) ** 2
    return root(1 - eta2 + eta2 * r**2), eta2 * (1 - r**2)


def ratio(process: Process, t: Time, s: Time) -> Time:
    """r = alpha_t sigma_s / (alpha_s sigma_t), from 1 (no step) to 0 (from pure noise, or to the image)."""
    return process.alpha(t) * process.sigma(s) / (process.alpha(s) * process.sigma(t))


def small(process: Process, est: Estimate, t: Time, s: Time, tau: Array) -> Array:
    """The move's own deviation, sigma_s sqrt(tau): the posterior's (`fixed_small`) at eta = 1."""
    return process.sigma(s) * root(tau)


def large(process: Process, est: Estimate, t: Time, s: Time, tau: Array) -> Array:
    """sigma_t sqrt(tau), and 0 at sigma_s = 0: at eta = 1 sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2), the noise
    that the process adds from s to t (`fixed_large`; Ho et al. 2020, section 3.2).
    """
    return process.sigma(t) * root(tau) * (process.sigma(s) > 0)


def learned(process: Process, est: Estimate, t: Time, s: Time, tau: Array) -> Array:
    """sqrt(v), where v is the second half of the network's output (0 where that is negative), and 0 at sigma_s = 0.

    v is the variance itself, not its logarithm, as diffusers reads it.
    """
    fresh = 1 - ratio(process, t, s) ** 2
    return root(_second_half(est)) * root(tau / jnp.where(fresh > 0, fresh, 1)) * (process.sigma(s) > 0)


def learned_range(process: Process, est: Estimate, t: Time, s: Time, tau: Array) -> Array:
    """sigma_t^share sigma_s^(1 - share) sqrt(tau), and 0 at sigma_s = 0: `small` and `large` mixed in their logarithms
    (Nichol and Dhariwal 2021, eq. 15). The second half of the network's output is 2 share - 1: -1 small, 1 large.
    """
    share, there = (_second_half(est) + 1) / 2, process.sigma(s) > 0
    return process.sigma(t) ** share * jnp.where(there, process.sigma(s), 1) ** (1 - share) * root(tau) * there


def _second_half(est: Estimate) -> Images:
    if est.variance is None:
        raise UserError("this network learns no variance: its output has the channels of x; take another deviation")
    return est.variance


@struct.dataclass
class Sampler:
    """A refinement, the amount of noise eta, the law by which eta acts, and the deviation of the noise."""

    refine: Refine = Chain(())
    eta: Scale = 0.0
    law: Law = struct.field(pytree_node=False, default=power_law)
    deviation: Deviation = struct.field(pytree_node=False, default=small)


DDIM = Sampler()
"""The plain move with eta = 0: DDIM, and Euler for flows."""


def is_ancestral(sampler: Sampler) -> bool:
    """Whether it takes the plain steps of DDPM, to which a publisher's deviation belongs. DDIM and the stochastic
    multistep solvers have one of their own.
    """
    return sampler.law is power_law and sampler.refine == Chain(())


@struct.dataclass
class Run:
    """What all steps of a run share: the denoiser (or guide), the sampler, and each image's conditioning and key.

    `cond` is what `denoise` reads; None where it reads none.
    """

    denoise: Denoise
    process: Process
    sampler: Sampler
    keys: Keys
    cond: Any = None


@struct.dataclass
class State:
    """A run between two steps: x, the last estimate of x0 (a preview), the state of the refinement, how many steps are
    done, and the memory of the guide.
    """

    x: Images
    x0: Images
    memory: Any
    index: Int[Array, ""]
    past: Any = ()


def start(run: Run, x: Images) -> State:
    """The state before the first step, from x at the grid's first time."""
    init = getattr(run.denoise, "init", None)
    return State(x, x, run.sampler.refine.init(x), jnp.zeros((), jnp.int32), init(x) if init else ())


def move(process: Process, est: Estimate, t: Time, s: Time, sampler: Sampler, z: Images) -> Images:
    """x_s from the estimate at t and unit noise z."""
    kept, tau = sampler.law(ratio(process, t, s), sampler.eta)
    noise = sampler.deviation(process, est, t, s, tau)
    return process.alpha(s) * est.x0 + process.sigma(s) * kept * est.eps + noise * z


def step(state: State, row: Float[Array, "2"], run: Run, z: Images | None = None) -> State:
    """One step t -> s of the grid. Its noise is z or, without z, drawn from the keys with the step's number."""
    sampler, keys = run.sampler, fold(run.keys, state.index)
    cond = run.cond | {"past": state.past} if jax.tree.leaves(state.past) else run.cond
    denoise = lambda x, t: run.denoise(x, t, cond)
    at = sampler.refine.before(Step(state.x, row[0], row[1], run.process, denoise, keys, sampler.eta))
    memory, est, _ = sampler.refine.update(state.memory, denoise(at.x, at.t), at)
    z = unit_noise(keys, at.x.shape[1:], at.x.dtype) if z is None else z
    return State(move(run.process, est, at.t, at.s, sampler, z), est.x0, memory, state.index + 1, est.memory)


@jax.jit
def advance(state: State, grid: Grid, run: Run, noise: Noise | None = None) -> State:
    """The state after the steps of `grid`, in one `lax.scan`; `noise` replays a run, row i for step i.

    Compiled once per shape: prompts, seeds, guidance, eta, grids and parameters are traced.
    """
    body = lambda state, rows: (step(state, rows[0], run, rows[1]), None)
    return jax.lax.scan(body, state, (jnp.asarray(grid, state.x.dtype), noise))[0]


@jax.jit
def advance_part(state: State, grid: Grid, run: Run) -> State:
    """`advance` for a grid that ends in rows of (0, 0), which are left out: one program for every number of steps up to
    the length of the grid.

    The loop's length is traced, so it has no reverse derivative.
    """
    grid = jnp.asarray(grid, state.x.dtype)
    return jax.lax.fori_loop(0, jnp.sum(grid[:, 0] > 0), lambda i, state: step(state, grid[i], run), state)


def solve(
    denoise: Denoise, x: Images, grid: Grid, sampler: Sampler, keys: Keys, cond: Any = None, noise: Noise | None = None
) -> Images:
    """x at the grid's last time, from x at its first. `noise` as in `advance`."""
    run = Run(denoise, denoise.process, sampler, keys, cond)
    return advance(start(run, x), grid, run, noise).x


START = np.uint32(0xFFFFFFFF)
"""The number folded into an image's key for the noise that it starts from; steps fold in 0, 1, 2, ..."""


def start_noise(keys: Keys, shape: tuple[int, ...], dtype: Any = float) -> Images:
    """The standard normal noise that each image starts from."""
    return unit_noise(fold(keys, START), shape, dtype)


def draw(
    denoise: Denoise, key: Key[Array, ""], shape: tuple[int, ...], grid: Grid, sampler: Sampler = DDIM, cond: Any = None
) -> Images:
    """Samples of `shape` (b, ...): x at the grid's last time, from sigma(t0) z at its first time t0.

    Sample number i has the key `fold_in(key, i)`, from which its z and the noise of its steps are drawn.

    Raises `UserError` for a denoiser whose prediction says nothing of x0 at t0 (eps at alpha = 0).
    """
    _check_start(denoise, grid[0, 0])
    keys = image_keys(key, jnp.arange(shape[0]))
    x = denoise.process.sigma(jnp.float32(grid[0, 0])) * start_noise(keys, shape[1:])
    return solve(denoise, x, grid, sampler, keys, cond)


def _check_start(denoise: Denoise, t: Time) -> None:
    prediction = getattr(denoise, "prediction", None)
    if prediction is not None and is_blind(prediction, denoise.process, t):
        raise UserError(
            f"the grid begins at t = {float(t):g}, pure noise, of which {type(prediction).__name__} prediction makes "
            "no picture: begin below 1, as grid.uniform(steps, start) does"
        )
