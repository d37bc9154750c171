import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train import checkpoint
from diffjax.train.state import create
from diffjax.utils import provenance
from diffjax.utils.errors import UserError


def state_at(step, seed=0):
    params = {
        "a": {"kernel": jax.random.normal(jax.random.key(seed), (300, 200))},
        "b": jnp.arange(7, dtype=jnp.bfloat16),
    }
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


def test_a_checkpoint_is_on_the_disk_before_another_is_written_or_removed(tmp_path, monkeypatch):
    """Synced are all of its files as they are in the end, and the names of all of its folders, its own too."""
    sync, synced, removals = os.fsync, set(), []

    def noted(handle):
        sync(handle)
        about = os.fstat(handle)
        synced.add((about.st_ino, about.st_mtime_ns))

    def lacking(step):
        folder = tmp_path / "checkpoints" / str(step)
        paths = [path.stat() for path in (folder.parent, folder, *folder.rglob("*"))]
        assert len(paths) > 20
        return [about for about in paths if (about.st_ino, about.st_mtime_ns) not in synced]

    monkeypatch.setattr(os, "fsync", noted)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=1, keep_best=0)
    remove = checkpoints.manager._checkpoint_deleter.delete_steps
    note = lambda steps: removals.append((steps, lacking(max(checkpoints.manager.all_steps())))) or remove(steps)
    monkeypatch.setattr(checkpoints.manager._checkpoint_deleter, "delete_steps", note)
    for step in (10, 20, 30):
        checkpoints.save(state_at(step), {}, 1.0)
    checkpoints.close()
    assert removals == [([], []), ([10], []), ([20], [])]


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


NAMES = (
    "a[b]",
    "a[b",
    "a]b",
    "a\\b",
    "a*b",
    "a?b",
    "gs:",
    "a b",
    "caf\u00e9",
    "cafe\u0301",
    "\udce9",
    "{a}",
    "%41",
    "#~$HOME",
    "x" * 250,
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_checkpoints_are_read_wherever_they_are(tmp_path, name):
    folder = tmp_path / name / "run"
    checkpoint.check_place(folder)
    assert not list(folder.iterdir())
    write(folder, (10, 1.0))
    restored, data = checkpoint.Checkpoints(folder).restore(state_at(0))
    assert same(restored, state_at(10)) and data == {"position": 10}
    assert same(checkpoint.load_run(folder).params, state_at(10).ema)
    assert (folder / "checkpoints" / "10").is_dir()


def test_a_run_is_read_by_its_links_and_from_where_it_is(tmp_path, monkeypatch):
    write(tmp_path / "run", (10, 1.0))
    (tmp_path / "link[1]").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for path in ("run", "run/", "./run", "link[1]", "link[1]/../run", tmp_path / "link[1]"):
        assert checkpoint.load_run(path).step == 10, path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.load_run("~/run").step == 10
    (tmp_path / "run").rename(tmp_path / "run[2]")
    assert checkpoint.load_run(tmp_path / "run[2]").step == 10


def test_no_place_for_a_link_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "[home]"))
    with pytest.raises(UserError, match="set DIFFJAX_HOME"):
        checkpoint.Checkpoints(tmp_path / "[run]")
    checkpoint.Checkpoints(tmp_path / "run")


def test_the_first_checkpoint_is_read_back(tmp_path, monkeypatch):
    read, restore = [], checkpoint._restore
    monkeypatch.setattr(
        checkpoint, "_restore", lambda manager, step, shapes: read.append(step) or restore(manager, step, shapes)
    )
    for first in (1, 3):  # of each process
        write(tmp_path, (first, 1.0), (first + 1, 1.0))
    assert read == [1, 3]
    monkeypatch.setattr(checkpoint, "checksum", lambda tree: len(read))
    with pytest.raises(UserError, match="cannot be read back .the checksum.*choose another --workdir"):
        monkeypatch.setattr(checkpoint, "_restore", lambda *rest: read.append(0) or restore(*rest))
        checkpoint.check_place(tmp_path)
    assert not (tmp_path / ".check").exists()


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_the_last_and_the_best_are_kept_over_restarts(tmp_path):
    for step, loss in enumerate((5.0, 1.0, 4.0, 3.0, 6.0, 7.0, 2.0), 1):  # a process for each
        write(tmp_path, (step, loss))
        assert len(kept(tmp_path)) <= 3
    assert kept(tmp_path) == [2, 6, 7]
    write(tmp_path, (8, 0.5), (9, 9.0), (10, 9.0))
    assert kept(tmp_path) == [8, 9, 10]


def test_checkpoints_whose_loss_is_not_known_are_pruned_too(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Keep, "should_preserve", lambda self, checkpoints, context: [True] * len(checkpoints))
        write(tmp_path, *((step, 1.0) for step in range(1, 7)))
    for step in (1, 4):  # as they were written before losses were kept
        path = tmp_path / "checkpoints" / str(step) / "progress" / "metadata"
        path.write_text(
            json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "loss"})
        )
    assert kept(tmp_path) == [1, 2, 3, 4, 5, 6]
    write(tmp_path, (7, 3.0))
    assert kept(tmp_path) == [2, 6, 7]


def damages(path):
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"?"
    return {"emptied": b"", "cut": content[:middle], "flipped": flipped, "gone": None}


@pytest.mark.parametrize("each", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_whatever_file_is_damaged_nothing_wrong_is_read(tmp_path, each):
    write(tmp_path / "run", (10, 1.0), (20, 2.0))
    files = [path for path in sorted((tmp_path / "run" / "checkpoints" / "20").rglob("*")) if path.is_file()]
    outcomes = {"as it was": 0, "passed over": 0}
    for number, path in enumerate(files):
        for content in (2 * list(damages(path).values()))[number % 4 :][:each]:
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "run", tmp_path / "copy")
            damaged = tmp_path / "copy" / path.relative_to(tmp_path / "run")
            damaged.unlink() if content is None else damaged.write_bytes(content)
            try:
                assert same(checkpoint.load_run(tmp_path / "copy").params, state_at(20).ema)
            except UserError as error:
                assert "\n" not in str(error)
            checkpoints = checkpoint.Checkpoints(tmp_path / "copy")
            restored, data = checkpoints.restore(state_at(0))
            assert same(restored, state_at(data["position"])), path
            outcomes["as it was" if data["position"] == 20 else "passed over"] += 1
            checkpoints.close()
    print(len(files), "files, damages of each:", each, outcomes)
    assert outcomes["passed over"] > len(files) / 4


@pytest.mark.parametrize("file", ["ema/_METADATA", "params/_sharding"])
def test_training_goes_on_from_no_checkpoint_that_sampling_cannot_read(tmp_path, file):
    write(tmp_path, (10, 1.0), (20, 2.0))
    path = tmp_path / "checkpoints" / "20" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="checkpoint 20 in .* cannot be read"):
        checkpoint.load_run(tmp_path)
    assert checkpoint.Checkpoints(tmp_path).restore(state_at(0))[1] == {"position": 10}
    assert checkpoint.load_run(tmp_path).step == 10


def test_progress_that_has_changed_is_seen(tmp_path):
    write(tmp_path, (10, 1.0), (20, 2.0))
    path = tmp_path / "checkpoints" / "20" / "progress" / "metadata"
    whole, checkpoints = path.read_bytes(), checkpoint.Checkpoints(tmp_path)
    for place in range(0, len(whole), 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert checkpoints.damage(20), place
    path.write_bytes(whole)
    assert checkpoints.damage(20) is None


FAILING = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import checkpoint, state_at
checkpoints = checkpoint.Checkpoints(sys.argv[2])
checkpoints.save(state_at(1), {}, 1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    checkpoints.save(state_at(2), {}, 1.0)
    checkpoints.last()
except checkpoint.UserError as error:
    print(error, file=sys.stderr)
"""


def test_a_write_that_fails_is_one_line(tmp_path):
    arguments = [sys.executable, "-c", FAILING, str(Path(__file__).parent), str(tmp_path)]
    ended = subprocess.run(arguments, capture_output=True, text=True)
    said = (
        f"cannot write a checkpoint to {tmp_path}/checkpoints: File too large; make room there and run the same "
        "command again\n"
    )
    assert ended.stderr == said and kept(tmp_path) == [1]


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
    whole = provenance.checksum(tree)
    for position in range(5):
        changed = tree["a"].copy()
        changed.view(np.uint32)[position] ^= 1
        assert provenance.checksum(tree | {"a": changed}) != whole
    assert provenance.checksum(tree | {"a": tree["a"][::-1]}) != whole
    assert provenance.checksum(tree | {"c": np.int32(8)}) != whole
