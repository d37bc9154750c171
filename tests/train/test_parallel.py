import jax
import numpy as np
import optax
import pytest
from test_step import batch_of, distance, first_state, objective

from diffjax.parallel import devices
from diffjax.train.parallel import by_jit, by_pmap
from diffjax.train.step import make_step
from diffjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")

STEPS = 4


def trained(way, number, accumulate=1):
    """The state after a few steps, and the metrics of each."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-3))
    parallel = way(make_step(objective(), optimizer, accumulate=accumulate), devices.data_mesh(jax.devices()[:number]))
    state, rows = parallel.place(first_state(optimizer)), []
    for number in range(STEPS):
        state, metrics = parallel.step(state, parallel.feed(batch_of(32, seed=number)))
        rows.append(jax.device_get(metrics))
    return jax.device_get(parallel.gather(state).replace(key=None)), rows


@pytest.fixture(scope="module")
def alone():
    return trained(by_jit, 1)


@pytest.mark.parametrize(
    ("way", "accumulate"),
    [
        (by_jit, 1),
        (by_pmap, 2),
        pytest.param(by_jit, 2, marks=pytest.mark.slow),
        pytest.param(by_pmap, 1, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_agree_with_one(alone, way, accumulate):
    state, rows = trained(way, 8, accumulate)
    assert state.step == STEPS
    assert distance(state.params, alone[0].params) < 1e-6
    assert distance(state.ema, alone[0].ema) < 1e-6
    for row, expected in zip(rows, alone[1]):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), row, expected)


def test_a_batch_that_does_not_divide_is_refused():
    for way in (by_jit, by_pmap):
        parallel = way(make_step(objective(), optax.sgd(0.1)), devices.data_mesh())
        with pytest.raises(UserError, match="multiple of 8"):
            parallel.feed(batch_of(12))
