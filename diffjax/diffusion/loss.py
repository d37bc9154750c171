"""Training losses: one squared error, a weight per log-SNR, and where the times come from.

    loss = w(t) |dx0|^2 = w(t) (sigma / det)^2 |y - target|^2

The right-hand side is what is computed: it is finite at both ends. Weights are weights of the x0 error, so that one
function serves every prediction (Kingma and Gao 2023, "Understanding Diffusion Objectives", section 3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffjax.diffusion.denoise import Cond, Denoiser
from diffjax.diffusion.predict import determinant, target
from diffjax.diffusion.process import Process, Time, perturb

Weight = Callable[[Denoiser, Time], Time]


def loss(
    denoiser: Denoiser,
    x0: Float[Array, "b ..."],
    eps: Float[Array, "b ..."],
    t: Float[Array, " b"],
    cond: Cond,
    weight: Weight,
) -> Float[Array, " b"]:
    """The weighted squared error of every image, a mean over its pixels."""
    y = denoiser.network(perturb(denoiser.process, x0, eps, t), t, cond)
    error = y - target(denoiser.prediction, denoiser.process, x0, eps, t)
    return weight(denoiser, t) * jnp.mean(jnp.square(error), axis=tuple(range(1, x0.ndim)))


def _of_x0(weight: Callable[[Process, Time], Time]) -> Callable[[Denoiser, Time], Time]:
    """A weight of |dx0|^2 as the weight of |dy|^2."""

    def of_y(denoiser: Denoiser, t: Time) -> Time:
        det = determinant(denoiser.prediction, denoiser.process, t)
        return weight(denoiser.process, t) * jnp.square(denoiser.process.sigma(t) / det)

    return of_y


def plain(denoiser: Denoiser, t: Time) -> Time:
    """|y - target|^2, unweighted: the simple loss of DDPM for eps (Ho et al. 2020, eq. 14), flow matching for the
    velocity.
    """
    return jnp.ones_like(t)


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
    """One uniform number in (0, 1) per image: row i of the batch of `batch` images draws with `fold_in(key, i)`."""
    draw = lambda row: jax.random.uniform(jax.random.fold_in(key, row), minval=1e-6)
    return jax.vmap(draw)(rows)


def antithetic(key: Key[Array, ""], rows: Int[Array, " b"], batch: int) -> Float[Array, " b"]:
    """u_i = (u + i / batch) mod 1: one draw, spread evenly over the batch (Kingma et al. 2021, appendix I.1)."""
    u = (jax.random.uniform(key) + rows / batch) % 1
    return jnp.clip(u, 1e-6, 1 - 1e-6)


Times = Callable[[Process, Float[Array, " b"]], Float[Array, " b"]]


def uniform(process: Process, u: Float[Array, " b"]) -> Float[Array, " b"]:
    """t = u."""
    return u


def table(process: Process, u: Float[Array, " b"]) -> Float[Array, " b"]:
    """t = (k + 1) / T: every step k of a `Discrete` table as likely (Ho et al. 2020, algorithm 1)."""
    return (jnp.floor(u * process.steps) + 1) / process.steps


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """t = sigmoid(mean + std z), z normal (Esser et al. 2024, eq. 19); a mean above 0 favours noisy images."""
    return lambda process, u: jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))


def lognormal_sigma(mean: float = -1.2, std: float = 1.2) -> Times:
    """log(sigma / alpha) = mean + std z, z normal (Karras et al. 2022, table 1)."""
    return lambda process, u: process.inverse(-2 * (mean + std * jax.scipy.special.ndtri(u)))
