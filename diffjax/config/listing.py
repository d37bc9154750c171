"""A whole config in lines: `a.b.c = value  # meaning`."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from diffjax.config import base
from diffjax.config.completion import join, plain, trains
from diffjax.config.fields import Choice, Field, Maybe, Place, Table
from diffjax.utils.errors import UserError, unknown

COLUMN = 48
"""Where meanings begin, at the most, but for values that are longer."""


@dataclass(frozen=True)
class Line:
    """A field of a config and its value; `differs` says whether it is the base's, and `was` what the base has instead,
    if anything.
    """

    path: str
    value: Any
    field: Field
    differs: bool = False
    was: str = ""

    def __str__(self) -> str:
        return f"{self.path} = {self.value!r}"

    @property
    def comment(self) -> str:
        """Whether it differs, its meaning, what it can be, and what the base has."""
        said = "; ".join(filter(None, (self.field.meaning, self.field.range, self.was)))
        return f"# {'*' if self.differs else ' '} {said}".rstrip()


def lines(config: Mapping[str, Any] | ConfigDict, request: type) -> Iterator[str]:
    """A whole config, a field a line with its meaning, as Python reads it; what differs from the base has a *.

    An experiment that only samples has the fields of the dataclass `request`, their meanings in its metadata (`help`).
    Raises `UserError` for what is no experiment, and for a field that there is not.
    """
    whole = plain(config)
    if not trains(whole) and ("train" in whole or "model" not in whole):
        lacking = "data" if "train" in whole else "train, nor a model to draw with"
        raise UserError(
            f"the config has no {lacking}: begin with one of the experiments that `diffjax init DIR` writes"
        )
    of = base.table(whole) if trains(whole) else Table("", sampling_fields(request))
    listed = list(_table("", whole, of))
    column = min(COLUMN, max(len(str(line)) for line in listed if isinstance(line, Line)))
    yield "# * is what differs from the default; change a field with --config.FIELD=VALUE"
    for line in listed:
        yield f"{line!s:{column}}  {line.comment}" if isinstance(line, Line) else f"\n# {line}"


def sampling_fields(request: type) -> dict[str, Place]:
    """The fields of an experiment that only samples: those of the dataclass `request`."""
    options = dataclasses.fields(request)
    found = {option.name: Field(option.metadata.get("help", ""), option.default) for option in options}
    return {"model": base.PUBLISHED["model"], **{name: field for name, field in found.items() if name != "model"}}


def _table(path: str, config: Mapping[str, Any], of: Table) -> Iterator[Line | str]:
    """The lines of a table: its fields, then each table in it under its heading."""
    others = {name: (of.others or {}).get(name, Field("", object)) for name in config if name not in of.fields}
    if others and of.others is None:
        raise unknown("config key", join(path, next(iter(others))), of.fields)
    inner = []
    for name, place in {**of.fields, **others}.items():
        where, value = join(path, name), config[name]
        if isinstance(place, Maybe) and value is None:
            yield Line(where, None, Field(place.absent))
        elif isinstance(place, Field):
            differs = place.needed or value != place.default
            yield Line(
                where, value, place, differs, f"default {place.default!r}" if differs and not place.needed else ""
            )
        else:
            inner.append(_inner(where, value, place))
    yield from itertools.chain.from_iterable(inner)


def _inner(path: str, config: Mapping[str, Any], place: Table | Choice | Maybe) -> Iterator[Line | str]:
    """The lines of a table under its heading; of one that the base does not have, the first line says so."""
    found = place.of if isinstance(place, Maybe) else place
    found = found.table(config["name"], path) if isinstance(found, Choice) else found
    yield f"{path}: {found.meaning}"
    for number, line in enumerate(_table(path, config, found)):
        if isinstance(place, Maybe) and isinstance(line, Line) and number == 0:
            line = dataclasses.replace(line, differs=True, was=f"default {path} = None")
        yield line
