"""All that training changes from one step to the next, as one pytree."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from diffjax.utils import struct


@struct.dataclass
class State:
    """`step` updates were made; `ema` is the running average of `params`; `key` never changes (steps fold into it).

    `frozen` are parameters that do not change either and are in no checkpoint.
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    optimizer: optax.OptState
    key: Key[Array, ""]
    frozen: PyTree = None


def create(params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> State:
    """The state before the first step; the average starts at the parameters."""
    return State(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params), key)


def average(ema: PyTree, params: PyTree, step: Int[Array, ""], decay: float) -> PyTree:
    """`d ema + (1 - d) params`, where `d = min(decay, (1 + step) / (10 + step))` lets a young average move fast."""
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - d).astype(old.dtype) * (new - old), ema, params)
