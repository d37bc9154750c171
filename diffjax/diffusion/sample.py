"""Sampling: a chain of refinements, then one move, scanned over a grid of times.

    x_s = alpha_s x0 + sigma_s (r^eta eps + sqrt(1 - r^(2 eta)) z),    r = alpha_t sigma_s / (alpha_s sigma_t)

eta = 0 is DDIM (Euler for flows), eta = 1 the posterior of DDPM (Song et al. 2020, eq. 12, with the law of eta below).
A publisher's variance replaces the deviation of z in the steps of DDPM (`is_ancestral`). Every deviation is, at
eta = 1, the published one, and otherwise sqrt(tau / (1 - r^2)) times it, with tau the share of fresh noise: at eta = 0
there is none.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffjax.diffusion.guide import Denoise, Scale
from diffjax.diffusion.predict import Estimate
from diffjax.diffusion.process import Process, Time, root
from diffjax.diffusion.refine import Chain, Refine
from diffjax.utils import struct

Law = Callable[[Array, Scale], tuple[Array, Array]]
"""(r, eta) -> (the factor of eps, tau, the share of fresh noise in the variance): factor^2 + tau = 1, each without the
cancellation that 1 minus the other has in float32 where r is near 0 or 1."""

Deviation = Callable[[Process, Estimate, Time, Time, Array], Array]


def power_law(r: Float[Array, ""], eta: Scale) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """r^eta and tau = 1 - r^(2 eta); 0^0 = 1."""
    safe, still = jnp.where(r > 0, r, 1.0), jnp.asarray(eta) == 0
    tau = jnp.where(r > 0, -jnp.expm1(2 * eta * jnp.log(safe)), jnp.where(still, 0.0, 1.0))
    return jnp.where(r > 0, safe**eta, jnp.where(still, 1.0, 0.0)), tau


def ddim_law(r: Float[Array, ""], eta: Scale) -> tuple[Float[Array, ""], Float[Array, ""]]:
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
    """sqrt(v), v the network's second half (0 where it is negative), and 0 at sigma_s = 0; v is the variance itself,
    not its logarithm, as diffusers reads it.
    """
    fresh = 1 - ratio(process, t, s) ** 2
    return root(est.variance) * root(tau / jnp.where(fresh > 0, fresh, 1)) * (process.sigma(s) > 0)


def learned_range(process: Process, est: Estimate, t: Time, s: Time, tau: Array) -> Array:
    """The logarithms of `small` and `large` mixed by the network's second half, -1 small, 1 large (Nichol and Dhariwal
    2021, eq. 15): sigma_t^share sigma_s^(1 - share) sqrt(tau), and 0 at sigma_s = 0.
    """
    share, there = (est.variance + 1) / 2, process.sigma(s) > 0
    return process.sigma(t) ** share * jnp.where(there, process.sigma(s), 1) ** (1 - share) * root(tau) * there


@struct.dataclass
class Sampler:
    """A refinement with the amount of noise, its law, and its deviation."""

    refine: Refine = Chain(())
    eta: Scale = 0.0
    law: Law = struct.field(pytree_node=False, default=power_law)
    deviation: Deviation = struct.field(pytree_node=False, default=small)


def is_ancestral(sampler: Sampler) -> bool:
    """Whether it takes the plain steps of DDPM, to which a publisher's variance belongs; DDIM and the stochastic
    multistep solvers have a variance of their own, eta times the posterior's.
    """
    return sampler.law is power_law and sampler.refine == Chain(())


@struct.dataclass
class State:
    """A run between two steps: the image, the last estimate of x0 (a preview), what the refinement remembers, steps
    done, and what the guide remembers.
    """

    x: Float[Array, "b ..."]
    x0: Float[Array, "b ..."]
    memory: Any
    index: Int[Array, ""]
    past: Any = ()


def start(sampler: Sampler, x: Float[Array, "b ..."], denoise: Denoise | None = None) -> State:
    """The state before the first step, from x at the grid's first time; a guide `denoise` may have a memory of
    its own.
    """
    past = denoise.init(x) if hasattr(denoise, "init") else ()
    return State(x, x, sampler.refine.init(x), jnp.zeros((), jnp.int32), past)


def move(
    process: Process, est: Estimate, t: Time, s: Time, sampler: Sampler, z: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """x_s from the estimate at t and unit noise z."""
    kept, tau = sampler.law(ratio(process, t, s), sampler.eta)
    noise = sampler.deviation(process, est, t, s, tau)
    return process.alpha(s) * est.x0 + process.sigma(s) * kept * est.eps + noise * z


def normal(keys: Key[Array, " b"], index: Int[Array, ""], shape: tuple[int, ...], dtype: Any) -> Float[Array, "b ..."]:
    """Unit noise of step `index`, each image from its own key, so that an image never depends on its neighbours."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape, dtype))(keys)


def step(
    state: State,
    row: Float[Array, "2"],
    z: Array | None,
    denoise: Denoise,
    process: Process,
    sampler: Sampler,
    cond: Any,
    keys: Array,
) -> State:
    """One step t -> s of the grid."""
    t, s = row[0], row[1]
    inner = jax.vmap(lambda key: jax.random.fold_in(key, state.index))(keys)
    x, t = sampler.refine.before(state.x, t, process, inner)
    told = cond | {"past": state.past} if jax.tree.leaves(state.past) else cond
    evaluate = lambda x, t: denoise(x, t, told)
    memory, est, _ = sampler.refine.update(
        state.memory, evaluate(x, t), x, t, s, process=process, denoise=evaluate, key=inner, eta=sampler.eta
    )
    z = normal(keys, state.index, x.shape[1:], x.dtype) if z is None else z
    return State(move(process, est, t, s, sampler, z), est.x0, memory, state.index + 1, est.memory)


def advance(
    state: State,
    grid: Float[Array, "steps 2"],
    noise: Float[Array, "steps b ..."] | None,
    denoise: Denoise,
    process: Process,
    sampler: Sampler,
    cond: Any,
    keys: Key[Array, " b"],
) -> State:
    """The state after the steps of `grid`, one `lax.scan`.

    keys: one per image; `noise` in their place replays a run, row i for step i.
    """
    grid = jnp.asarray(grid, state.x.dtype)

    def body(state: State, rows: tuple[Array, Array | None]) -> tuple[State, None]:
        return step(state, rows[0], rows[1], denoise, process, sampler, cond, keys), None

    return jax.lax.scan(body, state, (grid, noise))[0]


def advance_part(
    state: State,
    grid: Float[Array, "steps 2"],
    denoise: Denoise,
    process: Process,
    sampler: Sampler,
    cond: Any,
    keys: Key[Array, " b"],
) -> State:
    """`advance` for a grid that ends in rows of (0, 0), which are left out: one program for any number of steps.

    The loop's length is traced, so it has no reverse derivative.
    """
    grid = jnp.asarray(grid, state.x.dtype)
    body = lambda i, state: step(state, grid[i], None, denoise, process, sampler, cond, keys)
    return jax.lax.fori_loop(0, jnp.sum(grid[:, 0] > 0), body, state)


run = jax.jit(advance)
"""`advance`, compiled once per shape: prompts, seeds, guidance, eta, grids and parameters are traced."""

run_part = jax.jit(advance_part)
"""`advance_part`, compiled once for every number of steps up to the length of the grid."""


def sample(
    denoise: Denoise,
    process: Process,
    x: Float[Array, "b ..."],
    grid: Float[Array, "steps 2"],
    sampler: Sampler,
    keys: Key[Array, " b"],
    cond: Any = None,
    noise: Float[Array, "steps b ..."] | None = None,
) -> Float[Array, "b ..."]:
    """x at the grid's last time from x at its first, in one compiled scan."""
    return run(start(sampler, x, denoise), grid, noise, denoise, process, sampler, {} if cond is None else cond, keys).x
