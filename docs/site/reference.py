"""Pages of the reference that are made when the site is built: docstrings of all modules, and the commands' help."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "diffjax"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of the site, with those of the reference."""
    pages = {room.name: _room(room) for room in _rooms()} | {"diffjax": _top(), "command_line": _commands()}
    pages["index"] = _index()
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def _rooms() -> list[Path]:
    return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def _modules(folder: Path) -> list[Path]:
    """The modules of a room, in the order in which its docstring names them where it does."""
    order = _docstring(folder / "__init__.py")
    inner = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    return sorted(inner, key=lambda path: (order.find(f"\n{path.stem} ") % 10**6, path.stem))


def _room(folder: Path) -> str:
    head = f"# diffjax.{folder.name}\n\n{_text(_docstring(folder / '__init__.py'))}\n"
    own = f"\n::: diffjax.{folder.name}\n    options: {{show_docstring_description: false, show_submodules: false}}\n"
    return head + own + "".join(_module(path) for path in _modules(folder))


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return f"\n## {name.removeprefix('diffjax.')}\n\n::: {name}\n"


def _top() -> str:
    modules = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))
    return "# diffjax\n\n::: diffjax\n" + "".join(map(_module, modules))


def _index() -> str:
    """A line for each room, from what its docstring says first."""
    lines = [
        f"- [{room.name}]({room.name}.md): {_docstring(room / '__init__.py').splitlines()[0]}" for room in _rooms()
    ]
    return "\n".join(["# Rooms", "", "A folder of the package is a room; what each is for:", "", *lines, ""])


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _text(docstring: str) -> str:
    """A docstring as Markdown: its first paragraph as it is, lists of names as code."""
    first, _, rest = docstring.partition("\n\n")
    return first + (f"\n\n```text\n{rest}\n```" if rest else "")


def _commands() -> str:
    """The help of every command, as it is printed."""
    general = _help()
    names = general[general.index("COMMAND\n") :].partition("\n\n")[0]
    each = [
        f"## diffjax {name}\n\n```text\n{_help(name)}```\n" for name in re.findall(r"^    (\S+)", names, re.MULTILINE)
    ]
    return "\n".join(["# The command line", "", f"```text\n{general}```", "", *each])


def _help(*command: str) -> str:
    arguments = [sys.executable, "-m", "diffjax", *command, "--help"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "100", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
