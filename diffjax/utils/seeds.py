"""Random keys from seeds: all 64 bits of a seed count."""

import jax
import numpy as np
from jaxtyping import Array, Key

from diffjax.utils.errors import UserError

END = 2**64


def key(seed: int) -> Key[Array, ""]:
    """`jax.random.key` of a seed from 0 to 2^64 - 1. Below 2^32 it is the key that jax makes; above, jax alone
    drops bits.

    Raises `UserError` for any other seed.
    """
    if not 0 <= seed < END:
        raise UserError(f"seed is {seed}: it must be from 0 to 2^64 - 1")
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed))
