"""Configs from files: those of experiments, and those of runs."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from diffjax import user_code
from diffjax.config.completion import at, complete, decided
from diffjax.utils import files, processor
from diffjax.utils.errors import UserError

EXPERIMENTS = "experiments"
PACKAGE = Path(__file__).parents[1]


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
    installed = PACKAGE / EXPERIMENTS
    return installed if installed.is_dir() else PACKAGE.parent / EXPERIMENTS


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
        there = at(begun, name)
        dtype = there or processor.dtype()
        print(f"{name} is {dtype}: {'as the run was begun' if there else processor.reason()}")
        return dtype

    return decided(config, decide)
