import jax
import numpy as np
import pytest

from diffjax.utils import seeds
from diffjax.utils.errors import UserError


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 - 1])
def test_a_seed_of_32_bits_gives_the_key_that_jax_makes(seed):
    assert bits(seeds.key(seed)) == bits(jax.random.key(seed))


def test_all_64_bits_count():
    every = [0, *(2**bit for bit in range(64)), 2**63 + 1, 2**64 - 1]
    assert len({bits(seeds.key(seed)) for seed in every}) == len(every)
    assert bits(seeds.key(2**40 + 7)) == (2**8, 7)


def test_a_key_draws_in_single_precision():
    assert jax.random.normal(seeds.key(2**63), (2,)).dtype == np.float32


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_other_seeds_are_refused(seed):
    with pytest.raises(UserError, match=rf"seed is {seed}: it must be from 0 to 2\^64 - 1"):
        seeds.key(seed)
