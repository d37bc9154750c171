import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.errors import UserError
from diffjax.train import checkpoint
from diffjax.train.state import create


def state_at(step, seed=0):
    params = {"a": {"kernel": jax.random.normal(jax.random.key(seed), (300, 200))}, "b": jnp.arange(7, dtype=jnp.bfloat16)}
    state = create(params, optax.adamw(1e-3), jax.random.key(5))
    return state.replace(step=jnp.int32(step), params=jax.tree.map(lambda x: x + step, params))


def write(folder, *saves, keep_last=2):
    checkpoints = checkpoint.Checkpoints(folder, keep_last=keep_last)
    for step, loss in saves:
        checkpoints.save(state_at(step), {"position": step}, loss)
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps({"seed": 0, "net": {"width": 8}}))


def damage(folder, step, how):
    files = (path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file())
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "truncate":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def same(a, b):
    def equal(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))

    return jax.tree.all(jax.tree.map(equal, a, b))


def test_the_newest_comes_back_whole(tmp_path):
    write(tmp_path, (10, 1.0), (20, 2.0))
    restored, data = checkpoint.Checkpoints(tmp_path).restore(state_at(0, seed=1))
    assert same(restored, state_at(20)) and data == {"position": 20}
    assert jax.tree.structure(restored) == jax.tree.structure(state_at(20))


def test_nothing_to_restore(tmp_path):
    assert checkpoint.Checkpoints(tmp_path).restore(state_at(0)) is None


def test_keeps_the_last_and_the_best(tmp_path):
    write(tmp_path, (1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0), (5, 6.0))
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [2, 4, 5]


@pytest.mark.parametrize("how", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, how):
    write(tmp_path, (10, 1.0), (20, 2.0))
    damage(tmp_path, 20, how)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING):
        restored, data = checkpoints.restore(state_at(0))
    assert data == {"position": 10} and same(restored, state_at(10))
    assert "checkpoint 20 cannot be read" in caplog.text and "step 10" in caplog.text
    assert (tmp_path / "unreadable" / "20").is_dir()
    checkpoints.save(state_at(20), {"position": 20}, 2.0)
    assert checkpoints.last() == 20


def test_only_damaged_checkpoints_is_an_error_that_loses_nothing(tmp_path):
    write(tmp_path, (10, 1.0), (20, 2.0))
    damage(tmp_path, 10, "flip")
    damage(tmp_path, 20, "truncate")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        checkpoint.Checkpoints(tmp_path).restore(state_at(0))
    assert (tmp_path / "checkpoints" / "20").is_dir()


def test_a_failed_write_is_the_users_to_mend(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path)

    def full(*args, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.manager, "save", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        checkpoints.save(state_at(1), {}, 1.0)


def test_load_run_reads_averages_or_parameters(tmp_path):
    write(tmp_path, (10, 1.0), (20, 2.0))
    run = checkpoint.load_run(tmp_path)
    assert run.step == 20 and run.config.net.width == 8
    assert same(run.params, state_at(20).ema)
    assert same(checkpoint.load_run(tmp_path, step=10, ema=False).params, state_at(10).params)


def test_load_run_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        checkpoint.load_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoint.load_run(tmp_path)
    write(tmp_path, (10, 1.0))
    with pytest.raises(UserError, match="no checkpoint of step 11; there are 10"):
        checkpoint.load_run(tmp_path, step=11)
    damage(tmp_path, 10, "flip")
    with pytest.raises(UserError, match="checkpoint 10 in .* cannot be read"):
        checkpoint.load_run(tmp_path, ema=False)
        checkpoint.load_run(tmp_path)


def test_checksum_sees_one_changed_bit_and_an_exchange():
    tree = {"a": np.arange(5, dtype=np.float32), "b": jnp.arange(3, dtype=jnp.bfloat16), "c": np.int32(7)}
    whole = checkpoint.checksum(tree)
    for position in range(5):
        changed = tree["a"].copy()
        changed.view(np.uint32)[position] ^= 1
        assert checkpoint.checksum(tree | {"a": changed}) != whole
    assert checkpoint.checksum(tree | {"a": tree["a"][::-1]}) != whole
    assert checkpoint.checksum(tree | {"c": np.int32(8)}) != whole
