"""Which captions belong to which picture of a folder, in the layouts that people have.

Beside a picture `cat.png`: `cat.txt` (one caption a line) or `cat.json` (a caption, a list of captions, or an object
with one of `CAPTION_KEYS`); `cat.png.txt` and `cat.png.json` too. Anywhere in the folder: a `.csv`, `.tsv` or `.jsonl`
table, or a `.json` list, whose rows have one of `FILE_KEYS` (a path relative to the table) and one of `CAPTION_KEYS`;
or a `.json` object from file to captions. Folders are searched recursively, and a picture's captions are gathered from
everywhere.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffjax.data.images import SUFFIXES
from diffjax.errors import UserError

FILE_KEYS = ("file_name", "filename", "file", "image", "image_path", "path")
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "description")
PROSE = frozenset({"readme", "license", "licence", "attribution", "notice", "credits", "copyright"})


@dataclass(frozen=True)
class Captioned:
    """A picture file and its captions."""

    file: Path
    captions: tuple[str, ...]


def listing(folder: Path) -> list[Path]:
    """Every file under `folder` but the hidden ones, in order. Raises `UserError` when the folder is missing."""
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
                found[picture] += [caption for caption in captions if caption not in found[picture]]
            else:
                missing.append(f"{os.path.relpath(picture, folder)} (named by {file.relative_to(folder)})")
    if missing:
        remedy = "put the pictures back or remove their captions"
        raise UserError(f"{folder}: {len(missing)} captions have no picture, the first is {missing[0]}; {remedy}")
    return [Captioned(picture, tuple(captions)) for picture, captions in found.items()]


def _entries(file: Path, pictures: dict[Path, list[str]]) -> Iterator[tuple[Path, list[str]]]:
    """(picture, captions) pairs of one file; none when it is no caption file."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".txt" and file.stem.lower() not in PROSE:
            lines = (line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines())
            yield from _beside(file, [line for line in lines if line], pictures)
        elif suffix == ".json":
            yield from _from_json(file, json.loads(file.read_text(encoding="utf-8-sig")), pictures)
        elif suffix in (".csv", ".tsv"):
            with file.open(encoding="utf-8-sig", newline="") as rows:
                yield from _from_rows(file, csv.DictReader(rows, delimiter="\t" if suffix == ".tsv" else ","))
        elif suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            yield from _from_rows(file, (json.loads(line) for line in lines if line.strip()))
    except (ValueError, csv.Error, OSError) as error:
        raise UserError(f"cannot read the captions in {file}: {error}; mend the file or remove it") from error


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
        yield from _from_rows(file, value)
    elif isinstance(value, dict) and value and all(Path(name).suffix.lower() in SUFFIXES for name in value):
        for name, captions in value.items():
            yield _relative(file, name), _captions(captions)
    elif isinstance(value, dict) and not any(key in value for key in CAPTION_KEYS):
        return
    else:
        yield from _beside(file, _captions(value), pictures)


def _from_rows(file: Path, rows: Any) -> Iterator[tuple[Path, list[str]]]:
    for number, row in enumerate(rows, 1):
        name = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        if name is None or not any(key in row for key in CAPTION_KEYS):
            keys = f"{'/'.join(FILE_KEYS)} and {'/'.join(CAPTION_KEYS)}"
            raise ValueError(f"row {number} has {', '.join(map(str, row))} and needs one each of {keys}")
        yield _relative(file, name), _captions(row)


def _relative(file: Path, name: str) -> Path:
    return Path(os.path.normpath(file.parent / name))


def _captions(value: Any) -> list[str]:
    """The captions in a string, a list of strings, or an object that has them under one of `CAPTION_KEYS`."""
    if isinstance(value, dict):
        value = next((value[key] for key in CAPTION_KEYS if value.get(key)), [])
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{str(value)[:60]!r} is neither a caption nor a list of captions")
    return [caption.strip() for caption in captions if caption.strip()]
