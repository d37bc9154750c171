"""What a config names of the user's own code: `"network": "my_nets:Mixer"` is `Mixer` of the module `my_nets`.

Modules are looked for beside the config, in the current folder, then where Python looks. A run keeps those of the first
two kinds in its folder `code`, with the modules that they import from beside them, and is trained on and read
with these.
"""

import contextlib
import importlib
import importlib.machinery
import modulefinder
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from diffjax.utils import files
from diffjax.utils.errors import UserError, unknown

CODE = "code"

_folders: list[Path] = []
_loaded: dict[str, Path] = {}


def is_own(name: Any) -> bool:
    """Whether it is an import path, `module:name`."""
    return isinstance(name, str) and ":" in name


def look_in(folder: str | Path) -> None:
    """From now on, look for modules in that folder first."""
    folder = Path(folder).resolve()
    _folders[:] = [folder, *(other for other in _folders if other != folder)]


def find(name: str) -> Any:
    """What `module:name` names. Raises `UserError` for a module that is not there or cannot be imported, and without
    that name.
    """
    module, _, attribute = name.partition(":")
    found = _imported(module)
    if not hasattr(found, attribute):
        raise unknown(
            f"name in {found.__file__ or module}", attribute, [word for word in vars(found) if not word.startswith("_")]
        )
    return getattr(found, attribute)


def keep(config: Mapping[str, Any] | ConfigDict, workdir: Path) -> None:
    """Copy the modules that a config names to `workdir/code`, and read them from there from now on.

    Raises `UserError` when there are others already: the run was begun with them.
    """
    folder = workdir / CODE
    for name in dict.fromkeys(named(config)):
        module = name.partition(":")[0]
        home = _home(module, folder.resolve())
        if home is None:
            continue
        for path in _sources(module, home).values():
            copy, content = folder / path.relative_to(home), path.read_bytes()
            if copy.exists() and copy.read_bytes() != content:
                raise UserError(
                    f"{path} is not what {workdir} was begun with ({copy}): put that back, or choose another --workdir"
                )
            files.write_atomic(copy, content)
    if folder.is_dir():
        look_in(folder)


def named(config: Mapping[str, Any] | ConfigDict) -> Iterator[str]:
    """Every import path in a config: the values of `name` and of `network` that are one."""
    for field in config:
        if isinstance(config[field], Mapping) or hasattr(config[field], "items"):
            yield from named(config[field])
        elif field in ("name", "network") and is_own(config[field]):
            yield config[field]


def _home(module: str, but: Path | None = None) -> Path | None:
    """The folder that a module is read from; None where it is Python's own, installed, or nowhere `but` in
    one folder.
    """
    top = module.partition(".")[0]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    for folder in (*_folders, Path.cwd(), *map(Path, filter(None, sys.path))):
        if folder.resolve() != but and importlib.machinery.PathFinder.find_spec(top, [str(folder)]):
            return None if folder.resolve() in installed else folder.resolve()
    return None


def _sources(module: str, home: Path) -> dict[str, Path]:
    """A module and all that it imports from the same folder, found without running them, with the file of each."""
    finder = modulefinder.ModuleFinder([str(home)])
    try:
        finder.import_hook(module)
    except (ImportError, SyntaxError) as error:
        raise _broken(module, error) from error
    found = {name: getattr(module, "__file__", None) for name, module in finder.modules.items()}
    return {name: Path(file).resolve() for name, file in found.items() if file}


def _imported(module: str) -> ModuleType:
    """The module, from the folder that is looked in first; those of the same name from other folders are forgotten."""
    home = _home(module)
    if home is None:
        return _import(module)
    others = [name for name, loaded in sys.modules.items() if _is_of(loaded, module) and not _within(loaded, home)]
    for name in {*others, *(name for name, folder in _loaded.items() if folder != home)}:
        sys.modules.pop(name, None)
        _loaded.pop(name, None)
    before = set(sys.modules)
    sys.path.insert(0, str(home))
    try:
        found = _import(module)
        for other in _sources(
            module, home
        ):  # what functions import when they are called, while the folder is in the path
            with contextlib.suppress(UserError):
                _import(other)
        return found
    finally:
        sys.path.remove(str(home))
        new = {name: loaded for name, loaded in sys.modules.items() if name not in before and _within(loaded, home)}
        _loaded.update({name: home for name in new if not name.startswith("diffjax")})


def _import(module: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a user's module does
        raise _broken(module, error) from error


def _is_of(loaded: ModuleType, module: str) -> bool:
    """Whether it is the package that a module is in, or of it."""
    return getattr(loaded, "__name__", "").partition(".")[0] == module.partition(".")[0]


def _within(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return bool(file) and Path(file).resolve().is_relative_to(folder)


def _broken(module: str, error: Exception) -> UserError:
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return UserError(
            f"there is no module {module} beside the config, in this folder or installed: name one as module:name"
        )
    return UserError(f"the module {module} cannot be imported ({type(error).__name__}: {error}): mend it")
