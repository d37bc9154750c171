"""Published configuration files: every field is known and checked, or refused by name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffjax.utils.errors import UserError

MAX_BYTES = 16_000_000


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; `UserError` when it is missing, too large to be a configuration, or damaged."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than any configuration; check that it is the right file")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name an existing model folder") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file ({error}); download or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; download or write it again")
    return value


def class_name(config: Mapping[str, Any]) -> str | None:
    """The class a configuration was written for: `_class_name` (diffusers), else `architectures` (transformers)."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    name = config.get("_class_name", first)
    return name if isinstance(name, str) else None


@dataclass(frozen=True)
class Check:
    """Which values of a field are implemented, and how to say so."""

    accepts: Callable[[Any], bool]
    text: str


@dataclass(frozen=True)
class Field:
    """One field: the value it has when the file does not mention it, and its check."""

    default: Any
    check: Check


def integer(low: int, high: int = 2**20) -> Check:
    """A whole number within [low, high]."""
    return Check(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}")


def number(low: float, high: float = 1e9) -> Check:
    """A number within [low, high]; NaN is none."""
    return Check(lambda v: type(v) in (int, float) and low <= v <= high, f"a number from {low:g} to {high:g}")


def one_of(*values: Any) -> Check:
    """One of the given values, of the same type."""
    known = {(type(v), v) for v in values}
    accepts = lambda v: v.__hash__ is not None and (type(v), v) in known
    return Check(accepts, " or ".join(json.dumps(v) for v in values))


def optional(check: Check) -> Check:
    """null, or what `check` accepts."""
    return Check(lambda v: v is None or check.accepts(v), f"null or {check.text}")


def either(first: Check, second: Check) -> Check:
    """What one of two checks accepts."""
    return Check(lambda v: first.accepts(v) or second.accepts(v), f"{first.text} or {second.text}")


def list_of(check: Check, low: int, high: int) -> Check:
    """A list of `low` to `high` values that `check` accepts."""
    accepts = lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(check.accepts, v))
    return Check(accepts, f"a list of {low} to {high} values, each {check.text}")


BOOLEAN = one_of(False, True)


def read_fields(config: Mapping[str, Any], fields: Mapping[str, Field], path: str | Path) -> dict[str, Any]:
    """The value of every field, lists as tuples; names that begin with an underscore are notes, not fields.

    Raises `UserError`, naming the field, for one that is not in `fields` or whose value fails its check.
    """
    values = {name: field.default for name, field in fields.items()}
    for name, value in config.items():
        if name.startswith("_"):
            continue
        if name not in fields:
            raise UserError(f"{path}: the field {name!a} is not implemented; remove it if the model does not need it")
        if not fields[name].check.accepts(value):
            shown = json.dumps(value)[:80]
            raise UserError(f"{path}: {name} = {shown} is not implemented; it may be {fields[name].check.text}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return values
