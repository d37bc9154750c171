"""Checkpoints: written in the background, committed whole or not at all, verified when read.

`WORKDIR/checkpoints/STEP/` holds four items: `params`, `ema`, `optimizer` (arrays) and `progress` (JSON: step, key, the
state of the data iterator, and a checksum of each of the others).
"""

import contextlib
import json
import logging
import zlib
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from diffjax.errors import UserError
from diffjax.train.state import State

log = logging.getLogger(__name__)

ARRAYS = ("params", "ema", "optimizer")


class Run(NamedTuple):
    """A trained model as `load_run` finds it: `config` is an `ml_collections.ConfigDict`, `params` are numpy arrays."""

    config: Any
    params: PyTree
    step: int
    workdir: Path


class Checkpoints:
    """The checkpoints of one run: the last `keep_last`, and the `keep_best` of lowest loss."""

    def __init__(self, workdir: str | Path, keep_last: int = 2, keep_best: int = 1):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.manager = _manager(self.folder, keep_last, keep_best)

    def save(self, state: State, data: Any, loss: float) -> None:
        """Start to write `state` and `data`, the JSON state of the data iterator; returns once the devices are read.

        Raises `UserError` when this or the save before it could not be written.
        """
        from orbax.checkpoint import args

        items = {name: getattr(state, name) for name in ARRAYS}
        progress = {
            "key": np.asarray(jax.random.key_data(state.key)).tolist(),
            "data": data,
            "checksums": {name: checksum(item) for name, item in items.items()},
        }
        saved = {name: args.PyTreeSave(item) for name, item in items.items()}
        with self._writing():
            step = int(state.step)
            self.manager.save(
                step, args=args.Composite(**saved, progress=args.JsonSave(progress)), metrics={"loss": float(loss)}
            )

    def restore(self, state: State) -> tuple[State, Any] | None:
        """The newest readable checkpoint as a state like `state` (numpy leaves, typed key) and its `data`; None if there is none.

        Unreadable ones are named in a warning and moved to `WORKDIR/unreadable`; raises `UserError` when all are.
        """
        failed = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, state)
            except Exception as error:  # whatever the reader of a damaged file stumbles over
                failed[step] = str(error).partition("\n")[0][:200]
                continue
            self._set_aside(failed, step)
            return restored
        if failed:
            step, why = next(iter(failed.items()))
            raise UserError(f"no checkpoint in {self.folder} can be read (step {step}: {why}); use another workdir, or remove it")
        return None

    def last(self) -> int | None:
        """The step of the newest checkpoint that is wholly written."""
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
        key = jax.random.wrap_key_data(np.asarray(progress["key"], np.uint32))
        return state.replace(step=np.int32(step), key=key, **items), progress["data"]

    def _set_aside(self, failed: dict[int, str], good: int) -> None:
        for step, why in failed.items():
            aside = self.folder.parent / "unreadable" / str(step)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(_unused(aside))
            log.warning("checkpoint %d cannot be read (%s): moved to %s, going on from step %d", step, why, aside, good)
        if failed:
            self.manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # background writers raise whatever the file system did
            why = str(error).partition("\n")[0][:200]
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {why}; make room there and run the same command again"
            ) from error


def load_run(workdir: str | Path, step: int | None = None, ema: bool = True) -> Run:
    """Read a run for inference: its averaged parameters (or the raw ones), the newest unless `step` says which.

    Raises `UserError` when there is no run, no such checkpoint, or it is damaged.
    """
    from ml_collections import ConfigDict

    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no run (no config.json); train one with: diffjax train --workdir {workdir}")
    folder = workdir.absolute() / "checkpoints"
    manager = _manager(folder, clean=False)
    steps = sorted(manager.all_steps())
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
    return Run(ConfigDict(json.loads((workdir / "config.json").read_text())), items[name], step, workdir)


def checksum(tree: PyTree) -> int:
    """CRC-32 of all leaves' bytes in turn."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), total)
    return total


def _manager(folder: Path, keep_last: int = 1, keep_best: int = 0, clean: bool = True) -> Any:
    """Orbax's manager of a folder; `clean` removes what a killed process left half written."""
    import orbax.checkpoint as ocp

    policies = ocp.checkpoint_managers
    keep = [policies.LatestN(keep_last), policies.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=keep_best)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        enable_async_checkpointing=True,
        cleanup_tmp_directories=clean,
        create=clean,
    )
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in ARRAYS} | {"progress": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _as_numpy(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _restore(manager: Any, step: int, shapes: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict]:
    """The named items of a checkpoint as numpy arrays, and its progress; raises `ValueError` where a checksum differs."""
    import orbax.checkpoint as ocp

    to_numpy = lambda tree: jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    wanted = {name: ocp.args.PyTreeRestore(tree, restore_args=to_numpy(tree)) for name, tree in shapes.items()}
    found = manager.restore(step, args=ocp.args.Composite(**wanted, progress=ocp.args.JsonRestore()))
    items = {name: found[name] for name in shapes}
    for name, item in items.items():
        if checksum(item) != found["progress"]["checksums"][name]:
            raise ValueError(f"the checksum of {name} differs")
    return items, found["progress"]


def _unused(path: Path) -> Path:
    """`path`, or the first of `path.1`, `path.2`, ... that does not exist."""
    names = (path.with_name(f"{path.name}.{number}") for number in range(1, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())
