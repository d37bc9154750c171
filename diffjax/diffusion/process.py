"""Forward processes: `x_t = alpha(t) x0 + sigma(t) eps`, with t in [0, 1] and t = 1 pure noise.

A process is a frozen pytree with the two functions `alpha` and `sigma`; all else follows from them:

    rates(t)  = (alpha'(t), sigma'(t))          by forward-mode differentiation
    logsnr(t) = 2 log(alpha(t) / sigma(t))      +inf at t = 0, -inf at t = 1 where the process reaches its ends

Nothing is clipped: the ends are exact. (Kingma et al. 2021, "Variational Diffusion Models", eq. 1-3.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffjax.utils import struct

Time = Float[Array, "*b"] | float
"""One time for the whole batch, or one per image."""

Images = Float[Array, "b ..."]
"""A batch: pictures (b, h, w, c), latents, or points (b, d)."""

Keys = Key[Array, " b"]
"""One key per image, so that what is drawn for an image never depends on its neighbours."""


def expand(v: Time, x: Images | np.ndarray) -> Float[Array, "..."]:
    """Append axes to a value per image, (b,), so that it multiplies x of shape (b, ...); a scalar stays as it is."""
    v = jnp.asarray(v)
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim)) if v.ndim else v


def root(value: Array) -> Array:
    """Square root with derivative 0, not infinite, at 0."""
    return jnp.sqrt(jnp.where(value > 0, value, 1)) * (value > 0)


def perturb(process: "Process", x0: Images, eps: Images, t: Time) -> Images:
    """x_t = alpha(t) x0 + sigma(t) eps, with t a scalar or one time per image."""
    return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * eps


def image_keys(key: Key[Array, ""], numbers: Int[Array, " b"]) -> Keys:
    """`fold_in(key, i)` for image number i."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(numbers, jnp.uint32))


def fold(keys: Keys, number: int | np.integer | Array) -> Keys:
    """`fold_in(key, number)` of every key: fresh keys for one more step or purpose."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def unit_noise(keys: Keys, shape: tuple[int, ...], dtype: Any = float) -> Images:
    """Standard normal noise, of `shape` for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


class Process:
    """What every process has: `alpha`, `sigma`, and `inverse`, the time of a log-SNR."""

    def alpha(self, t: Time) -> Time:
        """The signal's factor."""
        raise TypeError(f"{type(self).__name__} defines no alpha")

    def sigma(self, t: Time) -> Time:
        """The noise's standard deviation."""
        raise TypeError(f"{type(self).__name__} defines no sigma")

    def inverse(self, logsnr: Time) -> Time:
        """The time t at which `logsnr(t)` has the given value."""
        raise TypeError(f"{type(self).__name__} defines no inverse")

    def rates(self, t: Time) -> tuple[Time, Time]:
        """(alpha'(t), sigma'(t))."""
        t = jnp.asarray(t)
        return jax.jvp(lambda t: (self.alpha(t), self.sigma(t)), (t,), (jnp.ones_like(t),))[1]

    def logsnr(self, t: Time) -> Time:
        """2 log(alpha(t) / sigma(t))."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))


@struct.dataclass
class Flow(Process):
    """Rectified flow: alpha = 1 - t, sigma = t (Liu et al. 2022; Lipman et al. 2022, the optimal-transport path)."""

    def alpha(self, t: Time) -> Time:
        return 1 - jnp.asarray(t)

    def sigma(self, t: Time) -> Time:
        return jnp.asarray(t)

    def inverse(self, logsnr: Time) -> Time:
        return jax.nn.sigmoid(-jnp.asarray(logsnr) / 2)


@struct.dataclass
class Cosine(Process):
    """alpha = sin(pi (1 - t) / 2), sigma = sin(pi t / 2): variance preserving (Salimans and Ho 2022, section 4).

    The sine form is exactly 0 at t = 1, where cos(pi / 2) in float32 is negative.
    """

    def alpha(self, t: Time) -> Time:
        return jnp.sin(jnp.pi / 2 * (1 - jnp.asarray(t)))

    def sigma(self, t: Time) -> Time:
        return jnp.sin(jnp.pi / 2 * jnp.asarray(t))

    def inverse(self, logsnr: Time) -> Time:
        return 2 / jnp.pi * jnp.arctan(jnp.exp(-jnp.asarray(logsnr) / 2))


@struct.dataclass
class Exploding(Process):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, the variance-exploding SDE)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def alpha(self, t: Time) -> Time:
        return jnp.ones_like(jnp.asarray(t) * 1.0)

    def sigma(self, t: Time) -> Time:
        return self.sigma_min * jnp.exp(jnp.asarray(t) * jnp.log(self.sigma_max / self.sigma_min))

    def inverse(self, logsnr: Time) -> Time:
        return (-jnp.asarray(logsnr) / 2 - jnp.log(self.sigma_min)) / jnp.log(self.sigma_max / self.sigma_min)


@struct.dataclass
class Linear(Process):
    """alpha = 1, sigma = sigma_max t: EDM, whose time is sigma itself (Karras et al. 2022, table 1, last column)."""

    sigma_max: float = 80.0

    def alpha(self, t: Time) -> Time:
        return jnp.ones_like(jnp.asarray(t) * 1.0)

    def sigma(self, t: Time) -> Time:
        return self.sigma_max * jnp.asarray(t)

    def inverse(self, logsnr: Time) -> Time:
        return jnp.exp(-jnp.asarray(logsnr) / 2) / self.sigma_max


@jax.custom_jvp
def _value_and_slope(value: Array, smooth: Array) -> Array:
    """The value of the first argument with the derivative of the second, so that a table has one at its entries too."""
    return value


@_value_and_slope.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


@struct.dataclass
class Discrete(Process):
    """A table of T steps: alpha^2 at step k is `cumprod(1 - betas)[k]`, and step k stands at t = (k + 1) / T (Ho et al.
    2020, eq. 4).

    t = 0 is alpha = 1, sigma = 0. At integers (to 1e-3) the table is exact; between them the log-SNR is interpolated,
    and on the first interval, where it is infinite (and on the last one of a zero-terminal-SNR table), alpha^2 (alpha)
    itself is. The table is float32, built as publishers built it: float32 factors, the product accumulated in float64.
    """

    alpha2: Float[np.ndarray, "steps"]

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return self.alpha2.shape[-1]

    def step(self, t: Time) -> Time:
        """k = T t - 1, rounded when within 1e-3 of an integer: what a network trained on the table reads."""
        k = jnp.asarray(t) * self.steps - 1
        nearest = jnp.round(k)
        return jnp.where(jnp.abs(k - nearest) < 1e-3, k + jax.lax.stop_gradient(nearest - k), k)

    def _between(self, t: Time) -> tuple[Array, Array]:
        """alpha and sigma at t, by interpolation, exact at the table's entries."""
        table = jnp.concatenate([jnp.ones(1), jnp.asarray(self.alpha2, jnp.result_type(float))])
        position = self.step(t) + 1
        low = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)).astype(jnp.int32), 0, self.steps - 1)
        weight = position - low
        a, b = table[low], table[low + 1]
        inner = (a < 1) & (b > 0)
        logsnr = (1 - weight) * _logit(a, inner) + weight * _logit(b, inner)
        to_zero = (1 - weight) * root(a)
        alpha = jnp.where(b > 0, root((1 - weight) * a + weight * b), to_zero)
        sigma = jnp.where(b > 0, root((1 - weight) * (1 - a) + weight * (1 - b)), root(1 - to_zero**2))
        exact, on_entry = jnp.where(weight == 1, b, a), (weight == 0) | (weight == 1)
        pick = lambda smooth, power: jnp.where(on_entry, _value_and_slope(root(power), smooth), smooth)
        alpha = pick(jnp.where(inner, jnp.sqrt(jax.nn.sigmoid(logsnr)), alpha), exact)
        return alpha, pick(jnp.where(inner, jnp.sqrt(jax.nn.sigmoid(-logsnr)), sigma), 1 - exact)

    def alpha(self, t: Time) -> Time:
        return self._between(t)[0]

    def sigma(self, t: Time) -> Time:
        return self._between(t)[1]

    def inverse(self, logsnr: Time) -> Time:
        alpha2, signal = jnp.asarray(self.alpha2, jnp.result_type(float)), jax.nn.sigmoid(jnp.asarray(logsnr))
        times = jnp.arange(1, self.steps + 1) / self.steps
        nodes = jnp.where(alpha2 > 0, _logit(alpha2, alpha2 > 0), -1e30)
        inside = jnp.interp(-jnp.asarray(logsnr), -nodes, times)
        first = (1 - signal) / (1 - alpha2[0]) / self.steps
        last = 1 - jnp.sqrt(signal / alpha2[-2]) / self.steps
        inside = jnp.where((alpha2[-1] == 0) & (signal < alpha2[-2]), last, inside)
        return jnp.where(signal > alpha2[0], first, inside)


def _logit(p: Array, where: Array) -> Array:
    p = jnp.where(where, p, 0.5)
    return jnp.log(p) - jnp.log1p(-p)


def discrete(betas: Float[np.ndarray, " steps"]) -> Discrete:
    """The process of a beta table."""
    return Discrete(_cumulative(betas))


def _cumulative(betas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    return np.cumprod(np.float32(1) - np.asarray(betas, np.float32), dtype=np.float64).astype(np.float32)


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Float[np.ndarray, " steps"]:
    """beta_k linear from `start` to `end` (Ho et al. 2020, section 4)."""
    return _linspace32(start, end, steps)


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Float[np.ndarray, " steps"]:
    """sqrt(beta_k) linear (Rombach et al. 2022)."""
    return _linspace32(start**0.5, end**0.5, steps) ** 2


def squared_cosine_betas(steps: int = 1000, limit: float = 0.999) -> Float[np.ndarray, " steps"]:
    """beta_k = min(1 - f(k+1) / f(k), limit), f(k) = cos^2((k/T + 0.008) / 1.008 * pi / 2) (Nichol and Dhariwal 2021,
    eq. 17).
    """
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], limit).astype(np.float32)


def zero_terminal_snr(betas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Shift and scale sqrt(alpha^2) so that its last entry is 0 and its first stays (Lin et al. 2024, algorithm 1)."""
    alpha = np.sqrt(_cumulative(betas))
    first, last = alpha[0].copy(), alpha[-1].copy()
    alpha2 = ((alpha - last) * (first / (first - last))) ** 2
    return 1 - np.concatenate([alpha2[:1], alpha2[1:] / alpha2[:-1]])


def _linspace32(start: float, end: float, steps: int) -> Float[np.ndarray, " steps"]:
    """float32 values, the first half counted from `start` and the second from `end`, as publishers computed them."""
    start, end = np.float32(start).astype(float), np.float32(end).astype(float)
    step = np.float32(np.float32(end - start) / np.float32(max(steps - 1, 1))).astype(float)
    index = np.arange(steps)
    return np.where(index < steps // 2, start + step * index, end - step * (steps - 1 - index)).astype(np.float32)


@struct.dataclass
class Shift(Process):
    """The inner process with t / (1 - t) scaled: t -> by t / (1 + (by - 1) t).

    On `Flow` this lowers the log-SNR by 2 log(by) everywhere (Esser et al. 2024, eq. 23): SD3.5 is
    `Shift(Flow(), 3.0)`.
    """

    process: Process
    by: float = 3.0

    def _inner(self, t: Time) -> Time:
        t = jnp.asarray(t)
        return t / (t + (1 - t) / self.by)

    def alpha(self, t: Time) -> Time:
        return self.process.alpha(self._inner(t))

    def sigma(self, t: Time) -> Time:
        return self.process.sigma(self._inner(t))

    def inverse(self, logsnr: Time) -> Time:
        inner = self.process.inverse(logsnr)
        return inner / (inner + self.by * (1 - inner))
