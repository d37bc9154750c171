"""Denoisers: `(x, t, cond) -> Estimate(x0, eps)`, and how a network becomes one.

Adapting a network is naming three things: what it predicts, its clock (the number it was trained to read at time t) and
the scale of its input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffjax.diffusion.predict import Estimate, Prediction, estimate
from diffjax.diffusion.process import Discrete, Process, Time, expand
from diffjax.utils import struct

Cond = dict[str, Array]


def thousand_t(process: Process, t: Time) -> Time:
    """1000 t: the clock of networks trained on continuous times."""
    return 1000 * jnp.asarray(t)


def thousand_sigma(process: Process, t: Time) -> Time:
    """1000 sigma(t): the clock of SD3."""
    return 1000 * process.sigma(t)


def table_step(process: Process, t: Time) -> Time:
    """k = T t - 1: the clock of networks trained on a `Discrete` table."""
    return process.step(t)


def own_clock(process: Process, t: Time) -> Time:
    """The clock of the networks trained here: `table_step` of a table, `thousand_t` of anything else."""
    return table_step(process, t) if isinstance(process, Discrete) else thousand_t(process, t)


def quarter_log_sigma(process: Process, t: Time) -> Time:
    """log(sigma / alpha) / 4: the clock of EDM (Karras et al. 2022, table 1, c_noise)."""
    return -process.logsnr(t) / 8


def unit_scale(process: Process, t: Time) -> Time:
    """1: the network reads x_t as it is."""
    return jnp.ones_like(process.sigma(t))


def edm_scale(process: Process, t: Time, sigma_data: float = 0.5) -> Time:
    """1 / sqrt(sigma^2 + alpha^2 sigma_data^2): unit variance (Karras et al. 2022, table 1, c_in)."""
    return 1 / jnp.sqrt(process.sigma(t) ** 2 + (process.alpha(t) * sigma_data) ** 2)


@struct.dataclass
class Denoiser:
    """A network with its process, prediction, clock and input scale; a pytree, so it passes through `jit` as an
    argument.

    `apply(params, x, clock(t), **cond) -> y` must be a function of stable identity, since it is static. When y has
    twice the channels of x, the second half says what the variance is.
    """

    process: Process
    prediction: Prediction
    params: Any
    apply: Callable = struct.field(pytree_node=False)
    clock: Callable[[Process, Time], Time] = struct.field(pytree_node=False, default=own_clock)
    scale: Callable[[Process, Time], Time] = struct.field(pytree_node=False, default=unit_scale)

    def network(self, x: Float[Array, "b ..."], t: Time, cond: Cond) -> Float[Array, "b ..."]:
        """y, the raw output at x_t; t is a scalar or one time per image."""
        t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
        return self.apply(self.params, expand(self.scale(self.process, t), x) * x, self.clock(self.process, t), **cond)

    def __call__(self, x: Float[Array, "b ..."], t: Time, cond: Cond) -> Estimate:
        """The pair (x0, eps) at x_t."""
        y = self.network(x, t, cond)
        channels = x.shape[-1]
        est = estimate(self.prediction, self.process, x, y[..., :channels].astype(x.dtype), t)
        return est._replace(variance=y[..., channels:]) if y.shape[-1] == 2 * channels else est


@dataclass(frozen=True)
class Apply:
    """`module.apply` as a static argument: equal for equal modules, so that loading a model again compiles nothing."""

    module: Any

    def __call__(
        self, params: Any, x: Float[Array, "b ..."], t: Float[Array, " b"], **cond: Array
    ) -> Float[Array, "b ..."]:
        return self.module.apply({"params": params}, x, t, **cond)
