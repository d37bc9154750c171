"""What a workdir remembers of a run: its config, and how, where and with what it was started."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import jax
from ml_collections import ConfigDict

from diffjax import files, mesh
from diffjax.errors import UserError

# A run may be trained for longer, shown and logged otherwise, without becoming another run.
MAY_CHANGE = ("train.steps", "train.log_every", "train.save_every", "train.preview_every", "log.")
PACKAGES = ("diffjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@contextlib.contextmanager
def claim(workdir: str | Path, config: ConfigDict) -> Iterator[None]:
    """Hold `workdir` for this job and write `config.json` and `run.json` there; of several hosts, the first one does.

    A run that ends in a `UserError` before its first step leaves none of its files: mended, its config is another one.
    Raises `UserError` when another process trains there, or when it holds a run of another config (`MAY_CHANGE` apart).
    """
    workdir = Path(workdir)
    if jax.process_index():
        yield
        return
    with _alone(workdir):
        wanted = json.loads(config.to_json_best_effort())
        path, before = workdir / "config.json", set(workdir.iterdir())
        if path.exists():
            _refuse_another(workdir, files.read_json(path), wanted)
        files.write_json(path, wanted)
        files.write_json(workdir / "run.json", [*_starts(workdir / "run.json"), description()])
        try:
            yield
        except UserError:
            if path not in before and not (workdir / "metrics.jsonl").exists():
                _remove(set(workdir.iterdir()) - before)
            raise


def description() -> dict[str, Any]:
    """The command, time, code version, packages and devices of this process."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": mesh.describe(),
        "host": platform.platform(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is at and whether files differ from it; None outside a repository."""
    try:
        run = lambda *words: subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
        return {"commit": run("rev-parse", "HEAD"), "changed": bool(run("status", "--porcelain", "--untracked-files=no"))}
    except (subprocess.SubprocessError, OSError):
        return None


def differences(there: dict, here: dict, prefix: str = "") -> list[str]:
    """The keys in which two nested configs differ, in words."""
    lines = []
    for key in sorted(there.keys() | here.keys()):
        old, new, name = there.get(key), here.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{name}.")
        elif old != new and not name.startswith(MAY_CHANGE):
            lines.append(f"{name} is {json.dumps(old)} there and {json.dumps(new)} here")
    return lines


def _refuse_another(workdir: Path, there: dict, here: dict) -> None:
    if lines := differences(there, here):
        raise UserError(f"{workdir} holds a run of another config: {'; '.join(lines)}; choose another --workdir")


def _starts(path: Path) -> list[dict[str, Any]]:
    """The earlier descriptions; none where the file is damaged, as no number of the run depends on them."""
    try:
        return files.read_json(path) if path.exists() else []
    except UserError as error:
        print(f"{error}; it is begun anew")
        return []


def _remove(paths: set[Path]) -> None:
    for path in paths:
        if path.is_file():
            path.unlink()


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """A lock that goes when the process does, however it ends."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / ".lock", "a+")
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}; choose another --workdir") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise UserError(f"process {handle.read()} is training in {workdir}; wait for it or choose another --workdir") from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
