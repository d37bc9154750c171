"""Where a number or a picture comes from: the code and machine that made it, checksums, and in what two
records differ.
"""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from diffjax.utils import determinism

TIME = "%Y-%m-%dT%H:%M:%S%z"
PACKAGES = ("diffjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def description(device: str) -> dict[str, Any]:
    """The command, time, code version and packages of this process, the `device` that it runs on, and whether that
    gives the same bits again.
    """
    return {
        "time": time.strftime(TIME),
        "command": shlex.join(sys.argv),
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device,
        "determinism": determinism.facts(),
        "host": platform.platform(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is at and whether files differ from it; None outside a repository, to which nothing is
    written: a job that is killed leaves no lock there.
    """
    try:
        run = lambda *words: subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
        return {
            "commit": run("rev-parse", "HEAD"),
            "changed": bool(run("status", "--porcelain", "--untracked-files=no")),
        }
    except (subprocess.SubprocessError, OSError):
        return None


def checksum(tree: PyTree) -> int:
    """CRC-32 of all leaves' bytes in turn."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return total


def changes(there: dict, here: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What two nested configs have under each name in which they differ; None where one has nothing."""
    found = {}
    for key in sorted(there.keys() | here.keys()):
        old, new, name = there.get(key), here.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{name}.")
        elif old != new:
            found[name] = old, new
    return found


def differences(there: dict, here: dict, but: tuple[str, ...] = ()) -> list[str]:
    """The names in which two nested configs differ, in words; names that begin with one of `but` apart."""
    found = {name: pair for name, pair in changes(there, here).items() if not name.startswith(but)}
    return [f"{name} is {json.dumps(old)} there and {json.dumps(new)} here" for name, (old, new) in found.items()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
