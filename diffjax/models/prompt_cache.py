"""Prompts that were encoded before, kept on disk: another job with the same words loads no text encoder."""

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.models.model import Encoded
from diffjax.utils import files
from diffjax.utils.progress import track

Row = dict[str, np.ndarray]

MANY = 8
"""Texts from above which on encoding shows a bar."""

SAID = "said"
"""The name under which a file keeps what its text encoder warned of."""


def remembered(encoder: str, prompts: Iterable[str], load: Callable[[], Callable[[list[str]], Row]]) -> Encoded:
    """The conditions of the different prompts by the encoder that a key stands for, which is loaded if one is missing.

    Warns of what the encoder warned of when it read them.
    """
    different = tuple(dict.fromkeys(prompts))
    paths = [files.home() / "prompts" / encoder / f"{_digest(prompt)}.npz" for prompt in different]
    rows, text = [read(path) for path in paths], None
    absent = [i for i, row in enumerate(rows) if row is None]
    for i in track(absent, "encoding the texts", len(absent)) if len(absent) > MANY else absent:
        text = load() if text is None else text
        row = rows[i] = _encoded(text, different[i])
        with files.open_atomic(paths[i]) as file:
            np.savez_compressed(file, **row)
    whole = [row for row in rows if row is not None]
    for said in dict.fromkeys(line for row in whole for line in row.pop(SAID).tolist()):
        warnings.warn(said, stacklevel=2)
    return Encoded(different, jax.tree.map(lambda *leaves: np.stack(leaves), *whole))


def read(path: Path) -> Row | None:
    """The arrays of a file; None where there is none, or a damaged one."""
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def key(paths: Iterable[Path], *how: object) -> str:
    """What stands for an encoder: its files, by place, size and time of change, and how it is run."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return _digest(repr((stats, how, jax.default_backend())))


def _encoded(text: Callable[[list[str]], Row], prompt: str) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cond = text([prompt])
    row = {name: np.asarray(value)[0] for name, value in cond.items()}
    return row | {SAID: np.array(list(dict.fromkeys(str(warning.message) for warning in seen)), str)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
