"""Checkpoints: written in the background, committed whole or not at all and to the disk, verified when read.

`WORKDIR/checkpoints/STEP/` holds four items: `params`, `ema`, `optimizer` (arrays) and `progress` (JSON: key, loss, the
state of the data iterator, and a checksum of each of the others).
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from diffjax import config as configs
from diffjax.parallel import hosts
from diffjax.train import sums
from diffjax.train.state import State
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.utils.provenance import checksum

log = logging.getLogger(__name__)

ARRAYS = ("params", "ema", "optimizer")


class Run(NamedTuple):
    """A trained model as `load_run` finds it: `config` is an `ml_collections.ConfigDict`, `params` are numpy arrays."""

    config: Any
    params: PyTree
    step: int
    workdir: Path


class Checkpoints:
    """The checkpoints of one run: the last `keep_last`, and the `keep_best` of lowest loss, over any number of
    restarts.
    """

    def __init__(self, workdir: str | Path, keep_last: int = 2, keep_best: int = 1):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.manager = _manager(self.folder, keep_last, keep_best)
        self.proved = False

    def save(self, state: State, data: Any, loss: float) -> None:
        """Start to write `state` and `data`, the JSON state of the data iterator; returns once the devices are read.

        The first one is read back before. Raises `UserError` when this or the save before it could not be written.
        """
        from orbax.checkpoint import args

        items = {name: getattr(state, name) for name in ARRAYS}
        progress = {
            "key": np.asarray(jax.random.key_data(state.key)).tolist(),
            "data": data,
            "loss": float(loss),
            "checksums": {name: sums.of(item) for name, item in items.items()},
            "spread": any(hosts.spread(item) for item in items.values()),
        }
        progress["checksum"] = _checksum_of_json(progress)
        saved = {name: args.PyTreeSave(item) for name, item in items.items()}
        with self._writing():
            step = int(state.step)
            self.manager.save(step, args=args.Composite(**saved, progress=args.JsonSave(progress)))
        if not self.proved:
            self.last()
            if why := self.damage(step):
                raise UserError(
                    f"checkpoint {step} in {self.folder} cannot be read back ({why}): choose another --workdir"
                )
            self.proved = True

    def damage(self, step: int) -> str | None:
        """Why that checkpoint cannot be read; None where it is as it was written."""
        try:
            shapes = self.manager.item_metadata(step)
            _restore(self.manager, step, {name: _as_numpy(shapes[name].tree) for name in ARRAYS})
        except Exception as error:  # whatever the reader of a damaged file stumbles over
            return self._why(error)
        return None

    def restore(self, state: State) -> tuple[State, Any] | None:
        """The newest readable checkpoint as a state like `state` (numpy leaves, typed key) and its `data`; None if
        there is none.

        Unreadable ones are named in a warning and moved to `WORKDIR/unreadable`; raises `UserError` when all are, and
        when one is of another network or optimizer.
        """
        failed = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            restored, why = None, "another host cannot read it"
            try:
                self._refuse_another(step, state)
                restored = self._read(step, state)
            except UserError:
                raise
            except Exception as error:  # whatever the reader of a damaged file stumbles over
                why = self._why(error)
            if not hosts.everywhere(restored is not None):
                failed[step] = why
                continue
            hosts.first(lambda step=step: self._set_aside(failed, step))
            if failed:
                self.manager.reload()
            return restored
        if failed:
            step, why = next(iter(failed.items()))
            raise UserError(
                f"no checkpoint in {self.folder} can be read (step {step}: {why}); use another workdir, or remove it"
            )
        return None

    def last(self) -> int | None:
        """The step of the newest checkpoint that is wholly written and on the disk."""
        with self._writing():
            self.manager.wait_until_finished()
        return max(self.manager.all_steps(), default=None)

    def close(self) -> None:
        """Wait for what is being written."""
        with self._writing():
            self.manager.close()

    def _read(self, step: int, state: State) -> tuple[State, Any]:
        items = {name: _as_numpy(getattr(state, name)) for name in ARRAYS}
        items, progress = _restore(self.manager, step, items)
        key = jax.random.wrap_key_data(jnp.asarray(progress["key"], jnp.uint32))
        return replace(state, step=np.int32(step), key=key, **items), progress["data"]

    def _refuse_another(self, step: int, state: State) -> None:
        """Raises `UserError` where a checkpoint's arrays are others than the state's, and whatever the reader stumbles
        over where it does not say which they are: `load_run` could not read it.
        """
        found = self.manager.item_metadata(step)
        there = {name: _shapes(found[name].tree) for name in ARRAYS}
        for name in ARRAYS:
            here = _shapes(getattr(state, name))
            if lines := [
                path for path in sorted(there[name].keys() | here.keys()) if there[name].get(path) != here.get(path)
            ]:
                first = (
                    f"{lines[0]} has {there[name].get(lines[0], 'none')} there and {here.get(lines[0], 'none')} here"
                )
                more = f", and {len(lines) - 1} more differ" if lines[1:] else ""
                raise UserError(
                    f"checkpoint {step} in {self.folder} does not fit this config: of {name}, {first}{more}; "
                    "put the config back, or begin a new run from its weights by --init-from"
                )

    def _set_aside(self, failed: dict[int, str], good: int) -> None:
        for step, why in failed.items():
            aside = self.folder.parent / "unreadable" / str(step)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(_unused(aside))
            log.warning("checkpoint %d cannot be read (%s): moved to %s, going on from step %d", step, why, aside, good)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # background writers raise whatever the file system did
            why = self._why(error)
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {why}; make room there and run the same command again"
            ) from error

    def _why(self, error: Exception) -> str:
        """An error in one line: what the system says, where it says anything."""
        text = str(error).replace(str(self.manager.directory), str(self.folder))
        if code := re.search(r"\[os_error_code='(\d+)'", text):
            return os.strerror(int(code[1]))
        return text.partition("\n")[0][:200] or type(error).__name__


def check_place(workdir: str | Path) -> None:
    """Write a small checkpoint in `workdir` and read it back. Raises `UserError` where that cannot be done."""
    place = Path(workdir) / ".check"
    clear = lambda: hosts.first(lambda: shutil.rmtree(place, ignore_errors=True))
    clear()
    try:
        with contextlib.closing(Checkpoints(place)) as checkpoints:
            array = np.arange(3, dtype=np.float32)
            checkpoints.save(State(jnp.int32(0), {"x": array}, {"x": array}, {"x": array}, jax.random.key(0)), "", 0.0)
    finally:
        clear()


def load_run(workdir: str | Path, step: int | None = None, ema: bool = True) -> Run:
    """Read a run for inference: its averaged parameters (or the raw ones), the newest unless `step` says which.

    Raises `UserError` when there is no run, no such checkpoint, or it is damaged.
    """
    workdir = Path(workdir).expanduser()
    config = configs.read(workdir)
    folder = workdir.absolute() / "checkpoints"
    manager = _manager(folder, clean=False)
    steps: list[int] = sorted(manager.all_steps())
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint yet; let the training reach its first one")
    if step is not None and step not in steps:
        raise UserError(f"{workdir} holds no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    name = "ema" if ema else "params"
    try:
        shapes = manager.item_metadata(step)[name].tree
        items, _ = _restore(manager, step, {name: _as_numpy(shapes)})
    except Exception as error:  # whatever the reader of a damaged file stumbles over
        why = str(error).partition("\n")[0][:200]
        raise UserError(f"checkpoint {step} in {folder} cannot be read ({why}); choose another of {steps}") from error
    finally:
        manager.close()
    return Run(config, items[name], step, workdir)


def _manager(folder: Path, keep_last: int = 1, keep_best: int = 0, clean: bool = True) -> Any:
    """Orbax's manager of a folder; `clean` removes what a killed process left half written."""
    import orbax.checkpoint as ocp

    _quiet()
    if clean:
        folder.mkdir(parents=True, exist_ok=True)
    folder = files.plain(folder.parent) / folder.name
    options = ocp.CheckpointManagerOptions(
        preservation_policy=Keep(folder, keep_last, keep_best),
        enable_async_checkpointing=True,
        cleanup_tmp_directories=clean,
        create=clean,
        temporary_path_class=on_the_disk(),
    )
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in ARRAYS} | {"progress": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


@functools.cache
def on_the_disk() -> type:
    """How Orbax's checkpointers commit a checkpoint so that no loss of power undoes it: what is in it is on the disk
    before it gets its name, and the name before anything else is written or removed. Orbax alone waits for neither.

    This is in the thread that writes, and of several hosts, in the first one's; TensorStore waits for the arrays of
    each.
    """
    from orbax.checkpoint.path import atomicity

    class OnTheDisk(atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            final = Path(self.get_final())
            if atomicity.TMP_DIR_SUFFIX in final.parent.name:  # an item: the checkpoint, which holds it, is to come
                return await super().finalize()
            files.sync(Path(self.get()))
            await super().finalize()
            files.sync(final, "*")

    return OnTheDisk


@dataclass
class Keep:
    """Which checkpoints of a folder are kept: the last, and those of lowest loss, as an Orbax `PreservationPolicy`."""

    folder: Path
    last: int
    best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, the oldest first, whether it is kept."""
        steps = [info.step for info in checkpoints]
        best = sorted(steps, key=self.loss)[: self.best]
        return [step in best or step in steps[len(steps) - self.last :] for step in steps]

    def loss(self, step: int) -> float:
        """The loss that a checkpoint was saved with; infinite where that is not known."""
        try:
            return json.loads((self.folder / str(step) / "progress" / "metadata").read_text())["loss"]
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf


@functools.cache
def _quiet() -> None:
    """Silence the tracebacks of Orbax's and TensorStore's threads: `Checkpoints` raises their errors, in one line."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    logging.getLogger("asyncio").addFilter(lambda record: "tensorstore" not in record.getMessage())
    before = sys.unraisablehook

    def hook(raised: "sys.UnraisableHookArgs") -> None:
        if str(raised.exc_value) != "Event loop is closed":
            before(raised)

    sys.unraisablehook = hook


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each array by its path; what holds none has no path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {re.sub(r"[^\w]+", "/", jax.tree_util.keystr(path)).strip("/"): tuple(leaf.shape) for path, leaf in leaves}


def _as_numpy(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _restore(manager: Any, step: int, shapes: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict]:
    """The named items of a checkpoint as numpy arrays, and its progress; raises `ValueError` where a
    checksum differs.
    """
    import orbax.checkpoint as ocp

    to_numpy = lambda tree: jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    wanted = {name: ocp.args.PyTreeRestore(tree, restore_args=to_numpy(tree)) for name, tree in shapes.items()}
    found = manager.restore(step, args=ocp.args.Composite(**wanted, progress=ocp.args.JsonRestore()))
    items = {name: found[name] for name in shapes}
    progress = found["progress"]
    of = sums.by_place if progress.get("spread") else checksum
    for name, item in items.items():
        if of(item) != progress["checksums"][name]:
            raise ValueError(f"the checksum of {name} differs")
    own = progress.pop("checksum", None)
    early = own is None and "loss" not in progress
    if not early and own != _checksum_of_json(progress):
        raise ValueError("the checksum of its progress differs")
    return items, progress


def _checksum_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _unused(path: Path) -> Path:
    """`path`, or the first of `path.1`, `path.2`, ... that does not exist."""
    names = (path.with_name(f"{path.name}.{number}") for number in range(1, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())
