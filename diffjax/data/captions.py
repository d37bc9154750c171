"""Which captions belong to which picture of a folder, in the layouts that people have.

Beside a picture `cat.png`: `cat.txt` (one caption a line) or `cat.json` (a caption, a list of captions, or an object
with one of `CAPTION_KEYS`); `cat.png.txt` and `cat.png.json` too. Anywhere in the folder: a table (`rows.py`) whose
pictures are paths relative to it, or a `.json` object from file to captions. Folders are searched recursively, through
links too, and a picture's captions are gathered from everywhere. Names are found in whatever case and form of Unicode
they stand.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffjax.data.images import READ, SUFFIXES
from diffjax.data.rows import CAPTION_KEYS, TABLES, captions_in, json_in, named, read_rows, text_in, unreadable
from diffjax.data.walk import composed, files_under, loosely, printable, relative
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted

PROSE = frozenset({"readme", "license", "licence", "attribution", "notice", "credits", "copyright"})
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})


@dataclass(frozen=True)
class Captioned:
    """A picture, its name in the data set and its captions; its bytes are `length` (-1: all) of `file` from `start` on.

    `label` is its class, empty without; a `problem` says why it cannot be used.
    """

    name: str
    file: Path
    captions: tuple[str, ...] = ()
    start: int = 0
    length: int = -1
    label: str = ""
    problem: str = ""

    def read(self) -> bytes:
        """The encoded picture. Raises `OSError` where it cannot be read."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length)


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder; one that is too small is refused, since it can be mended."""

    path: Path
    refuses_small: ClassVar[bool] = True

    def stamp(self) -> Iterator[str]:
        """The paths, sizes and times of change of all files, and what cannot be used."""
        found = files_under(self.path)
        yield from stamps(found.files, self.path)
        yield from (f"{os.path.relpath(file, self.path)} {why}" for file, why in found.left_out.items())

    def pictures(self) -> list[Captioned]:
        """See `scan`."""
        return scan(self.path)


@dataclass(frozen=True)
class Classes(Folder):
    """The pictures of a folder with a subfolder for each class, named after it; captions beside them are not read."""

    def pictures(self) -> list[Captioned]:
        """Raises `UserError` when the folder is missing, has no pictures, or has some outside of its subfolders."""
        files, left_out = files_under(self.path)
        found = list(filter(_is_picture, files))
        if outside := next((file for file in found if file.parent == self.path), None):
            raise UserError(f"{outside} has no class: put every picture into a subfolder that is named after its class")
        if not found:
            raise UserError(f"{self.path} has no pictures; put {READ} files into a subfolder for each class")
        names = {file: file.relative_to(self.path) for file in sorted([*found, *left_out])}
        classes = {printable(names[file].parts[0]) for file in found}
        if {name.lower() for name in classes} <= SPLITS:
            raise UserError(
                f"{self.path} has the folders {', '.join(sorted(classes))}: set data.path to the one of them to "
                "train on"
            )
        labels = {file: label if (label := printable(name.parts[0])) in classes else "" for file, name in names.items()}
        return [
            Captioned(str(name), file, label=labels[file], problem=left_out.get(file, ""))
            for file, name in names.items()
        ]


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def label(path: Path) -> str:
    """A path's last part, of letters, digits and underscores."""
    return re.sub(r"\W+", "_", path.resolve().name).strip("_") or "pictures"


def stamps(files: Iterable[Path], folder: Path) -> Iterator[str]:
    """A line for each file that is another one when the file changed; a file that is not there has one too."""
    for file in files:
        try:
            status = file.stat()
            yield f"{os.path.relpath(file, folder)} {status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError) as error:
            yield f"{os.path.relpath(file, folder)} {error}"


def scan(folder: Path) -> list[Captioned]:
    """Every picture under `folder` with its captions (none, if there are none), ordered by path.

    What cannot be used (see `files_under`) and faulty rows of tables have a `problem`. Raises `UserError` when the
    folder is missing or has no pictures, when a caption's picture is missing, and when a caption file cannot be read.
    """
    folder = Path(os.path.abspath(folder))
    files, left_out = files_under(folder)
    pictures = Pictures([*filter(_is_picture, files), *left_out])
    if not any(map(_is_picture, files)):
        raise UserError(f"{folder} has no pictures; put {READ} files there or in its subfolders")
    missing, faulty = [], []
    for file in files:
        for picture, captions, problem in _entries(file, pictures):
            if problem:
                faulty.append(Captioned(f"{os.path.relpath(file, folder)} {picture}", file, problem=problem))
            elif (known := pictures.known(Path(picture))) is None:
                missing.append(f"{os.path.relpath(picture, folder)} (named by {file.relative_to(folder)})")
            else:
                gather(pictures.captions[known], captions)
    if missing:
        raise without_picture(folder, missing)
    found = sorted(pictures.captions.items())
    return [
        *(
            Captioned(os.path.relpath(file, folder), file, tuple(said), problem=left_out.get(file, ""))
            for file, said in found
        ),
        *faulty,
    ]


class Pictures:
    """The captions of each picture of a folder, and the pictures by what they are called."""

    def __init__(self, files: Iterable[Path]):
        self.captions: dict[Path, list[str]] = {file: [] for file in files}
        self._beside: dict[str, list[Path]] = {}
        self._real: dict[str, Path] | None = None
        for file in self.captions:
            for called in (str(file), str(file.with_suffix(""))):
                for like in {composed(called), loosely(called)}:
                    self._beside.setdefault(like, []).append(file)

    def beside(self, stem: Path) -> list[Path]:
        """The pictures that are called `stem` or `stem.*`."""
        return self._beside.get(composed(str(stem))) or self._beside.get(loosely(str(stem)), [])

    def known(self, path: Path) -> Path | None:
        """The picture at a path, which may lead there through links."""
        if path in self.captions:
            return path
        if self._real is None:
            self._real = {os.path.realpath(file): file for file in self.captions}
        return self._real.get(os.path.realpath(path))


def without_picture(path: Path, missing: list[str]) -> UserError:
    """The error for captions whose pictures are not there."""
    remedy = "put the pictures back or remove their captions"
    return UserError(
        f"{path}: {counted(len(missing), 'caption')} without a picture, the first is {missing[0]}; {remedy}"
    )


def gather(known: list[str], captions: list[str]) -> None:
    """Append those captions that are new."""
    known += [caption for caption in captions if caption not in known]


def _entries(file: Path, pictures: Pictures) -> Iterator[tuple[Path | str, list[str], str]]:
    """(picture, captions, "") of all that one file says, or (row, [], problem); none when it is no caption file."""
    suffix = file.suffix.lower()
    if suffix in TABLES:
        yield from _of_rows(file, read_rows(file))
    try:
        if suffix == ".txt" and file.stem.lower() not in PROSE:
            yield from _beside(file, lines(text_in(file.read_bytes())), pictures)
        elif suffix == ".json":
            yield from _from_json(file, json_in(text_in(file.read_bytes())), pictures)
    except (ValueError, OSError) as error:
        raise unreadable(file, error) from error


def _of_rows(file: Path, table: Iterable[Any]) -> Iterator[tuple[Path | str, list[str], str]]:
    for row in table:
        if row.problem:
            yield row.where, [], row.problem
        elif not isinstance(row.picture, str):
            raise UserError(f"{file} holds pictures itself: set data.name to captioned_table and data.path to it")
        else:
            yield relative(file, row.picture), row.captions, ""


def lines(text: str) -> list[str]:
    """The captions of a text that has one a line."""
    return [line for line in map(str.strip, re.split(r"[\r\n]+", text)) if line]


def _beside(file: Path, captions: list[str], pictures: Pictures) -> Iterator[tuple[Path, list[str], str]]:
    """The captions of `cat.txt` for every picture `cat.*`."""
    stem = file.with_suffix("")
    for picture in pictures.beside(stem) or [stem.with_name(stem.name + ".*")]:
        yield picture, captions, ""


def _from_json(file: Path, value: Any, pictures: Pictures) -> Iterator[tuple[Path | str, list[str], str]]:
    if isinstance(value, list) and value and all(isinstance(row, dict | None) for row in value):
        yield from _of_rows(file, named(enumerate(value, 1)))
    elif isinstance(value, dict) and value and all(Path(name).suffix.lower() in SUFFIXES for name in value):
        for name, captions in value.items():
            yield relative(file, name), captions_in(captions), ""
    elif isinstance(value, dict) and not any(key in value for key in CAPTION_KEYS):
        return
    else:
        yield from _beside(file, captions_in(value), pictures)
