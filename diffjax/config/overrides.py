"""What the command line changes of a config: `--config.key=value`."""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffjax import build, user_code
from diffjax.config import base
from diffjax.config.completion import at, complete, completed, plain, trains
from diffjax.config.fields import KINDS, Choice, Maybe, Place, Table, locate, present
from diffjax.config.reading import load
from diffjax.utils.errors import UserError, unknown


def parse(
    spec: str, arguments: list[str], drawing: Callable[[], Mapping[str, Any]] = dict
) -> tuple[ConfigDict, list[str]]:
    """The config of `load(spec)`, complete, with the `--config.key=value` among `arguments` applied, and the other
    arguments.

    The syntax is that of `ml_collections.config_flags`: dotted keys, `--config.key value`, `--noconfig.key`, tuples as
    `(1, 2)`. With another `name`, the fields of what was named before fall away; a table can be None where it may be
    left out, or written whole, `{"name": "plain"}`. `drawing()` has the fields of an experiment that only samples. The
    result is locked. Raises `UserError` for an unknown key, naming the nearest, or a value of another type.
    """
    config = plain(load(spec))
    if not trains(config):
        fields = drawing() if "train" not in config and "model" in config else {}
        free = {name: placeholder(object) if value is None else value for name, value in fields.items()}
        return _overridden(ConfigDict(free | config), arguments)
    config, arguments = _restructured(config, arguments)
    config, rest = _overridden(ConfigDict(completed("", config, base.table(config), placeholder)), arguments)
    return complete(config).lock(), rest


def _restructured(config: dict[str, Any], arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The config with the arguments applied that choose names, networks and whole tables; and the other arguments.

    A table that is None is there when a field of it is given.
    """
    rest, waiting, removed = [], list(arguments), set()
    while waiting:
        argument = waiting.pop(0)
        path, text, separate = _path(argument), argument.partition("=")[2], "=" not in argument
        if path is None or not _shapes(path, base.table(config)) or (separate and not waiting):
            rest.append(argument)
            continue
        value = _put(config, path, waiting.pop(0) if separate else text)
        removed |= {path} if value is None else set()
    for path in filter(None, map(_path, rest)):
        for above in _above(path):
            if (
                isinstance(locate(base.table(config), above), Maybe)
                and at(config, above) is None
                and above not in removed
            ):
                _table(config, above)
    return config, rest


def _path(argument: str) -> str | None:
    found = re.match(r"--(?:no)?config\.([\w.]*)", argument)
    return found and found[1]


def _above(path: str) -> list[str]:
    """The tables that a field is in, the outermost first."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _is_open(place: Place | None) -> bool:
    return isinstance(found := present(place), Table) and found.others is not None


def _shapes(path: str, of: Table) -> bool:
    """Whether a field decides which others there are, or is of a table that can have any."""
    above, _, last = path.rpartition(".")
    inside = locate(of, above) if above else None
    free = _is_open(inside) or (last == "name" and isinstance(present(inside), Choice))
    return free or path == "network" or isinstance(locate(of, path), (Maybe, Choice, Table))


def _put(config: dict[str, Any], path: str, text: str) -> Any:
    """Give such a field its value; another choice keeps no field of the one before."""
    above, _, last = path.rpartition(".")
    place, inside = locate(base.table(config), path), locate(base.table(config), above) if above else None
    if path == "network":
        if user_code.is_own(before := config.get("network", "")) and before != text:
            config.pop(build.table_of(before), None)
        config["network"] = text
    elif _is_open(inside):
        _table(config, above)[last] = _literal(text)
    elif last == "name" and isinstance(choice := present(inside), Choice):
        table = _table(config, above)
        kept = table if table.get("name") == text else {name: table[name] for name in choice.common if name in table}
        _table(config, above.rpartition(".")[0])[above.rpartition(".")[2]] = kept | {"name": text}
    else:
        value = _literal(text)
        if not isinstance(value, Mapping) and not (value is None and isinstance(place, Maybe)):
            said = f"config key {path} is a table, not {text}"
            raise UserError(f"{said}: give its fields, such as --config.{path}.name=..., or a whole one")
        _table(config, above)[last] = value
        return value
    return text


def _table(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The table at a path, made with those above it if there is none."""
    of = base.table(config)
    for above in (*_above(path), path) if path else ():
        name = above.rpartition(".")[2]
        if config.get(name) is None:
            choice = present(locate(of, above))
            config[name] = {"name": choice.default} if isinstance(choice, Choice) and choice.default else {}
        config = config[name]
    return config


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _overridden(config: ConfigDict, arguments: list[str]) -> tuple[ConfigDict, list[str]]:
    """The config with the arguments applied that give a field a value of its kind; and the other arguments."""
    from absl import flags
    from ml_collections import config_flags

    known = _flatten(config)
    for argument in arguments:
        if (path := _path(argument)) is not None and path not in known:
            raise unknown("config key", path, known)
    argv, values = ["diffjax", *arguments], flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv, known_only=True)[1:]
    except flags.IllegalFlagValueError as error:
        key, value = str(error).removeprefix("flag --config.").partition(": ")[0].split("=", 1)
        raise UserError(f"config key {key} takes {_kind(known[key])}, not {value}") from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    return values.config.copy_and_resolve_references().lock(), rest


def _flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    keys = {}
    for name in config:
        keys[prefix + name] = config.get_type(name)
        if isinstance(inner := config[name], ConfigDict):
            keys |= _flatten(inner, f"{prefix}{name}.")
    return keys


def _kind(type_: type) -> str:
    return KINDS.get(type_, f"a {type_.__name__}")
