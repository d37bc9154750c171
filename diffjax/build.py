"""The one place where the strings of a config, or of a command line, become objects.

A choice is a table with a `name` and that choice's own arguments: `{"name": "logit_normal", "mean": 0.6}`. An unknown name or
argument raises `UserError`, naming the nearest one.
"""

import inspect
import re
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from diffjax import grid as grids
from diffjax import loss, predict
from diffjax import process as processes
from diffjax.errors import UserError, unknown
from diffjax.nets.dit import DiT
from diffjax.nets.unet import UNet
from diffjax.refine import Chain, Refine, adams, extrapolate, heun, unipc
from diffjax.sample import Sampler, ddim_law

Choice = Mapping[str, Any]

BETAS = {
    "linear": processes.linear_betas,
    "scaled_linear": processes.scaled_linear_betas,
    "squared_cosine": processes.squared_cosine_betas,
}
PREDICTIONS = {
    "x0": predict.X0,
    "eps": predict.Eps,
    "score": predict.Score,
    "v": predict.V,
    "flow": predict.Velocity,
    "edm": predict.EDM,
}
WEIGHTS = {
    "plain": lambda: loss.plain,
    "x0": loss.x0_weight,
    "velocity": loss.velocity,
    "min_snr": loss.min_snr,
    "sigmoid": loss.sigmoid,
    "edm": loss.edm,
    "p2": loss.p2,
}
TIMES = {
    "uniform": lambda: loss.uniform,
    "logit_normal": loss.logit_normal,
    "lognormal_sigma": loss.lognormal_sigma,
}
UNIFORMS = {"independent": loss.independent, "antithetic": loss.antithetic}
NETWORKS = {"dit": DiT, "unet": UNet}
SAMPLERS = {
    "ddpm": Sampler(Chain(()), eta=1.0),
    "ddim": Sampler(Chain(()), law=ddim_law),
    "euler": Sampler(Chain(())),
    "heun": Sampler(heun()),
    "dpmpp_2m": Sampler(extrapolate(2)),
    "dpmpp_2m_sde": Sampler(extrapolate(2), eta=1.0),
    "dpmpp_3m": Sampler(extrapolate(3)),
    "unipc": Sampler(unipc(2)),
    "ipndm": Sampler(adams(4, even=True)),
}
GRIDS = {
    "uniform": lambda process, steps: grids.uniform(steps),
    "logsnr": lambda process, steps: grids.logsnr(process, steps, *_ends(process)),
    "karras": lambda process, steps: grids.karras(process, steps, *_sigmas(process)),
    "leading": lambda process, steps: grids.leading(steps, _table(process)),
    "linspace": lambda process, steps: grids.linspace(steps, _table(process)),
    "trailing": lambda process, steps: grids.trailing(steps, _table(process)),
}


def make(kind: str, table: Mapping[str, Callable], choice: Choice) -> Any:
    """`table[choice.name](**the rest of choice)`."""
    arguments = dict(choice)
    maker = _named(kind, table, arguments.pop("name"))
    known = [name for name in inspect.signature(maker).parameters if name not in ("parent", "name")]
    for name in arguments:
        if name not in known:
            raise unknown(f"field of {kind} {choice['name']}", name, known) if known else UserError(
                f"{kind} {choice['name']} takes no {name}: remove it"
            )
    return maker(**{name: _value(value) for name, value in arguments.items()})
