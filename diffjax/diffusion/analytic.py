"""Distributions whose denoiser is known in closed form: what solvers, guides and likelihoods are certified against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffjax.diffusion.predict import Estimate
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

    def __call__(self, x: Float[Array, "b d"], t: Time, cond: object = None) -> Estimate:
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
