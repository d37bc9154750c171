"""The checksum of arrays that no host holds whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from diffjax.parallel import layout
from diffjax.train import sums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_the_sum_is_the_same_however_the_array_is_split(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 4)) * 50, dtype)
    mesh = layout.mesh("both")
    split = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    whole = {"a": np.asarray(x), "b": np.asarray(x[0])}
    assert sums.by_place({"a": split, "b": x[0]}) == sums.by_place(whole)


def test_every_flipped_bit_and_every_exchange_is_noticed():
    draw = np.random.default_rng(1)
    x = draw.normal(size=97).astype(np.float32)
    whole, found = sums.by_place([x]), set()
    for bit in range(97 * 32):
        bits = x.view(np.uint32).copy()
        bits[bit // 32] ^= np.uint32(1 << bit % 32)
        found.add(sums.by_place([bits.view(np.float32)]) == whole)
    assert found == {False}
    assert whole != sums.by_place([x[::-1]]) and sums.by_place([x, 2 * x]) != sums.by_place([2 * x, x])
