"""Denoisers: `(x, t, cond) -> Estimate(x0, eps)`, and how a network becomes one.

To adapt a network is to name three things: what it predicts; its *network time*, the number that it reads at time t;
and the scale of its input. `cond` is the conditioning, what it is given beside x and t: its further arguments, by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffjax.diffusion.predict import Estimate, Prediction, estimate
from diffjax.diffusion.process import Discrete, Images, Process, Time, expand
from diffjax.utils import struct

Cond = dict[str, Array] | None
"""The conditioning of each image; None where there is none."""

OfTime = Callable[[Process, Time], Time]


def plain_t(process: Process, t: Time) -> Time:
    """t itself, from 0 (image) to 1 (noise)."""
    return jnp.asarray(t)


def thousand_t(process: Process, t: Time) -> Time:
    """1000 t, so that a timestep embedding made for a table of 1000 steps serves continuous times too."""
    return 1000 * jnp.asarray(t)


def thousand_sigma(process: Process, t: Time) -> Time:
    """1000 sigma(t): what the network of SD3 reads."""
    return 1000 * process.sigma(t)


def table_step(process: Any, t: Time) -> Time:
    """k = T t - 1: what networks read that were trained on a `Discrete` table of T steps."""
    return process.step(t)


def standard_time(process: Process, t: Time) -> Time:
    """What the networks of this package are trained to read: `table_step` of a table, `thousand_t` of anything else."""
    return table_step(process, t) if isinstance(process, Discrete) else thousand_t(process, t)


def quarter_log_sigma(process: Process, t: Time) -> Time:
    """log(sigma / alpha) / 4: what the networks of EDM read (Karras et al. 2022, table 1, c_noise)."""
    return -process.logsnr(t) / 8


def unit_scale(process: Process, t: Time) -> Time:
    """1: the network reads x_t as it is."""
    return jnp.ones_like(process.sigma(t))


def edm_scale(process: Process, t: Time, sigma_data: float = 0.5) -> Time:
    """1 / sqrt(sigma^2 + alpha^2 sigma_data^2): unit variance (Karras et al. 2022, table 1, c_in)."""
    return 1 / jnp.sqrt(process.sigma(t) ** 2 + (process.alpha(t) * sigma_data) ** 2)


@struct.dataclass
class Denoiser:
    """A network with its process, prediction, network time and input scale.

    `apply(params, scale x, network_time, **cond) -> y` is the network. It reads t itself, from 0 to 1, unless its
    `network_time` is given. When y has twice the channels of x, the second half is `Estimate.variance`.

    A denoiser is a pytree and passes through `jit` as an argument. Its functions are static: make each of them once,
    since a new function compiles anew.
    """

    process: Process
    prediction: Prediction
    params: Any
    apply: Callable = struct.field(pytree_node=False)
    network_time: OfTime = struct.field(pytree_node=False, default=plain_t)
    scale: OfTime = struct.field(pytree_node=False, default=unit_scale)

    def network(self, x: Images, t: Time, cond: Cond = None) -> Images:
        """y, the raw output at x_t; t is a scalar or one time per image."""
        t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
        x = expand(self.scale(self.process, t), x) * x
        return self.apply(self.params, x, self.network_time(self.process, t), **(cond or {}))

    def __call__(self, x: Images, t: Time, cond: Cond = None) -> Estimate:
        """The pair (x0, eps) at x_t."""
        y = self.network(x, t, cond)
        channels = x.shape[-1]
        est = estimate(self.prediction, self.process, x, y[..., :channels].astype(x.dtype), t)
        return est._replace(variance=y[..., channels:]) if y.shape[-1] == 2 * channels else est


@dataclass(frozen=True)
class Apply:
    """`module.apply` of a linen module as a static argument: equal for equal modules, so that loading a model again
    compiles nothing.
    """

    module: Any

    def __call__(self, params: Any, x: Images, t: Float[Array, " b"], **cond: Array) -> Images:
        return self.module.apply({"params": params}, x, t, **cond)
