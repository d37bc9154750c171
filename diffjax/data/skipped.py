"""The pictures that were left out of a data set, each with its reason."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffjax.utils import files

NAME = "left_out.jsonl"


@dataclass(frozen=True)
class Skipped:
    """What was left out of the data that are, or would be, prepared in `folder`: JSON lines, a `name` and a
    `reason` each.

    They stand in `left_out.jsonl` there; in the cache folder where that cannot be written. Several processes may
    add lines.
    """

    folder: Path

    @property
    def path(self) -> Path:
        beside = self.folder / NAME
        if os.access(beside if beside.exists() else self.folder, os.W_OK):
            return beside
        digest = hashlib.sha256(os.fsencode(os.path.abspath(self.folder))).hexdigest()
        return files.home() / "data" / "skipped" / f"{digest[:16]}.jsonl"

    def add(self, entries: Iterable[tuple[str, str]]) -> None:
        """Add (name, reason) pairs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = (json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in entries)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write("".join(told))

    def read(self) -> list[tuple[str, str]]:
        """Each distinct (name, reason) once, in order of arrival; lines that were damaged are passed over."""
        paths = dict.fromkeys(path for path in (self.folder / NAME, self.path) if path.exists())
        lines = (line for path in paths for line in path.read_bytes().split(b"\n") if line)
        return list(dict.fromkeys(filter(None, map(_entry, lines))))


def _entry(line: bytes) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
        return entry["name"], entry["reason"]
    except (ValueError, KeyError, TypeError):
        return None
