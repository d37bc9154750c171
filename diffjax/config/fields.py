"""What a base is made of: fields and tables, each with its meaning."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffjax import build, user_code
from diffjax.utils import processor
from diffjax.utils.errors import UserError, unknown

MISSING = inspect.Parameter.empty

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list such as (1, 2)"}


@dataclass(frozen=True)
class Field:
    """A field that is no table: what it means, and its default; a type stands for what an experiment must say itself.

    `allowed` is the interval of its numbers, such as "[0, 1)", or the values to choose from; a name can always be one's
    own, `module:name`. Without it, any finite number or any value of the default's kind will do.
    """

    meaning: str
    default: Any = MISSING
    allowed: str | Collection = ""

    @property
    def needed(self) -> bool:
        """Whether an experiment must say it."""
        return self.default is MISSING or isinstance(self.default, type)

    @property
    def kind(self) -> type:
        """The type of its values; `object` where any will do."""
        if self.default is MISSING or self.default is None:
            return object
        return self.default if isinstance(self.default, type) else type(self.default)

    @property
    def range(self) -> str:
        """What it can be, in words; "" for all of its kind."""
        if isinstance(self.allowed, str):
            return _in_words(self.allowed) if self.allowed else ""
        return f"one of {', '.join(map(str, self.allowed))}"

    def checked(self, path: str, value: Any) -> Any:
        """The value as one of its kind. Raises `UserError`, naming the path, for another kind, and for one that is not
        allowed.
        """
        value = tuple(value) if isinstance(value, (list, tuple)) else value
        value = float(value) if self.kind is float and type(value) is int else value
        if self.kind in KINDS and type(value) is not self.kind:
            raise UserError(f"config key {path} takes {KINDS[self.kind]}, not {value!r}")
        if isinstance(self.allowed, str):
            if isinstance(value, (int, float)):
                _check_range(path, value, self.allowed or "(-inf, inf)")
        elif value not in self.allowed and not user_code.is_own(value):
            raise unknown(path, str(value), map(str, self.allowed))
        return value


@dataclass(frozen=True)
class Table:
    """A table of fields. One that has `others` can have any beside them; these are the meanings of some."""

    meaning: str
    fields: Mapping[str, "Place"]
    others: Mapping[str, Field] | None = None


@dataclass(frozen=True)
class Choice:
    """A table with a `name` of `makers`; its other fields are the arguments of what is named, and those of `common`.

    `arguments` are their meanings, by name; `given` are arguments that the code gives, which are no fields. Left out of
    a config it is that of `default`, if there is one.
    """

    meaning: str
    makers: Mapping[str, Callable]
    arguments: Mapping[str, Mapping[str, Field]]
    common: dict[str, "Place"] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    default: str = ""

    def table(self, name: str, path: str) -> Table:
        """The table of that name. Raises `UserError` for a name that is not there."""
        maker = build.named(f"{path}.name", self.makers, name)
        found = arguments_of(maker, name, self.arguments.get(name, {}), self.given)
        first = {"name": Field("", self.default or str, tuple(self.makers)), **self.common}
        return Table(self.meaning, {**first, **found.fields}, found.others)


@dataclass(frozen=True)
class Maybe:
    """None, the default, or the table `of`; `absent` says what None means."""

    of: Table | Choice
    absent: str


Place = Field | Table | Choice | Maybe


def present(place: Place | None) -> Field | Table | Choice | None:
    """What stands there where it is not None."""
    return place.of if isinstance(place, Maybe) else place


def locate(of: Place, path: str) -> Place | None:
    """What stands at a path of a base; None for the arguments of a choice, and where there is nothing."""
    found: Place | None = of
    for name in path.split("."):
        found = present(found)
        inner = found.common if isinstance(found, Choice) else found.fields if isinstance(found, Table) else {}
        found = inner.get(name)
    return found


AUTO = "auto: bfloat16, but float32 on a CPU that has none"
DTYPE = Field(
    f"what its layers compute in; {AUTO}",
    allowed=(*build.DTYPES, processor.AUTO),
)


def arguments_of(maker: Callable, name: str, meanings: Mapping[str, Field], given: Collection[str] = ()) -> Table:
    """The arguments of what is called `name` as a table, with the defaults of its signature; `given` are left out."""
    found = build.parameters(maker)
    if found is None:
        return Table("", {}, others={})
    own = {True: dataclasses.replace(DTYPE, meaning=f"a dtype of {name}"), False: Field(f"an argument of {name}")}
    fields = {
        argument: dataclasses.replace(
            meanings.get(argument, own[argument.endswith("dtype")]), default=_in_config(default)
        )
        for argument, default in found.items()
        if argument not in given
    }
    return Table("", fields)


def _in_config(default: Any) -> Any:
    """An argument's default as a config says it: dtypes by name."""
    return next((name for name, dtype in build.DTYPES.items() if dtype is default), default)


def _check_range(path: str, value: float, interval: str) -> None:
    low, high = _ends(interval)
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise UserError(f"{path} is {value:g}: it must be {_in_words(interval)}")


def _in_words(interval: str) -> str:
    low, high = _ends(interval)
    if low == -math.inf:
        return "a finite number"
    least = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
    if high == math.inf:
        return least
    return f"{least} and at most {high:g}" if interval[-1] == "]" else f"{least} and below {high:g}"


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)
