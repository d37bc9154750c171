"""Training losses: one squared error, a weight per log-SNR, and where the times come from.

    loss = w(t) |dx0|^2 = w(t) (sigma / det)^2 |y - target|^2

The right-hand side is what is computed: it is finite at both ends. Weights are weights of the x0 error, so that one
serves every prediction (Kingma and Gao 2023, "Understanding Diffusion Objectives", section 3).

A weight is made by a call, such as `plain()` or `min_snr(gamma=5.0)`, and is itself a function `(denoiser, t) -> w`.
So is a distribution of times, such as `uniform()`: a function `(process, u) -> t` of uniform numbers u in (0, 1).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffjax.diffusion.denoise import Cond, Denoiser
from diffjax.diffusion.predict import determinant, target
from diffjax.diffusion.process import Images, Process, Time, image_keys, perturb, unit_noise

Weight = Callable[[Denoiser, Time], Time]
Times = Callable[[Any, Float[Array, " b"]], Float[Array, " b"]]
"""(process, u) -> t; those of a table read its `steps`."""


def weighted_error(
    denoiser: Denoiser, x0: Images, eps: Images, t: Float[Array, " b"], cond: Cond, weight: Weight
) -> Float[Array, " b"]:
    """The loss of every image at the given noise and times: the weighted squared error, a mean over its pixels."""
    y = denoiser.network(perturb(denoiser.process, x0, eps, t), t, cond)
    error = y - target(denoiser.prediction, denoiser.process, x0, eps, t)
    return weight(denoiser, t) * jnp.mean(jnp.square(error), axis=tuple(range(1, x0.ndim)))


def drawn_error(
    denoiser: Denoiser, key: Key[Array, ""], x0: Images, weight: Weight, times: Times, cond: Cond = None
) -> Float[Array, " b"]:
    """`weighted_error` at noise and `antithetic` times that are drawn from the key: its mean is the training loss."""
    time_key, noise_key = jax.random.split(key)
    rows = jnp.arange(len(x0))
    t = times(denoiser.process, antithetic(time_key, rows, len(x0)))
    eps = unit_noise(image_keys(noise_key, rows), x0.shape[1:], x0.dtype)
    return weighted_error(denoiser, x0, eps, t, cond, weight)


def _of_x0(weight: Callable[[Process, Time], Time]) -> Weight:
    """A weight of |dx0|^2 as the weight of |dy|^2."""
    det = lambda denoiser, t: determinant(denoiser.prediction, denoiser.process, t)
    return lambda of, t: weight(of.process, t) * jnp.square(of.process.sigma(t) / det(of, t))


def plain() -> Weight:
    """|y - target|^2, unweighted: the simple loss of DDPM for eps (Ho et al. 2020, eq. 14), flow matching for the
    velocity.
    """
    return lambda denoiser, t: jnp.ones_like(t)


def x0_weight() -> Weight:
    """|dx0|^2, unweighted."""
    return _of_x0(lambda process, t: jnp.ones_like(t))


def velocity(floor: float = 0.0) -> Weight:
    """|dv|^2 of `Flow` with v = (x_t - x0) / sigma: w = 1 / max(sigma, floor)^2 (Li and He 2025, "Back to Basics",
    section 3).
    """
    return _of_x0(lambda process, t: 1 / jnp.square(jnp.maximum(process.sigma(t), floor)))


def min_snr(gamma: float = 5.0) -> Weight:
    """w = min(SNR, gamma) (Hang et al. 2023, eq. 7)."""
    return _of_x0(lambda process, t: jnp.minimum(jnp.exp(process.logsnr(t)), gamma))


def sigmoid(bias: float = -3.0) -> Weight:
    """w = SNR sigmoid(bias - logSNR), that is sigmoid(bias - logSNR) on |deps|^2 (Hoogeboom et al. 2024, SiD2, eq. 7).

    Written as exp(bias) sigmoid(logSNR - bias), which is the same and finite where the SNR is not.
    """
    return _of_x0(lambda process, t: jnp.exp(bias) * jax.nn.sigmoid(process.logsnr(t) - bias))


def edm(sigma_data: float = 0.5) -> Weight:
    """w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with sigma / alpha for sigma: |dF|^2 (Karras et al. 2022,
    eq. 8).
    """
    return _of_x0(lambda process, t: jnp.exp(process.logsnr(t)) + 1 / sigma_data**2)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weight:
    """w = SNR / (k + SNR)^gamma, that is (k + SNR)^-gamma on |deps|^2 (Choi et al. 2022, eq. 8)."""
    return _of_x0(lambda process, t: jnp.exp(process.logsnr(t)) / (k + jnp.exp(process.logsnr(t))) ** gamma)


def independent(key: Key[Array, ""], rows: Int[Array, " b"], batch: int) -> Float[Array, " b"]:
    """One uniform number in (0, 1) for each of the `rows` of a batch: row i draws from `fold_in(key, i)`."""
    return jax.vmap(lambda key: jax.random.uniform(key, minval=1e-6))(image_keys(key, rows))


def antithetic(key: Key[Array, ""], rows: Int[Array, " b"], batch: int) -> Float[Array, " b"]:
    """(u + i / batch) mod 1 for row i: one draw u, spread evenly over the batch (Kingma et al. 2021, appendix I.1)."""
    u = (jax.random.uniform(key) + rows / batch) % 1
    return jnp.clip(u, 1e-6, 1 - 1e-6)


def uniform() -> Times:
    """t = u."""
    return lambda process, u: u


def table() -> Times:
    """t = (k + 1) / T: every step k of a `Discrete` table is as likely (Ho et al. 2020, algorithm 1)."""
    return lambda process, u: (jnp.floor(u * process.steps) + 1) / process.steps


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """t = sigmoid(mean + std z), z normal (Esser et al. 2024, eq. 19); a mean above 0 favours noisy images."""
    return lambda process, u: jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))


def lognormal_sigma(mean: float = -1.2, std: float = 1.2) -> Times:
    """log(sigma / alpha) = mean + std z, z normal (Karras et al. 2022, table 1)."""
    return lambda process, u: jnp.asarray(process.inverse(-2 * (mean + std * jax.scipy.special.ndtri(u))))
