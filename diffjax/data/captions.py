"""Which captions belong to which picture of a folder, in the layouts that people have.

Beside a picture `cat.png`: `cat.txt` (one caption a line) or `cat.json` (a caption, a list of captions, or an object
with one of `CAPTION_KEYS`); `cat.png.txt` and `cat.png.json` too. Anywhere in the folder: a table (`rows`) whose
pictures are paths relative to it, or a `.json` object from file to captions. Folders are searched recursively, and a
picture's captions are gathered from everywhere.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffjax.data.images import SUFFIXES
from diffjax.errors import UserError

FILE_KEYS = ("file_name", "filename", "file", "image", "image_path", "path", "url", "image_url")
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "description")
TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
PROSE = frozenset({"readme", "license", "licence", "attribution", "notice", "credits", "copyright"})


@dataclass(frozen=True)
class Captioned:
    """A picture, its name in the data set and its captions; its bytes are `length` (-1: all) of `file` from `start` on.

    `label` is its class, empty without; a `problem` says why it cannot be had.
    """

    name: str
    file: Path
    captions: tuple[str, ...]
    start: int = 0
    length: int = -1
    label: str = ""
    problem: str = ""

    def read(self) -> bytes:
        """The encoded picture. Raises `OSError`, the problem if there is one."""
        if self.problem:
            raise OSError(self.problem)
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length)


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder; one that is too small is refused, since it can be mended."""

    path: Path
    refuses_small: ClassVar[bool] = True

    def stamp(self) -> Iterator[str]:
        """The paths, sizes and times of change of all files."""
        return stamps(listing(self.path), self.path)

    def pictures(self) -> list[Captioned]:
        """See `scan`."""
        return scan(self.path)


@dataclass(frozen=True)
class Classes(Folder):
    """The pictures of a folder with a subfolder for each class, named after it."""

    def pictures(self) -> list[Captioned]:
        """Raises `UserError` when the folder is missing, has no pictures, or has some outside of its subfolders."""
        found = [picture for picture in listing(self.path) if picture.suffix.lower() in SUFFIXES]
        names = [file.relative_to(self.path) for file in found]
        if outside := next((name for name in names if len(name.parts) == 1), None):
            raise UserError(f"{self.path / outside} has no class: put every picture into a subfolder that is named after its class")
        if not found:
            raise UserError(f"{self.path} has no pictures; put {', '.join(sorted(SUFFIXES))} files into a subfolder for each class")
        return [Captioned(str(name), file, (), label=name.parts[0]) for name, file in zip(names, found)]


def label(path: Path) -> str:
    """A path's last part, of letters, digits and underscores."""
    return re.sub(r"\W+", "_", path.resolve().name).strip("_")


def stamps(files: Iterable[Path], folder: Path) -> Iterator[str]:
    """A line for each file that is another one when the file changed."""
    for file in files:
        status = file.stat()
        yield f"{os.path.relpath(file, folder)} {status.st_size} {status.st_mtime_ns}"


def listing(folder: Path) -> list[Path]:
    """Every file under `folder` but the hidden ones, in order. Raises `UserError` when the folder is missing."""
    if folder.is_file():
        raise UserError(f"{folder} is a file: set data.name to captioned_table for a table, or webdataset for a .tar")
    if not folder.is_dir():
        raise UserError(f"the data folder {folder} does not exist; set data.path to a folder of pictures")
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def scan(folder: Path) -> list[Captioned]:
    """Every picture under `folder` with its captions (none, if there are none), ordered by path.

    Raises `UserError` when the folder is missing or has no pictures, when a caption's picture is missing, and when a
    caption file cannot be read.
    """
    folder = Path(os.path.normpath(folder))
    files = listing(folder)
    found: dict[Path, list[str]] = {file: [] for file in files if file.suffix.lower() in SUFFIXES}
    if not found:
        raise UserError(f"{folder} has no pictures; put {', '.join(sorted(SUFFIXES))} files there or in its subfolders")
    missing = []
    for file in files:
        for picture, captions in _entries(file, found):
            if picture in found:
                gather(found[picture], captions)
            else:
                missing.append(f"{os.path.relpath(picture, folder)} (named by {file.relative_to(folder)})")
    if missing:
        raise without_picture(folder, missing)
    return [Captioned(os.path.relpath(file, folder), file, tuple(captions)) for file, captions in found.items()]


def without_picture(path: Path, missing: list[str]) -> UserError:
    """The error for captions whose pictures are not there."""
    remedy = "put the pictures back or remove their captions"
    return UserError(f"{path}: {len(missing)} captions have no picture, the first is {missing[0]}; {remedy}")


def gather(known: list[str], captions: list[str]) -> None:
    """Append those captions that are new."""
    known += [caption for caption in captions if caption not in known]


def _entries(file: Path, pictures: dict[Path, list[str]]) -> Iterator[tuple[Path, list[str]]]:
    """(picture, captions) pairs of one file; none when it is no caption file."""
    suffix = file.suffix.lower()
    if suffix in TABLES:
        yield from ((relative(file, name), captions) for name, captions in rows(file))
    try:
        if suffix == ".txt" and file.stem.lower() not in PROSE:
            yield from _beside(file, lines(file.read_text(encoding="utf-8-sig")), pictures)
        elif suffix == ".json":
            yield from _from_json(file, json.loads(file.read_text(encoding="utf-8-sig")), pictures)
    except (ValueError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"cannot read the captions in {file}: {error}; mend the file or remove it")


def lines(text: str) -> list[str]:
    """The captions of a text that has one a line."""
    return [line for line in map(str.strip, text.splitlines()) if line]


def _beside(file: Path, captions: list[str], pictures: dict[Path, list[str]]) -> Iterator[tuple[Path, list[str]]]:
    """The captions of `cat.txt` for every picture `cat.*`."""
    stem = file.with_suffix("")
    endings = sorted({*SUFFIXES, *map(str.upper, SUFFIXES)})
    candidates = [stem, *(stem.with_name(stem.name + ending) for ending in endings)]
    owners = [picture for picture in candidates if picture in pictures]
    for picture in owners or [stem.with_name(stem.name + ".*")]:
        yield picture, captions


def _from_json(file: Path, value: Any, pictures: dict[Path, list[str]]) -> Iterator[tuple[Path, list[str]]]:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        yield from ((relative(file, name), captions) for name, captions in _named(value))
    elif isinstance(value, dict) and value and all(Path(name).suffix.lower() in SUFFIXES for name in value):
        for name, captions in value.items():
            yield relative(file, name), captions_in(captions)
    elif isinstance(value, dict) and not any(key in value for key in CAPTION_KEYS):
        return
    else:
        yield from _beside(file, captions_in(value), pictures)


def rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(picture, captions) of each row of a .csv, .tsv, .jsonl or .parquet table.

    A row has one of `FILE_KEYS` and one of `CAPTION_KEYS`, in any case. Raises `UserError` naming the row that has not.
    """
    try:
        yield from _named(_read_rows(file))
    except (ValueError, csv.Error, OSError) as error:
        raise _unreadable(file, error) from error


def _read_rows(file: Path) -> Iterator[Any]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file)
        known = [name for name in table.schema_arrow.names if name.lower() in FILE_KEYS + CAPTION_KEYS]
        for batch in table.iter_batches(columns=known):
            yield from batch.to_pylist()
    else:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            if suffix == ".jsonl":
                yield from (json.loads(line) for line in opened if line.strip())
            else:
                yield from csv.DictReader(opened, delimiter="\t" if suffix == ".tsv" else ",")


def _named(table: Iterable[Any]) -> Iterator[tuple[str, list[str]]]:
    for number, row in enumerate(table, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object with names")
        row = {str(key).lower(): value for key, value in row.items()}
        name = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        if not isinstance(name, str) or not any(key in row for key in CAPTION_KEYS):
            keys = f"{'/'.join(FILE_KEYS)} and {'/'.join(CAPTION_KEYS)}"
            raise ValueError(f"row {number} has {', '.join(row)} and needs one each of {keys}, the first a path or URL")
        yield name, captions_in(row)


def relative(file: Path, name: str) -> Path:
    """The picture that a table or list calls `name`."""
    return Path(os.path.normpath(file.parent / name))


def captions_in(value: Any) -> list[str]:
    """The captions in a string, a list of strings, or an object that has them under one of `CAPTION_KEYS`."""
    if isinstance(value, dict):
        value = next((value[key] for key in CAPTION_KEYS if value.get(key)), [])
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{str(value)[:60]!r} is neither a caption nor a list of captions")
    return [caption.strip() for caption in captions if caption.strip()]
