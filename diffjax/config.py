"""Experiments' configs: a Python file with `get_config()`, the fields that it leaves out, and what the command line
overrides.

docs/configs.md says what every field means.
"""

import ast
import inspect
import math
import re
import runpy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffjax import build, user_code
from diffjax.data import default_config
from diffjax.parallel import processor
from diffjax.text import frozen
from diffjax.utils import files
from diffjax.utils.errors import UserError, unknown

EXPERIMENTS = "experiments"

MISSING = inspect.Parameter.empty

RANGES = {
    r"train\.(steps|batch|accumulate|log_every|save_every|keep_last)|sample\.(steps|num)": "[1, inf)",
    r"(.*\.)?data\.size|low_res\.size|text\.(tokens|width|depth|heads|hidden)|process\.steps|lora\.rank": "[1, inf)",
    r"train\.(preview_every|keep_best)|seed|classes|sample\.clip|(.*\.)?data\.workers|prior\.weight": "[0, inf)",
    r"optimizer\.(clip|weight_decay|schedule\.warmup)|loss\.weight\.(floor|gamma)": "[0, inf)",
    r"optimizer\.(adam_)?learning_rate|process\.(shift|sigma_min|sigma_max)|lora\.alpha": "(0, inf)",
    r"prediction\.sigma_data|loss\.times\.std|loss\.weight\.(sigma_data|k)": "(0, inf)",
    r"train\.ema|sample\.level|low_res\.most|optimizer\.(b1|b2|momentum)": "[0, 1)",
    r"loss\.drop|sample\.threshold|(.*\.)?data\.tag_dropout|optimizer\.schedule\.(hold|final)": "[0, 1]",
}
"""The numbers that a field can have; what is not here can be any that is finite."""

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list such as (1, 2)"}


@dataclass(frozen=True)
class Choice:
    """A table with a `name` of `table`; its other fields are the arguments of what is named, and those of `common`.

    Arguments that the code gives are not among them. Left out of a config it is that of `default`, if there is one.
    """

    table: Mapping[str, Callable]
    common: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    default: str = ""

    def fields(self, name: str, path: str) -> "Mapping[str, Any] | Open":
        """The fields of the table of that name, with their defaults."""
        return _arguments(build.named(path, self.table, name), self.given, {"name": str, **self.common})


@dataclass(frozen=True)
class Maybe:
    """None, the default, or what stands in `of`."""

    of: Any


@dataclass(frozen=True)
class Open:
    """A table that can have any fields beside those of `known`."""

    known: Mapping[str, Any]


def base(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of an experiment like this one, with its default; a type stands for what a config must say itself.

    The tables of networks are those that the config has, and that of its network.
    """
    return _of_any() | (_of_published() if "model" in config else _of_new() | _networks(config))


def _of_any() -> dict[str, Any]:
    schedule = Choice(build.SCHEDULES, given=("steps",), default="linear")
    return {
        "name": str,
        "seed": 0,
        "data": default_config().to_dict(),
        "loss": _loss(),
        "optimizer": Choice(build.OPTIMIZERS, {"clip": 1.0, "schedule": schedule}, ("factor",)),
        "train": {
            "steps": int,
            "batch": int,
            "accumulate": 1,
            "ema": 0.999,
            "parallel": "jit",
            "log_every": 100,
            "save_every": 1000,
            "preview_every": 0,
            "keep_last": 2,
            "keep_best": 1,
        },
        "log": {"tensorboard": False, "wandb": ""},
        "init_from": Maybe({"run": str, "step": 0, "weights": "ema"}),
    }


def _of_new() -> dict[str, Any]:
    """Beside that of any experiment, of one that trains a new network."""
    encoders = dict.fromkeys(frozen.HUB, lambda path="": path)
    return {
        "classes": 0,
        "text": Maybe(Choice(build.TEXTS | encoders, {"tokens": 16}, ("vocabulary",), default="words")),
        "low_res": Maybe({"size": int, "most": 0.3}),
        "process": Choice(build.PROCESSES, {"shift": 1.0}),
        "prediction": Choice(build.PREDICTIONS),
        "network": str,
        "loss": _loss() | {"drop": 0.1},
        "sample": {
            "sampler": "dpmpp_2m",
            "grid": "uniform",
            "steps": 25,
            "guidance": 1.0,
            "guide": Maybe(Open({"name": "cfg"})),
            "clip": 0.0,
            "threshold": 0.0,
            "level": 0.0,
            "num": 16,
            "prompts": (),
        },
    }


def _of_published() -> dict[str, Any]:
    """Beside that of any experiment, of one that trains a published model."""
    return {
        "model": str,
        "revision": "",
        "dtype": "bfloat16",
        "remat": True,
        "lora": Maybe({"rank": 16, "alpha": 16.0, "targets": "/attn2?/"}),
        "prior": {"weight": 0.0, "data": default_config().to_dict()},
        "sample": {"prompts": ("",)},
    }


def _loss() -> dict[str, Any]:
    return {"weight": Choice(build.WEIGHTS), "times": Choice(build.TIMES), "uniforms": "antithetic"}


def _networks(config: Mapping[str, Any]) -> dict[str, Any]:
    chosen, told = config.get("network"), ("context_width", "pooled_width", "classes", "low_res", "num_class_embeds")
    names = [name for name in build.NETWORKS if name in config or name == chosen] + [chosen] * user_code.is_own(chosen)
    made = {name: build.named("network", build.NETWORKS, name) for name in names}
    return {build.table_of(name): _arguments(maker, told, {}) for name, maker in made.items()}


def _arguments(maker: Callable, given: tuple[str, ...], others: Mapping[str, Any]) -> Mapping[str, Any] | Open:
    """What a config says of a maker's arguments, and other fields."""
    found = build.parameters(maker)
    if found is None:
        return Open(others)
    names = {dtype: name for name, dtype in build.DTYPES.items()}
    return {**others, **{name: names.get(value, value) for name, value in found.items() if name not in given}}


def complete(config: Mapping[str, Any]) -> ConfigDict:
    """An experiment with every field that its config leaves out; what is no experiment as it is.

    Raises `UserError`, naming the field, for one that does not exist or is missing, and for a value that it
    cannot have.
    """
    return ConfigDict(_completed("", _plain(config), base(config))) if _trains(config) else ConfigDict(_plain(config))


def _trains(config: Mapping[str, Any]) -> bool:
    return "train" in config and ("data" in config or "model" in config)


def _completed(path: str, value: Any, of: Any, absent: Callable[[type], Any] | None = None) -> Any:
    """What stands at a path, complete; `absent(kind)` stands for what is missing there, an error without it."""
    if isinstance(of, Maybe):
        return None if value is None or value is MISSING else _completed(path, value, of.of, absent)
    if not isinstance(of, (Choice, Mapping, Open)):
        return _leaf(path, value, of, absent)
    if isinstance(of, Choice):
        value = {"name": of.default} if value is MISSING and of.default else value
        of = of.fields(_name(path, value), f"{path}.name")
    value = {} if value is MISSING else value
    if not isinstance(value, Mapping):
        raise UserError(f"config key {path} is {value!r}: it must be a table of {', '.join(of)}")
    known = of.known if isinstance(of, Open) else of
    if wrong := [name for name in value if name not in known and not isinstance(of, Open)]:
        raise unknown("config key", _join(path, wrong[0]), [_join(path, name) for name in known])
    return {
        **value,
        **{name: _completed(_join(path, name), value.get(name, MISSING), of, absent) for name, of in known.items()},
    }


def _name(path: str, value: Any) -> str:
    if value is MISSING:
        raise UserError(f"the config has no {path}: add it, a table with a name")
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise UserError(f"config key {path} is {value!r}: it must be a table with a name")
    return value["name"]


def _leaf(path: str, value: Any, default: Any, absent: Callable[[type], Any] | None) -> Any:
    """A value that is no table, as a value of its default's kind."""
    needed = default is MISSING or isinstance(default, type)
    kind = default if isinstance(default, type) and default is not MISSING else type(default)
    kind = object if default is MISSING or default is None else kind
    value = default if value is MISSING and not needed else value
    if value is MISSING or value is None:
        if absent:
            return absent(kind)
        if needed:
            raise UserError(f"the config has no {path}: add it, {KINDS.get(kind, 'a value')}")
    return value if value is None else _checked(path, value, kind)


def _checked(path: str, value: Any, kind: type) -> Any:
    value = tuple(value) if isinstance(value, (list, tuple)) else value
    value = float(value) if kind is float and type(value) is int else value
    if kind in KINDS and type(value) is not kind:
        raise UserError(f"config key {path} takes {KINDS[kind]}, not {value!r}")
    if path.endswith("dtype"):
        build.named(path, {**build.DTYPES, processor.AUTO: None}, value)
    if isinstance(value, (int, float)):
        _check_range(path, value)
    return value


def _check_range(path: str, value: float) -> None:
    interval = next((interval for pattern, interval in RANGES.items() if re.fullmatch(pattern, path)), "(-inf, inf)")
    low, high = (float(end) for end in interval[1:-1].split(","))
    fits = (low <= value if interval[0] == "[" else low < value) and (
        value <= high if interval[-1] == "]" else value < high
    )
    if not fits:
        least = {"[": f"at least {low:g}", "(": f"above {low:g}"}[interval[0]]
        most = {"]": f" and at most {high:g}", ")": f" and below {high:g}"}[interval[-1]] if high < math.inf else ""
        said = "a finite number" if low == -math.inf else least + most
        raise UserError(f"{path} is {value:g}: it must be {said}")


def _plain(value: Any) -> Any:
    """Configs in it as dictionaries."""
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return {name: _plain(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def load(spec: str) -> ConfigDict:
    """The config of `FILE` or `FILE:argument`: what the file's `get_config()` or `get_config(argument)` returns.

    Modules that it names are looked for beside it. Raises `UserError` when there is no such file, it does not run, or
    it has no such function.
    """
    path, _, argument = spec.partition(":")
    path = str(found(path))
    user_code.look_in(Path(path).parent)
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
    raise UserError(
        f"no config file {path}: give a Python file such as experiments/emoji.py; `diffjax init DIR` writes some"
    )


def read(workdir: str | Path) -> ConfigDict:
    """The config of a run, complete; the modules that it names are read from the run.

    Raises `UserError` when there is no run.
    """
    path = Path(workdir).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no run (no config.json); train one with: diffjax train --workdir {workdir}")
    user_code.look_in(path.parent / user_code.CODE)
    return complete(files.read_json(path))


def settle(config: ConfigDict, workdir: str | Path) -> ConfigDict:
    """The config with every dtype "auto" decided, and a line said of each: as a run in `workdir` was begun, else for
    this machine.
    """
    path = Path(workdir) / "config.json"
    begun = files.read_json(path) if path.is_file() else {}

    def decide(name: str) -> str:
        there = _at(begun, name)
        dtype = there or processor.dtype()
        print(f"{name} is {dtype}: {'as the run was begun' if there else processor.reason()}")
        return dtype

    return decided(config, decide)


def decided(config: ConfigDict, decide: Callable[[str], str]) -> ConfigDict:
    """The config with `decide(path)` for every dtype "auto"."""
    plain = _plain(config)
    for path, table in _tables(plain):
        if table.get("dtype") == processor.AUTO:
            table["dtype"] = decide(_join(path, "dtype"))
    return ConfigDict(plain)


def _tables(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict]]:
    """Every table in a config, and itself, by its path."""
    yield path, config
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _tables(value, _join(path, name))


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, (Mapping, ConfigDict)) else None
    return config


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
    config = _plain(load(spec))
    if not _trains(config):
        fields = drawing() if "train" not in config and "model" in config else {}
        free = {name: placeholder(object) if value is None else value for name, value in fields.items()}
        return _overridden(ConfigDict(free | config), arguments)
    config, arguments = _restructured(config, arguments)
    config, rest = _overridden(ConfigDict(_completed("", config, base(config), placeholder)), arguments)
    return complete(config).lock(), rest


def _restructured(config: dict[str, Any], arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The config with the arguments applied that choose names, networks and whole tables; and the other arguments.

    A table that is None is there when a field of it is given.
    """
    rest, waiting, removed = [], list(arguments), set()
    while waiting:
        argument = waiting.pop(0)
        path, text, separate = _path(argument), argument.partition("=")[2], "=" not in argument
        if path is None or not _shapes(path, base(config)) or (separate and not waiting):
            rest.append(argument)
            continue
        value = _put(config, path, waiting.pop(0) if separate else text)
        removed |= {path} if value is None else set()
    for path in filter(None, map(_path, rest)):
        for above in _above(path):
            place = _place(base(config), above)
            if isinstance(place, Maybe) and _at(config, above) is None and above not in removed:
                _table(config, above)
    return config, rest


def _path(argument: str) -> str | None:
    found = re.match(r"--(?:no)?config\.([\w.]*)", argument)
    return found and found[1]


def _above(path: str) -> list[str]:
    """The tables that a field is in, the outermost first."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _place(of: Any, path: str) -> Any:
    """What stands at a path of a base; None for the arguments of a choice."""
    for name in path.split("."):
        of = of.of if isinstance(of, Maybe) else of
        of = of.common if isinstance(of, Choice) else of
        of = of.get(name) if isinstance(of, Mapping) else None
    return of


def _is_choice(place: Any) -> bool:
    return isinstance(place.of if isinstance(place, Maybe) else place, Choice)


def _is_open(place: Any) -> bool:
    return isinstance(place.of if isinstance(place, Maybe) else place, Open)


def _shapes(path: str, of: Mapping[str, Any]) -> bool:
    """Whether a field decides which others there are, or is of a table that can have any."""
    above, _, last = path.rpartition(".")
    free = above and ((last == "name" and _is_choice(_place(of, above))) or _is_open(_place(of, above)))
    return bool(free) or path == "network" or isinstance(_place(of, path), (Maybe, Choice, Mapping, Open))


def _put(config: dict[str, Any], path: str, text: str) -> Any:
    """Give such a field its value; another choice keeps no field of the one before."""
    place = _place(base(config), path)
    above, _, last = path.rpartition(".")
    if path == "network":
        if user_code.is_own(before := config.get("network")) and before != text:
            config.pop(build.table_of(before), None)
        config["network"] = text
    elif above and _is_open(_place(base(config), above)):
        _table(config, above)[last] = _literal(text)
    elif last == "name" and not isinstance(place, (Maybe, Choice, Mapping)):
        choice, table = _place(base(config), above), _table(config, above)
        common = choice.of.common if isinstance(choice, Maybe) else choice.common
        kept = table if table.get("name") == text else {name: table[name] for name in common if name in table}
        _table(config, above.rpartition(".")[0])[above.rpartition(".")[2]] = kept | {"name": text}
    else:
        value = _literal(text)
        if not isinstance(value, Mapping) and not (value is None and isinstance(place, Maybe)):
            raise UserError(
                f"config key {path} is a table, not {text}: give its fields, such as --config.{path}.name=..., or a whole one"
            )
        _table(config, above)[last] = value
        return value
    return text


def _table(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The table at a path, made if there is none."""
    for name in filter(None, path.split(".")):
        if config.get(name) is None:
            place = _place(base(config), path)
            choice = place.of if isinstance(place, Maybe) else place
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
        key, value = re.match(r"flag --config\.(.*?)=(.*?): ", str(error), re.DOTALL).groups()
        raise UserError(f"config key {key} takes {_kind(known[key])}, not {value}") from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    return values.config.copy_and_resolve_references().lock(), rest


def _flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    keys = {}
    for name in config:
        keys[prefix + name] = config.get_type(name)
        if isinstance(config[name], ConfigDict):
            keys |= _flatten(config[name], f"{prefix}{name}.")
    return keys


def _kind(type_: type) -> str:
    return KINDS.get(type_, f"a {type_.__name__}")
