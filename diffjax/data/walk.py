"""What a folder holds, and what a path means on a disk that may spell it otherwise."""

import functools
import os
import stat
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from diffjax.data.images import SUFFIXES, looks_like_picture
from diffjax.utils.errors import UserError

ARCHIVES = frozenset(".zip .tar .tgz .gz .bz2 .xz .zst .7z .rar".split())
SPOKEN = frozenset(".txt .json .jsonl .csv .tsv .parquet".split())


class Found(NamedTuple):
    """The files of a folder, in order, and those that may be pictures and cannot be used, with the reasons."""

    files: list[Path]
    left_out: dict[Path, str]


def files_under(folder: Path) -> Found:
    """Everything under `folder`, through links too, but what is hidden. Raises `UserError` when the folder is missing.

    Left out are hidden pictures, links that lead nowhere or back, folders that cannot be listed, archives, and pictures
    whose names do not end like one's.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file: set data.name to captioned_table for a table, or webdataset for a .tar")
    if not folder.is_dir():
        raise UserError(f"the data folder {folder} does not exist; set data.path to a folder of pictures")
    files, left_out = [], {}
    around = {str(folder): {_identity(folder)}}

    def unlistable(error: OSError) -> None:
        left_out[Path(error.filename)] = f"cannot be listed: {error.strerror}"

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unlistable):
        for name in list(folders):
            path = os.path.join(parent, name)
            if (identity := _identity(path)) in around[parent]:
                left_out[Path(path)] = "is a link that leads back to a folder around it"
                folders.remove(name)
            around[path] = around[parent] | {identity}
        within = any(part.startswith(".") for part in Path(parent).relative_to(folder).parts)
        for name in names:
            file = Path(parent, name)
            why = unused(file, within or name.startswith("."))
            if why:
                left_out[file] = why
            elif why is None:
                files.append(file)
    return Found(sorted(files), left_out)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def unused(file: Path, hidden: bool) -> str | None:
    """Why a file is not used: a reason if it may be a picture, "" if it is none of our business, None if it is used."""
    suffix = file.suffix.lower()
    if hidden:
        return (
            "is hidden: a name on its path begins with a dot" if suffix in SUFFIXES and not is_apples(file.name) else ""
        )
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return "is no regular file" if suffix in SUFFIXES else ""
        if suffix in ARCHIVES:
            return "is an archive: unpack it"
        if suffix not in SUFFIXES | SPOKEN:
            with file.open("rb") as opened:
                if looks_like_picture(opened.read(12)):
                    return "is a picture whose name does not end like one's: rename it to end in .jpg or .png"
    except FileNotFoundError:
        return "is a link that leads nowhere"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def is_apples(name: str) -> bool:
    """Whether a file is what macOS writes beside each file on other systems' disks and into tar files: no picture."""
    return name.startswith("._")


def printable(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def composed(name: str) -> str:
    """A name in the one of Unicode's forms (NFC) that most systems write; macOS takes letters and accents apart."""
    return unicodedata.normalize("NFC", name)


def loosely(name: str) -> str:
    """A name without the difference between capital and small letters."""
    return composed(name).casefold()


def on_disk(path: Path) -> Path:
    """The path as the disk spells it, in another form of Unicode or another case; itself where nothing is like it."""
    if os.path.lexists(path) or path.parent == path:
        return path
    parent = on_disk(path.parent)
    for like in (composed, loosely):
        names = _spelled(parent, like).get(like(path.name), [])
        if len(names) == 1:
            return parent / names[0]
    return parent / path.name


def _spelled(folder: Path, like: Callable[[str], str]) -> dict[str, list[str]]:
    try:
        return _listed(folder, like, folder.stat().st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=64)
def _listed(folder: Path, like: Callable[[str], str], changed: int) -> dict[str, list[str]]:
    """The names in a folder, as it was when it `changed`, by how they look."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        found.setdefault(like(name), []).append(name)
    return found


def relative(file: Path, name: str) -> Path:
    """The picture that a table or list calls `name`, as the disk spells it."""
    found = on_disk(Path(os.path.normpath(file.parent / name)))
    if "\\" in name and not os.path.lexists(found):
        return on_disk(Path(os.path.normpath(file.parent / name.replace("\\", "/"))))
    return found
