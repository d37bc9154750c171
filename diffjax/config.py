"""Experiments' configs: a Python file with `get_config()`, and what the command line overrides in it."""

import re
import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffjax.errors import UserError, unknown

EXPERIMENTS = "experiments"


def load(spec: str) -> ConfigDict:
    """The config of `FILE` or `FILE:argument`: what the file's `get_config()` or `get_config(argument)` returns.

    Raises `UserError` when there is no such file, it does not run, or it has no such function.
    """
    path, _, argument = spec.partition(":")
    path = str(found(path))
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} has no get_config(): define it, returning an ml_collections.ConfigDict")
        return get_config(argument) if argument else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be run ({type(error).__name__}: {error}): mend it") from error


def experiments() -> Path:
    """The folder of the experiments that come with diffjax: installed in the package, in a checkout beside it."""
    installed = Path(__file__).parent / EXPERIMENTS
    return installed if installed.is_dir() else Path(__file__).parents[1] / EXPERIMENTS


def found(path: str) -> Path:
    """The file of that path, or, where there is none, the experiment of that name that comes with diffjax.

    Raises `UserError` when there is neither.
    """
    given, (first, *inner) = Path(path), Path(path).parts or ("",)
    if given.is_file():
        return given
    if first == EXPERIMENTS and ".." not in inner and (ours := experiments().joinpath(*inner)).is_file():
        return ours
    raise UserError(f"no config file {path}: give a Python file such as experiments/emoji.py; `diffjax init DIR` writes some")


def parse(spec: str, arguments: list[str]) -> tuple[ConfigDict, list[str]]:
    """The config of `load(spec)` with the `--config.key=value` among `arguments` applied, and the other arguments.

    The syntax is that of `ml_collections.config_flags`: dotted keys, `--config.key value`, `--noconfig.key`, tuples as
    `(1, 2)`. The result is locked. Raises `UserError` for an unknown key, naming the nearest, or a value of another
    type.
    """
    from absl import flags
    from ml_collections import config_flags

    config = load(spec)
    known = _flatten(config)
    for argument in arguments:
        override = re.match(r"--(?:no)?config\.([\w.]*)", argument)
        if override and override[1] not in known:
            raise unknown("config key", override[1], known)
    argv = ["diffjax", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv, known_only=True)[1:]
    except flags.IllegalFlagValueError as error:
        key, value = re.match(r"flag --config\.(.*?)=(.*?): ", str(error)).groups()
        raise UserError(f"config key {key} takes {_kind(known[key])}, not {value}") from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    return values.config, rest


def _flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    keys = {}
    for name in config:
        keys[prefix + name] = config.get_type(name)
        if isinstance(config[name], ConfigDict):
            keys |= _flatten(config[name], f"{prefix}{name}.")
    return keys


def _kind(type_: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(type_, f"a {type_.__name__}")
