"""A table of paths or URLs with captions, in one file or many, as a source of captioned pictures.

Pictures on the web are fetched by `Table.fetch`, which `diffjax prepare` calls, and never by training.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffjax import files
from diffjax.data import download
from diffjax.data.captions import TABLES, Captioned, gather, label, relative, rows, stamps, without_picture
from diffjax.errors import UserError


def parts(path: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files that a path means: itself, all in a folder, or those of a pattern such as `shards/*.tar`, in order.

    Raises `UserError` when there is none, or one has none of the suffixes.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
    else:
        found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
    if not found or any(file.suffix.lower() not in suffixes for file in found):
        kinds = ", ".join(sorted(suffixes))
        raise UserError(f"data.path={path} is no {kinds} file, folder of them or pattern such as NAME-*: mend the path")
    return found


@dataclass(frozen=True)
class Table:
    """The pictures that the rows of a table name, each once, with its captions from all rows.

    One that cannot be fetched or is too small is left out.
    """

    path: Path
    refuses_small: ClassVar[bool] = False

    @functools.cached_property
    def files(self) -> list[Path]:
        return parts(self.path, TABLES)

    @functools.cached_property
    def captions(self) -> dict[str | Path, list[str]]:
        """By URL, or by file. Raises `UserError` for a file that is missing."""
        found: dict[str | Path, list[str]] = {}
        for table in self.files:
            for name, captions in rows(table):
                gather(found.setdefault(name if download.is_link(name) else relative(table, name), []), captions)
        missing = [str(place) for place in found if isinstance(place, Path) and not place.is_file()]
        if missing:
            raise without_picture(self.path, missing)
        return found

    @property
    def links(self) -> list[str]:
        return [place for place in self.captions if isinstance(place, str)]

    @functools.cached_property
    def log(self) -> Path:
        """The failures of this very table: JSON lines, a `url` and a `reason` each; it is there once all were tried."""
        digest = hashlib.sha256()
        for table in self.files:
            with table.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return files.home() / "downloads" / f"failed-{label(self.path)}-{digest.hexdigest()[:16]}.jsonl"

    def failed(self) -> dict[str, str]:
        """Why each of the pictures that are not there could not be fetched. Raises `UserError` before `fetch` is done."""
        if not self.links:
            return {}
        if not self.log.exists():
            raise UserError(
                f"{self.path} names {len(self.links)} pictures on the web, which training does not fetch: "
                "run `diffjax prepare` with the same --config first"
            )
        failures = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        return {failure["url"]: failure["reason"] for failure in failures}

    def fetch(self, retry: bool = False) -> None:
        """Fetch what was neither fetched nor tried before; with `retry` also what failed."""
        if not self.links:
            return
        failed = self.failed() if self.log.exists() and not retry else {}
        absent = [url for url in self.links if url not in failed and not download.place(url).exists()]
        failed |= download.fetch(absent) if absent else {}
        told = (json.dumps({"url": url, "reason": reason}, ensure_ascii=False) + "\n" for url, reason in failed.items())
        files.write_atomic(self.log, "".join(told).encode())
        print(f"{len(self.links) - len(failed)} of {len(self.links)} pictures are fetched")
        if failed:
            print(f"why not the others: {self.log} (--retry tries them again)")

    def stamp(self) -> Iterator[str]:
        """The table, what could not be fetched, and the sizes and times of change of the files."""
        yield self.log.name
        yield from self.failed()
        yield from stamps((place for place in self.captions if isinstance(place, Path)), self.path.parent)

    def pictures(self) -> list[Captioned]:
        failed = self.failed()
        return [self._picture(place, tuple(captions), failed) for place, captions in self.captions.items()]

    def _picture(self, place: str | Path, captions: tuple[str, ...], failed: dict[str, str]) -> Captioned:
        if isinstance(place, Path):
            return Captioned(os.path.relpath(place, self.path.parent), place, captions)
        file = download.place(place)
        if place not in failed and not file.exists():
            raise UserError(f"{place} is in the cache no more: run `diffjax prepare` with the same --config again")
        return Captioned(place, file, captions, problem=failed.get(place, ""))
