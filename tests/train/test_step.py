import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from diffjax.diffusion import loss, predict, process
from diffjax.train import step as training
from diffjax.train.state import average, create


class Toy(nn.Module):
    """Two layers that see the picture, the time and the tokens' mean."""

    @nn.compact
    def __call__(self, x, t, context, mask):
        told = (context * mask[..., None]).sum(1)
        y = jnp.concatenate([x.reshape(len(x), -1), told, t[:, None] / 1000], axis=1)
        return nn.Dense(x[0].size)(nn.tanh(nn.Dense(32)(y))).reshape(x.shape)


def apply(params, x, t, **cond):
    return Toy().apply({"params": params}, x, t, **cond)


def encode(params, cond):
    return {"context": params["text"][cond["tokens"]], "mask": cond["mask"]}


def objective(**changes):
    settings = dict(apply=apply, encode=encode, drop=0.25)
    settings |= dict(weight=loss.velocity(0.1), times=loss.logit_normal(0.5), uniforms=loss.antithetic)
    return training.Objective(process.Flow(), predict.X0(), **settings | changes)


def batch_of(size, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "image": draw.integers(0, 256, (size, 4, 4, 3), dtype=np.uint8),
        "tokens": draw.integers(0, 10, (size, 5)),
        "mask": draw.random((size, 5)) < 0.7,
    }


def first_state(optimizer, seed=0):
    text = jax.random.normal(jax.random.key(seed), (10, 8))
    network = Toy().init(
        jax.random.key(seed), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), jnp.zeros((1, 5, 8)), jnp.ones((1, 5))
    )
    return create({"network": network["params"], "text": text}, optimizer, jax.random.key(seed + 1))


SGD = optax.sgd(0.1)


def run(step, state, batches):
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


def test_learns():
    step = jax.jit(training.make_step(objective(), optax.adam(1e-2)))
    state, batch = first_state(optax.adam(1e-2)), batch_of(32)
    _, before = step(state, batch)
    state, after = run(step, state, [batch] * 200)
    assert after["loss"] < 0.5 * before["loss"]
    assert state.step == 200


def test_accumulation_is_the_gradient_of_the_whole_batch():
    batch = batch_of(24)
    whole, metrics = jax.jit(training.make_step(objective(), SGD))(first_state(SGD), batch)
    parts, again = jax.jit(training.make_step(objective(), SGD, accumulate=4))(first_state(SGD), batch)
    assert distance(parts.params, whole.params) < 1e-6
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), again, metrics)


def test_randomness_belongs_to_the_row():
    """A row's loss is the same whatever stands in the other rows."""
    one, other = batch_of(8), batch_of(8, seed=1)
    other = {name: np.concatenate([one[name][:3], value[3:]]) for name, value in other.items()}
    state, aim = first_state(SGD), objective()
    t, keys = training.draw(aim, jax.random.key(0), 8, None)
    losses = [np.asarray(aim.losses(state.params, batch, t, keys)) for batch in (one, other)]
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=1e-6)
    assert not np.any(np.isclose(losses[0][3:], losses[1][3:]))


def test_no_two_rows_and_no_two_steps_draw_the_same():
    aim = objective()
    draws = [training.draw(aim, jax.random.fold_in(jax.random.key(0), step), 16, None) for step in range(2)]
    keys = np.concatenate([jax.random.key_data(keys) for _, keys in draws])
    times = np.concatenate([t for t, _ in draws])
    assert len(np.unique(keys, axis=0)) == 32 and len(np.unique(times)) == 32


def test_conditions_are_dropped_as_often_as_asked():
    seen = []

    def spy(params, cond):
        seen.append(np.asarray(cond["mask"]).any(1))
        return encode(params, cond)

    batch = batch_of(512) | {"mask": np.ones((512, 5), bool)}
    aim = objective(encode=spy, drop=0.25)
    aim.losses(first_state(SGD).params, batch, *training.draw(aim, jax.random.key(0), 512, None))
    assert 0.2 < 1 - seen[0].mean() < 0.3


def test_dropped_conditions_are_unconditional():
    cond = {"mask": jnp.ones((2, 3), bool), "label": jnp.array([4, 5]), "pooled": jnp.ones((2, 1))}
    kept = training.keep_conditions(cond, jnp.array([True, False]))
    assert kept["mask"].tolist() == [[True] * 3, [False] * 3] and kept["label"].tolist() == [4, -1]
    assert kept["pooled"] is cond["pooled"]


def test_loss_by_logsnr():
    metrics = training.binned(jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([-jnp.inf, -9.0, 0.5, jnp.inf]))
    assert metrics["bin_sum"].tolist() == [3, 0, 0, 0, 0, 4, 0, 0, 0, 8]
    assert metrics["bin_count"].tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_average_starts_fast_and_ends_at_its_decay():
    old, new = {"a": jnp.zeros(())}, {"a": jnp.ones(())}
    for step, decay in [(0, 0.1), (90, 0.91), (10**6, 0.99)]:
        assert np.isclose(average(old, new, jnp.int32(step), 0.99)["a"], 1 - decay)


def test_average_is_made_in_the_step():
    step = jax.jit(training.make_step(objective(), SGD, ema_decay=0.9))
    start = first_state(SGD)
    after, _ = step(start, batch_of(8))
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, start.params, after.params)
    assert distance(after.ema, expected) < 1e-6
    assert distance(after.ema, after.params) > 1e-4


@pytest.mark.parametrize("leaf", ["network", "text"])
def test_what_is_not_finite_is_flagged(leaf):
    state = first_state(SGD)
    broken = {**state.params, leaf: jax.tree.map(lambda x: x * jnp.nan, state.params[leaf])}
    step = jax.jit(training.make_step(objective(), SGD))
    assert step(state, batch_of(8))[1]["finite"]
    assert not step(state.replace(params=broken), batch_of(8))[1]["finite"]


def test_class_labels_reach_the_network():
    seen = []

    def by_label(params, x, t, label):
        seen.append(np.asarray(label))
        return x

    aim = objective(apply=by_label, encode=lambda params, cond: cond, drop=0.5)
    batch = {"image": batch_of(64)["image"], "label": np.arange(64, dtype=np.int32)}
    aim.losses(first_state(SGD).params, batch, *training.draw(aim, jax.random.key(0), 64, None))
    dropped = seen[0] == -1
    assert 10 < dropped.sum() < 54 and np.array_equal(seen[0][~dropped], batch["label"][~dropped])
