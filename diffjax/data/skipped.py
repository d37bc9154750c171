"""The log of the pictures that were left out of a data set."""

from dataclasses import dataclass
from pathlib import Path

from diffjax import files


@dataclass(frozen=True)
class Skipped:
    """What was left out of the data set `name` and why: a text file, a line each, that several processes may write."""

    name: str

    @property
    def path(self) -> Path:
        return files.home() / "data" / "skipped" / f"{self.name.replace('/', '-')}.log"

    def add(self, what: str, why: str) -> None:
        line = "\t".join(" ".join(part.split()) for part in (what, why)) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as log:
            log.write(line)

    def lines(self) -> list[str]:
        """Each distinct line once, in order of arrival."""
        if not self.path.exists():
            return []
        return list(dict.fromkeys(self.path.read_text(encoding="utf-8").splitlines()))
