"""Where diffjax keeps things, and how it writes them so that nothing is ever half there."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from diffjax.utils.errors import UserError

AWKWARD = re.compile(r"[][*?\\]|:/|[\udc80-\udcff]")
"""What libraries take for a pattern, an escape or a protocol, and what is no UTF-8."""

STORE = re.compile(r"\w+:/")
"""How an address begins, also where it was made a path."""

LEFT = ".part"
"""How a file ends that is not whole yet."""


def home() -> Path:
    """The cache folder: `$DIFFJAX_HOME`, else `$XDG_CACHE_HOME/diffjax`, else `~/.cache/diffjax`."""
    if "DIFFJAX_HOME" in os.environ:
        return Path(os.environ["DIFFJAX_HOME"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffjax"


def local(folder: str | Path) -> Path:
    """The folder. Raises `UserError` for an address, such as that of an object store: a run needs files."""
    if STORE.match(str(folder)):
        raise UserError(
            f"{folder} is an address, where files cannot be locked, appended to and renamed: name a folder on a file "
            "system, and copy it there afterwards"
        )
    return Path(folder).expanduser()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write, which stands at `path` once the block ends well; until then `path` holds what it
    held, whenever the machine stops. Afterwards what is written is on the disk, its name too.

    Raises `UserError` when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=LEFT)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another folder") from error
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        _sync(name)
        os.replace(name, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error
    finally:
        Path(name).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what `replacing` has left in a folder where it was killed. None may be at work there."""
    for path in folder.glob(f".*{LEFT}"):
        path.unlink(missing_ok=True)


def _sync(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; file systems that know no such thing for folders
    go without.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


def sync(folder: Path, pattern: str = "**/*") -> None:
    """Wait until what is in a folder, and matches, is on the disk, and the folder's own name."""
    for path in (*folder.glob(pattern), folder, folder.parent):
        _sync(path)


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file whose content stands at `path` once the block ends well. Raises `UserError` as `replacing` does."""
    with replacing(path) as part, part.open("wb") as file:
        yield file


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` so that `path` holds either all of it or what it held before, whenever the machine stops.

    Raises `UserError` as `replacing` does.
    """
    with open_atomic(path) as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote. Raises `UserError` when it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; put it back from a copy") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: put it back from a copy") from error


def lock(file: TextIO, refusal: str = "") -> None:
    """Take the lock of a file that is open as "a+", and keep it until the file is closed or the process ends.

    While another process has it, this one waits; with a `refusal`, it raises `UserError` instead: the number of that
    process, then the refusal. A file system without locks goes without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(f"process {file.read()} {refusal}") from error
    except OSError:
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def plain(folder: Path) -> Path:
    """The absolute `folder`, or a link to it in the cache folder where its own path is `AWKWARD`.

    Raises `UserError` where the cache folder's is too, or it cannot be written.
    """
    if not AWKWARD.search(str(folder)):
        return folder
    link = home().absolute() / "links" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    if AWKWARD.search(str(link)):
        raise UserError(
            f"neither {folder} nor the cache folder {home()} can be used by the library that writes checkpoints: "
            "choose a --workdir without any of []*?\\ in its path, or set DIFFJAX_HOME to a folder without"
        )
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(
            f"cannot write to {link.parent}: {error.strerror}; set DIFFJAX_HOME to another folder"
        ) from error
    return link
