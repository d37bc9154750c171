"""Write the tables of docs/configs.md from the base of configs, `diffjax/config/base.py`.

python scripts/config_reference.py
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffjax import build
from diffjax.config import base, kinds, listing
from diffjax.config.completion import join
from diffjax.config.fields import KINDS, Choice, Field, Maybe, Place, Table, arguments_of
from diffjax.models.options import Request

PAGE = Path(__file__).parents[1] / "docs" / "configs.md"
BEGIN, END = "<!-- begin: written by scripts/config_reference.py -->\n", "<!-- end -->\n"

Row = tuple[str, str, str, str]

BASES = {"pixels": kinds.PIXELS, "imagen": kinds.IMAGEN, "ddpm": kinds.DDPM, "finetune": kinds.FINETUNE}


def page(text: str) -> str:
    """The page with the tables as the base has them."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + "\n".join(tables()) + END + rest.partition(END)[2]


def tables() -> Iterator[str]:
    """The parts of the reference, each a heading and a table."""
    yield _table("Bases of kinds", "", ("field", *BASES), _of_kinds())
    fields = base.table({"network": "dit"}).fields
    first = {name: place for name, place in fields.items() if isinstance(place, Field)}
    yield _fields("Every experiment", "", Table("", first))
    for name, place in fields.items():
        if not isinstance(place, Field) and name not in build.NETWORKS:
            inner = place.of if isinstance(place, Maybe) else place
            yield _fields(f"`{name}`", inner.meaning, place, name)
    for name in build.NETWORKS:
        yield _fields(f"`{name}`", base.network(name).meaning, base.network(name), name)
    said = "these instead of `classes` to the network's table, and in `sample` only `prompts`"
    yield _fields("A published model that is trained on", said, Table("", base.PUBLISHED))
    said = "the fields of an experiment that has a model and nothing to train; None is the model's own choice"
    yield _fields("Sampling", said, Table("", listing.sampling_fields(Request)))


def _of_kinds() -> Iterator[tuple[str, ...]]:
    leaves = [dict(_leaves(table)) for table in BASES.values()]
    sections = [*base.table({"network": "dit"}).fields, *base.PUBLISHED]
    paths = dict.fromkeys(path for found in leaves for path in found)
    for path in sorted(paths, key=lambda path: sections.index(path.partition(".")[0])):
        yield f"`{path}`", *(repr(found[path]) if path in found else "" for found in leaves)


def _leaves(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, join(path, name))
        else:
            yield join(path, name), value


def _fields(heading: str, said: str, place: Place, path: str = "") -> str:
    return _table(heading, said, ("field", "default", "can be", "meaning"), _rows(path, place))


def _rows(path: str, place: Place) -> Iterator[Row]:
    """The rows of what stands at a path."""
    if isinstance(place, Maybe):
        yield f"`{path}`", "None", "a table", f"None: {place.absent}"
        place = place.of
    if isinstance(place, Field):
        default = "needed" if place.needed else repr(place.default)
        can = place.range or KINDS.get(place.kind, "").partition(" such")[0]
        yield f"`{path}`", default, can, place.meaning
    elif isinstance(place, Choice):
        yield (
            f"`{path}.name`",
            repr(place.default) if place.default else "needed",
            f"one of {', '.join(place.makers)}",
            "",
        )
        for name, inner in place.common.items():
            yield from _rows(join(path, name), inner)
        yield from _of_choices(path, place)
    elif path == "prior.data":
        yield f"`{path}`", "", "a table", "as `data`"
    else:
        for name, inner in place.fields.items():
            yield from _rows(join(path, name), inner)
        for name, inner in (place.others or {}).items():
            yield from ((field, "", can, meaning) for field, _, can, meaning in _rows(join(path, name), inner))


def _of_choices(path: str, choice: Choice) -> Iterator[Row]:
    """The arguments of all choices; a row says of which it is one."""
    found: dict[Row, list[str]] = {}
    for name, maker in choice.makers.items():
        for row in _rows(path, arguments_of(maker, name, choice.arguments.get(name, {}), choice.given)):
            found.setdefault(row, []).append(name)
    for (field, default, can, meaning), names in found.items():
        yield field, default, can, f"of {', '.join(names)}: {meaning}"


def _table(heading: str, said: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, ["---"] * len(head), *rows)
    ]
    return "\n".join([f"### {heading}", "", *([f"{said[0].upper()}{said[1:]}.", ""] if said else []), *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
