"""What a workdir remembers of a run: its config, and how, where and with what it was started."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffjax import config as configs
from diffjax.parallel import devices
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.utils.provenance import TIME, changes, description, differences

# A run may be trained for longer, on other devices, kept, shown and logged otherwise, and read the same data elsewhere.
KEPT = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.preview_every",
    "train.keep_last",
    "train.keep_best",
)
DEVICES = ("train.parallel", "train.shard", "train.replicas", "train.offload")
MAY_CHANGE = (*KEPT, *DEVICES, "log.", "sample.", "data.path", "data.data_dir", "data.workers", "data.held_out")
FILES = ("config.json", "run.json", "changes.json")
FACTS = ("data.json", "tokenizer.json", "encoder.json", "seen.npz", "base.json", "init.json")


@contextlib.contextmanager
def claim(workdir: str | Path, config: ConfigDict, allow_change: bool = False) -> Iterator[None]:
    """Hold `workdir` for this job and write `config.json` and `run.json` there.

    What differs from the config that the run had before is printed and added to `changes.json`. When the job is stopped
    or ends in a `UserError` before its next step, all is as it was before: mended, its config is another one. Raises
    `UserError` when another process trains there, or when it holds a run of another config: `MAY_CHANGE` apart, and all
    with `allow_change`.
    """
    workdir = Path(workdir)
    with _alone(workdir):
        wanted = json.loads(config.to_json_best_effort())
        before = {path: path.read_bytes() for name in FILES if (path := workdir / name).exists()}
        others, begun = set(workdir.iterdir()), _begun(workdir)
        try:
            if (workdir / "config.json").exists():
                _change(workdir, _begun_with(workdir), wanted, allow_change)
            files.write_json(workdir / "config.json", wanted)
            files.write_json(workdir / "run.json", [*_listed(workdir / "run.json"), description(devices.describe())])
            yield
        except (UserError, KeyboardInterrupt):
            if _begun(workdir) == begun:
                _remove(set(workdir.iterdir()) - others)
                for path, content in before.items():
                    files.write_atomic(path, content)
            raise


def _change(workdir: Path, there: dict, here: dict, allow: bool) -> None:
    """Print and note what has changed. Raises `UserError` where it must not."""
    if not allow and (lines := differences(there, here, MAY_CHANGE)):
        remedy = "choose another --workdir, or go on with these changes by --allow-change"
        raise UserError(f"{workdir} holds a run of another config: {'; '.join(lines)}; {remedy}")
    found = changes(there, here)
    if _newest(workdir) and any(name.startswith("init_from") for name in found):
        raise UserError(
            f"init_from says how a run begins, and {workdir} has begun: choose another --workdir for one that begins so"
        )
    if found:
        note(workdir, found)


def note(workdir: Path, found: dict[str, tuple[Any, Any]]) -> None:
    """Print changes, name: (old, new), and add them to `changes.json` with the time and the newest
    checkpoint's step.
    """
    for name, (old, new) in found.items():
        print(f"changed: {name} was {json.dumps(old)} and is {json.dumps(new)}")
    entry = {"time": time.strftime(TIME), "step": _newest(workdir), "changes": found}
    files.write_json(workdir / "changes.json", [*_listed(workdir / "changes.json"), entry])


def _newest(workdir: Path) -> int:
    """The step of the newest checkpoint, 0 without."""
    folder = workdir / "checkpoints"
    return (
        max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0) if folder.is_dir() else 0
    )


def forget_facts(workdir: Path) -> None:
    """Remove the facts of a run that has no checkpoint: it begins anew, maybe with other data."""
    _remove({workdir / name for name in FACTS})


def _begun_with(workdir: Path) -> dict[str, Any]:
    """The config of the run that is there, with the defaults of what it does not say; as it stands where it has
    other fields.
    """
    try:
        return json.loads(configs.read(workdir).to_json_best_effort())
    except UserError:
        return files.read_json(workdir / "config.json")


def _begun(workdir: Path) -> int:
    """A number that changes when a job begins to write its metrics."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def _listed(path: Path) -> list[dict[str, Any]]:
    """The earlier entries; none where the file is damaged, as no number of the run depends on them."""
    try:
        return files.read_json(path) if path.exists() else []
    except UserError as error:
        print(f"{error}; it is begun anew")
        return []


def _remove(paths: set[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _remove_unused(made: list[Path]) -> None:
    """Remove the folders that were made for a run, its own the first, if that holds its lock alone."""
    with contextlib.suppress(OSError):  # which folder.rmdir() raises where something else is
        if made and [path.name for path in made[0].iterdir()] == [".lock"]:
            (made[0] / ".lock").unlink()
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """A lock that goes when the process does, however it ends; the folder goes too if it was made for it and has
    nothing else.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / ".lock", "a+")
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}; choose another --workdir") from error
    with handle:
        files.lock(handle, refusal=f"is training in {workdir}; wait for it or choose another --workdir")
        try:
            yield
        finally:
            _remove_unused(made)
