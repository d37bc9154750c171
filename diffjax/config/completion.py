"""A config with every field that it leaves out, each value checked."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffjax.config import base
from diffjax.config.fields import KINDS, MISSING, Choice, Field, Maybe, Place
from diffjax.utils import processor
from diffjax.utils.errors import UserError, unknown

Absent = Callable[[type], Any]

RENAMED = {("low_res", "most"): "max_level"}
"""(table, field) as earlier configs and runs have it, and what the field is called today."""


def complete(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """An experiment with every field that its config leaves out; what is no experiment as it is.

    Raises `UserError`, naming the field, for one that does not exist or is missing, and for a value that it
    cannot have.
    """
    found = renamed(plain(config))
    return ConfigDict(completed("", found, base.table(found)) if trains(found) else found)


def renamed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with today's names of fields."""
    for (table, old), new in RENAMED.items():
        fields = config.get(table)
        if isinstance(fields, Mapping) and old in fields:
            config = {**config, table: {new if name == old else name: value for name, value in fields.items()}}
    return config


def trains(config: Mapping[str, Any]) -> bool:
    """Whether it is an experiment that trains."""
    return "train" in config and ("data" in config or "model" in config)


def completed(path: str, value: Any, of: Place, absent: Absent | None = None) -> Any:
    """What stands at a path, complete; `absent(kind)` stands for what is missing there, an error without it."""
    if isinstance(of, Field):
        return _leaf(path, value, of, absent)
    if isinstance(of, Maybe):
        return None if value is None or value is MISSING else completed(path, value, of.of, absent)
    if isinstance(of, Choice):
        value = _with_name(value, of.default)
        of = of.table(_name(path, value), path)
    value = {} if value is MISSING else value
    if not isinstance(value, Mapping):
        raise UserError(f"config key {path} is {value!r}: it must be a table of {', '.join(of.fields)}")
    if wrong := [name for name in value if name not in of.fields and of.others is None]:
        raise unknown("config key", join(path, wrong[0]), [join(path, name) for name in of.fields])
    inner = {
        name: completed(join(path, name), value.get(name, MISSING), field, absent) for name, field in of.fields.items()
    }
    return {**value, **inner}


def _with_name(value: Any, default: str) -> Any:
    """A choice's table; one that says no name is that of the default, if there is one."""
    value = {} if value is MISSING and default else value
    return {"name": default, **value} if default and isinstance(value, Mapping) else value


def _name(path: str, value: Any) -> str:
    if value is MISSING:
        raise UserError(f"the config has no {path}: add it, a table with a name")
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise UserError(f"config key {path} is {value!r}: it must be a table with a name")
    return value["name"]


def _leaf(path: str, value: Any, field: Field, absent: Absent | None) -> Any:
    value = field.default if value is MISSING and not field.needed else value
    if value is MISSING or value is None:
        if absent:
            return absent(field.kind)
        if field.needed:
            raise UserError(f"the config has no {path}: add it, {KINDS.get(field.kind, 'a value')}")
    return value if value is None else field.checked(path, value)


def decided(config: ConfigDict, decide: Callable[[str], str]) -> ConfigDict:
    """The config with `decide(path)` for every dtype "auto"."""
    whole = plain(config)
    for path, table in _tables(whole):
        if table.get("dtype") == processor.AUTO:
            table["dtype"] = decide(join(path, "dtype"))
    return ConfigDict(whole)


def _tables(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every table in a config, and itself, by its path."""
    yield path, config
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _tables(value, join(path, name))


def plain(value: Any) -> Any:
    """Configs in it as dictionaries."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return {name: plain(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value


def at(config: Any, path: str) -> Any:
    """What stands at a path of a config; None where there is nothing."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, (Mapping, ConfigDict)) else None
    return config


def join(path: str, name: str) -> str:
    """The path of a field in the table of a path."""
    return f"{path}.{name}" if path else name
