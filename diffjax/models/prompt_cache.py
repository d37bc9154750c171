"""Prompts that were encoded before, kept on disk: another job with the same words loads no text encoder."""

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.models.model import Encoded
from diffjax.utils import files, struct
from diffjax.utils.errors import UserError
from diffjax.utils.progress import track

Row = dict[str, np.ndarray]

MANY = 256
"""Texts above which their conditioning stays on disk, to be read batch by batch."""

BAR = 8
"""Texts from above which on encoding shows a bar."""

SAID = "said"
"""The name under which a file keeps what its text encoder warned of."""


@struct.dataclass
class OnDisk:
    """A text encoder that knows the prompts whose conditioning is in `folder`."""

    folder: Path = struct.field(pytree_node=False)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Raises `UserError` for another prompt."""
        rows = [read(path_of(self.folder, prompt)) for prompt in prompts]
        if None in rows:
            prompt = prompts[rows.index(None)]
            raise UserError(f"{prompt!r} was not among the prompts that were encoded: load the model with it")
        return _stacked([row for row in rows if row is not None])


def remembered(
    encoder: str, prompts: Iterable[str], load: Callable[[], Callable[[list[str]], Row]]
) -> Encoded | OnDisk:
    """The conditions of the different prompts by the encoder that a key stands for, which is loaded if one is missing.

    Warns of what the encoder warned of when it read them.
    """
    different, folder = tuple(dict.fromkeys(prompts)), files.home() / "prompts" / encoder
    few = len(different) <= MANY
    rows = {prompt: row if few else {} for prompt in different if (row := read(path_of(folder, prompt))) is not None}
    if absent := [prompt for prompt in different if prompt not in rows]:
        text = load()
        for prompt in track(absent, "encoding the texts", len(absent)) if len(absent) > BAR else absent:
            row = _encoded(text, prompt)
            with files.open_atomic(path_of(folder, prompt)) as file:
                np.savez_compressed(file, **row)
            rows[prompt] = row if few else {}
    if not few:
        return OnDisk(folder)
    found = [rows[prompt] for prompt in different]
    for said in dict.fromkeys(line for row in found for line in row[SAID].tolist()):
        warnings.warn(said, stacklevel=2)
    return Encoded(different, _stacked(found))


def _stacked(rows: Sequence[Row]) -> Row:
    return jax.tree.map(
        lambda *leaves: np.stack(leaves), *({k: v for k, v in row.items() if k != SAID} for row in rows)
    )


def path_of(folder: Path, prompt: str) -> Path:
    """Where the conditioning of a prompt is."""
    return folder / f"{_digest(prompt)}.npz"


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
