"""What a network predicts: a point (a, b) of the (x0, eps) plane, `y = a x0 + b eps`.

With `x_t = alpha x0 + sigma eps` and `det = alpha b - sigma a`, both unknowns follow from the two equations:

    x0  = (b x_t - sigma y) / det
    eps = (alpha y - a x_t) / det

and errors of one are errors of the other: `|dy|^2 = (det / sigma)^2 |dx0|^2`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from diffjax.diffusion.process import Images, Process, Time, expand
from diffjax.utils import struct


class Estimate(NamedTuple):
    """What a denoiser returns: the pair, so that nothing is divided by sigma afterwards.

    `variance` is the second half of the output of a network that predicts the variance of an ancestral step too
    (`sample.learned`, `sample.learned_range`). A guide adds `branches`, the estimates that it combined, the conditional
    one first, and `memory`, what it reads at the next step.
    """

    x0: Images
    eps: Images
    variance: Images | None = None
    branches: tuple["Estimate", ...] = ()
    memory: Any = ()


class Prediction:
    """A point of the plane: `point(process, t) -> (a, b)`."""

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        """(a, b) of y = a x0 + b eps at time t."""
        raise TypeError(f"{type(self).__name__} defines no point")


@struct.dataclass
class X0(Prediction):
    """y = x0."""

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        return jnp.ones_like(process.sigma(t)), jnp.zeros_like(process.sigma(t))


@struct.dataclass
class Eps(Prediction):
    """y = eps (Ho et al. 2020)."""

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        return jnp.zeros_like(process.sigma(t)), jnp.ones_like(process.sigma(t))


@struct.dataclass
class Score(Prediction):
    """y = grad log p(x_t) = -eps / sigma (Song et al. 2021)."""

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        return jnp.zeros_like(process.sigma(t)), -1 / process.sigma(t)


@struct.dataclass
class V(Prediction):
    """y = alpha eps - sigma x0 (Salimans and Ho 2022)."""

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        return -process.sigma(t), process.alpha(t)


@struct.dataclass
class Velocity(Prediction):
    """y = dx_t/dt = alpha' x0 + sigma' eps, for `Flow` eps - x0 (Lipman et al. 2022)."""

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        return process.rates(t)


@struct.dataclass
class Straight(Prediction):
    """y = eps - x0: the velocity along `Flow` in its own time, also where the process is a `Shift` of it (SD3)."""

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        return -jnp.ones_like(process.sigma(t)), jnp.ones_like(process.sigma(t))


@struct.dataclass
class EDM(Prediction):
    """EDM's F: the unit-variance mix that is uncorrelated with x_t when x0 has variance sigma_data^2 (Karras et al.
    2022, eq. 7).

    a = sigma / (sigma_data n), b = -alpha sigma_data / n, n^2 = sigma^2 + alpha^2 sigma_data^2.
    """

    sigma_data: float = 0.5

    def point(self, process: Process, t: Time) -> tuple[Time, Time]:
        alpha, sigma = process.alpha(t), process.sigma(t)
        n = jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
        return sigma / (self.sigma_data * n), -alpha * self.sigma_data / n


def determinant(prediction: Prediction, process: Process, t: Time) -> Time:
    """det = alpha b - sigma a; 0 where the prediction does not determine x0 (eps at alpha = 0)."""
    a, b = prediction.point(process, t)
    return process.alpha(t) * b - process.sigma(t) * a


def is_blind(prediction: Prediction, process: Process, t: Time) -> bool:
    """Whether det is 0 at t, so that x0 does not follow from the prediction: eps and score where alpha is 0. False
    while jax traces t or the process, whose values are not known then.
    """
    det = determinant(prediction, process, t)
    return not isinstance(det, Tracer) and bool(jnp.abs(det) < 1e-6)


def target(prediction: Prediction, process: Process, x0: Images, eps: Images, t: Time) -> Array:
    """y = a x0 + b eps."""
    a, b = prediction.point(process, t)
    return expand(a, x0) * x0 + expand(b, x0) * eps


def estimate(prediction: Prediction, process: Process, xt: Images, y: Images, t: Time) -> Estimate:
    """The pair (x0, eps) that a prediction y at x_t stands for."""
    a, b = prediction.point(process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    det = alpha * b - sigma * a
    weigh = lambda u, v: (expand(u, xt) * xt + expand(v, xt) * y) * expand(1 / det, xt)
    return Estimate(weigh(b, -sigma), weigh(-a, alpha))


def with_x0(est: Estimate, x0: Images, process: Process, t: Time) -> Estimate:
    """The estimate moved to another x0 along `alpha x0 + sigma eps = x_t`."""
    ratio = expand(process.alpha(t) / process.sigma(t), x0)
    return est._replace(x0=x0, eps=est.eps + ratio * (est.x0 - x0))


def with_eps(est: Estimate, eps: Images, process: Process, t: Time) -> Estimate:
    """The estimate moved to another eps along the same line."""
    ratio = expand(process.sigma(t) / process.alpha(t), eps)
    return est._replace(eps=eps, x0=est.x0 + ratio * (est.eps - eps))
