"""A table of paths or URLs with captions, in one file or many, as a source of captioned pictures.

Pictures on the web are fetched by `Table.fetch`, which `diffjax prepare` calls, and never by training. Parquet files
may hold the pictures themselves.
"""

import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffjax.data import download
from diffjax.data.captions import Captioned, gather, label, stamps, without_picture
from diffjax.data.prepare import in_parallel
from diffjax.data.rows import TABLES, Inside, read_rows
from diffjax.data.walk import ARCHIVES, relative
from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.utils.progress import counted, track

HELD_GROUPS = 2
_reading = threading.Lock()


def parts(path: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files that a path means: itself, all in a folder or its subfolders, or those of a pattern such as
    `shards/*.tar`.

    Raises `UserError` when there is none, one has none of the suffixes, or a folder has some that are packed.
    """
    if path.is_dir():
        every = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        found = [file for file in every if file.suffix.lower() in suffixes]
        if packed := next((file for file in every if file.suffix.lower() in ARCHIVES - {*suffixes}), None):
            raise UserError(f"{packed} is packed: unpack it beside the others, or take it away")
    else:
        found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
    if not found or any(file.suffix.lower() not in suffixes for file in found):
        kinds = ", ".join(sorted(suffixes))
        raise UserError(f"data.path={path} is no {kinds} file, folder of them or pattern such as NAME-*: mend the path")
    return found


@dataclass(frozen=True)
class Held(Captioned):
    """A picture in a Parquet file: in row `row` of a column's row group, where `read` finds its bytes or the path
    to them.
    """

    inside: Inside = field(kw_only=True)

    def read(self) -> bytes:
        value = _column(self.file, self.inside.column, self.inside.group)[self.inside.row].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and path:
            return relative(self.file, path).read_bytes()
        if data is None:
            raise OSError("the table holds nothing there")
        return data


def _column(file: Path, column: str, group: int) -> Any:
    """A column's row group; the last few are kept, for pictures are read in order, by several threads."""
    with _reading:
        return _read_column(file, column, group)


@functools.lru_cache(maxsize=HELD_GROUPS)
def _read_column(file: Path, column: str, group: int) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file).read_row_group(group, columns=[column]).column(0)


@dataclass(frozen=True)
class _Contents:
    """What the rows of all tables say: captions by file or URL, pictures that the tables hold, and faulty rows."""

    captions: dict[str | Path, list[str]] = field(default_factory=dict)
    held: list[Captioned] = field(default_factory=list)
    faulty: list[Captioned] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """The pictures that the rows of a table name, each once, with its captions from all rows, or that it holds.

    One that is not there, cannot be fetched or is too small is left out, as is a faulty row.
    """

    path: Path
    refuses_small: ClassVar[bool] = False

    @functools.cached_property
    def files(self) -> list[Path]:
        return parts(self.path, TABLES)

    @functools.cached_property
    def contents(self) -> _Contents:
        """Raises `UserError` when none of the files is there."""
        found = _Contents()
        for table in self.files:
            called = os.path.relpath(table, self.path.parent)
            for row in read_rows(table):
                if row.problem:
                    found.faulty.append(Captioned(f"{called} {row.where}", table, problem=row.problem))
                elif isinstance(row.picture, Inside):
                    name, said, inside = f"{called} {row.where}", tuple(row.captions), row.picture
                    found.held.append(Held(name, table, said, label=inside.label, inside=inside))
                else:
                    place = (
                        row.picture
                        if download.is_link(row.picture)
                        else relative(Path(os.path.abspath(table)), row.picture)
                    )
                    gather(found.captions.setdefault(place, []), row.captions)
        named = [place for place in found.captions if isinstance(place, Path)]
        if named and not any(map(os.path.lexists, named)):
            raise without_picture(self.path, list(map(str, named)))
        return found

    @property
    def links(self) -> list[str]:
        return [place for place in self.contents.captions if isinstance(place, str)]

    @functools.cached_property
    def log(self) -> Path:
        """The failures of this very table: JSON lines, a `url` and a `reason` each; it is there once all were tried."""
        digest = hashlib.sha256()
        for table in self.files:
            with table.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return files.home() / "downloads" / f"failed-{label(self.path)}-{digest.hexdigest()[:16]}.jsonl"

    def failed(self) -> dict[str, str]:
        """Why each of the pictures that are not there could not be fetched. Raises `UserError` before `fetch`
        is done.
        """
        if not self.links:
            return {}
        if not self.log.exists():
            raise UserError(
                f"{self.path} names {counted(len(self.links), 'picture')} on the web, which training does not fetch: "
                "run `diffjax prepare` with the same --config first"
            )
        failures = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        return {failure["url"]: failure["reason"] for failure in failures}

    def fetch(self, retry: bool = False) -> None:
        """Fetch what was neither fetched nor tried before; with `retry` also what failed, and what was kept broken."""
        if not self.links:
            return
        failed = self.failed() if self.log.exists() and not retry else {}
        if retry:
            self._drop_broken()
        absent = [url for url in self.links if url not in failed and not download.place(url).exists()]
        failed |= download.fetch(absent) if absent else {}
        told = (json.dumps({"url": url, "reason": reason}) + "\n" for url, reason in failed.items())
        files.write_atomic(self.log, "".join(told).encode())
        print(f"{len(self.links) - len(failed)} of {counted(len(self.links), 'picture')} fetched")
        if failed:
            print(f"why not the others: {self.log} (--retry tries them again)")

    def _drop_broken(self) -> None:
        """Remove what an earlier version kept though it was cut off."""
        kept = [url for url in self.links if download.place(url).exists()]
        checked = in_parallel(download.broken, kept, os.cpu_count() or 1)
        for url, broken in track(checked, "checking what was fetched", len(kept)):
            if broken:
                download.place(url).unlink()

    def stamp(self) -> Iterator[str]:
        """The tables, what could not be fetched, the sizes of what was, and the sizes and times of change of
        the files.
        """
        if self.contents.held:
            yield from stamps(self.files, self.path.parent)
        else:
            yield self.log.name
        yield from self.failed()
        for url in self.links:
            if (file := download.place(url)).exists():
                yield f"{url} {file.stat().st_size}"
        yield from stamps((place for place in self.contents.captions if isinstance(place, Path)), self.path.parent)

    def pictures(self) -> list[Captioned]:
        failed, told = self.failed(), self.contents
        named = [self._picture(place, tuple(captions), failed) for place, captions in told.captions.items()]
        return [*named, *told.held, *told.faulty]

    def _picture(self, place: str | Path, captions: tuple[str, ...], failed: dict[str, str]) -> Captioned:
        if isinstance(place, Path):
            problem = (
                ""
                if os.path.isfile(place)
                else "is a link that leads nowhere"
                if place.is_symlink()
                else "is not there"
            )
            return Captioned(os.path.relpath(place, self.path.parent), place, captions, problem=problem)
        file = download.place(place)
        if place not in failed and not file.exists():
            raise UserError(f"{place} is in the cache no more: run `diffjax prepare` with the same --config again")
        problem = f"cannot be fetched: {failed[place]}" if place in failed else ""
        return Captioned(place, file, captions, problem=problem)
