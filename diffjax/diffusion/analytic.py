"""Distributions whose denoiser is known in closed form: what solvers, guides and likelihoods are certified against, and
the Gaussian of a data set, the best linear denoiser.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffjax.diffusion.predict import X0, Estimate
from diffjax.diffusion.process import Process, Time, expand
from diffjax.utils import struct


@struct.dataclass
class Mixture:
    """sum_k w_k N(mean_k, diag(variance_k)): its marginals, exact denoiser and score; one component is a Gaussian.

    At time t component k is N(alpha mean_k, alpha^2 variance_k + sigma^2); the responsibilities weigh the components'
    posterior means `mean_k + alpha variance_k / (alpha^2 variance_k + sigma^2) (x_t - alpha mean_k)`.
    """

    process: Process
    logits: Float[Array, " k"]
    means: Float[Array, "k d"]
    variances: Float[Array, "k d"]

    def _posterior(self, x: Float[Array, "b d"], t: Time) -> tuple[Array, Array, Array, Array]:
        alpha, sigma = expand(self.process.alpha(t), x[:, None]), expand(self.process.sigma(t), x[:, None])
        total = alpha**2 * self.variances + sigma**2
        centred = x[:, None] - alpha * self.means
        log_p = jax.nn.log_softmax(self.logits) - 0.5 * jnp.sum(
            centred**2 / total + jnp.log(2 * jnp.pi * total), axis=-1
        )
        return alpha, total, centred, log_p

    def log_prob(self, x: Float[Array, "b d"], t: Time) -> Float[Array, " b"]:
        """log p_t(x)."""
        return jax.nn.logsumexp(self._posterior(x, t)[-1], axis=-1)

    def __call__(self, x: Float[Array, "b d"], t: Time, cond: Any = None) -> Estimate:
        """E[x0 | x_t] and E[eps | x_t]; `cond["logits"]`, (b, k), replaces the mixture's weights: a
        class-conditional model.
        """
        alpha, total, centred, log_p = self._posterior(x, t)
        if cond:
            log_p = log_p - jax.nn.log_softmax(self.logits) + jax.nn.log_softmax(cond["logits"])
        weight = jax.nn.softmax(log_p, axis=-1)[..., None]
        sigma = expand(self.process.sigma(t), x[:, None])
        x0 = jnp.sum(weight * (self.means + alpha * self.variances / total * centred), axis=1)
        return Estimate(x0, jnp.sum(weight * sigma / total * centred, axis=1))


def gaussian(process: Process, mean: Float[Array, " d"], variance: Float[Array, " d"]) -> Mixture:
    """The mixture of one component, N(mean, diag(variance))."""
    return Mixture(process, jnp.zeros(1), mean[None], variance[None])


def flow_map(gauss: Mixture, x: Float[Array, "b d"], t: Time, s: Time) -> Float[Array, "b d"]:
    """The exact probability-flow solution of a Gaussian: each coordinate scales by the ratio of its deviations."""
    deviation = lambda t: jnp.sqrt(gauss.process.alpha(t) ** 2 * gauss.variances[0] + gauss.process.sigma(t) ** 2)
    mean = gauss.means[0]
    return gauss.process.alpha(s) * mean + deviation(s) / deviation(t) * (x - gauss.process.alpha(t) * mean)


@struct.dataclass
class Wiener:
    """The best linear denoiser of a data set, exact for the Gaussian of its mean and covariance S = U diag(L) U^T:

        x0 = mean + W (x_t - alpha mean) / alpha,    W = U diag(L / (L + 1 / SNR)) U^T

    (Wiener 1949). `basis` holds the columns of U that belong to the k variances `L` other than 0.
    """

    process: Process
    mean: Float[Array, "h w c"]
    basis: Float[Array, "d k"]
    variances: Float[Array, " k"]
    prediction = X0()

    def __call__(self, x: Float[Array, "b h w c"], t: Time, cond: Any = None) -> Estimate:
        """The pair (x0, eps) at x_t."""
        t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        centred = x - alpha * self.mean
        along = jnp.dot(centred.reshape(len(x), -1), self.basis, precision="highest")
        back = lambda rows: jnp.dot(rows, self.basis.T, precision="highest").reshape(x.shape)
        a, s = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        total = a**2 * self.variances + s**2
        eps = (centred - back(a**2 * self.variances / total * along)) / sigma
        return Estimate(self.mean + back(a * self.variances / total * along), eps)

    def filter(self, logsnr: Float[Array, ""]) -> Float[Array, "d d"]:
        """W, the filter of pixels and channels."""
        kept = self.variances / (self.variances + jnp.exp(-logsnr))
        return jnp.dot(self.basis * kept, self.basis.T, precision="highest")


def wiener(process: Process, images: Float[np.ndarray, "n h w c"]) -> Wiener:
    """`Wiener` of the mean and the covariance of images, in float64 from their singular values."""
    rows = np.asarray(images, np.float64).reshape(len(images), -1)
    mean = rows.mean(0)
    rows = (rows - mean) / len(rows) ** 0.5
    if len(rows) < rows.shape[1]:
        variances, left = np.linalg.eigh(rows @ rows.T)
        kept = variances > 1e-10 * variances[-1]
        basis = rows.T @ (left[:, kept] / np.sqrt(variances[kept]))
    else:
        variances, basis = np.linalg.eigh(rows.T @ rows)
        kept = variances > 1e-10 * variances[-1]
        basis = basis[:, kept]
    arrays = (mean.reshape(images.shape[1:]), basis, variances[kept])
    return Wiener(process, *(jnp.asarray(array, jnp.float32) for array in arrays))
