"""The order of the rooms: what a folder of the package may import, and what it may not."""

import ast
from pathlib import Path

import diffjax

ROOT = Path(diffjax.__file__).parent

ORDER = (
    ("__main__", "cli"),
    ("explain",),
    ("evaluate",),
    ("sampling",),
    ("plan",),
    ("loading", "convert", "fit_grid", "project"),
    ("train",),
    ("models",),
    ("config", "build", "user_code"),
    ("text",),
    ("data",),
    ("weights",),
    ("nets",),
    ("diffusion",),
    ("doctor",),
    ("parallel",),
    ("utils",),
)
"""From the top down; a room imports what stands below it, and files of one line each other without a circle."""

FLOOR = {room: len(ORDER) - i for i, rooms in enumerate(ORDER) for room in rooms}


def modules():
    """The name of every module with its file, the package itself left out."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("experiments", "__init__"):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(path, names):
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name.removeprefix("diffjax.") in names else node.module for name in whole]
        yield from (name.removeprefix("diffjax.") for name in found if name.startswith("diffjax."))


def edges():
    names = dict(modules())
    return {name: set(imported(path, names)) - {name} for name, path in names.items()}


def room(module):
    return module.partition(".")[0]


def test_every_file_stands_in_a_known_room():
    assert {room(name) for name, _ in modules()} == set(FLOOR)


def test_imports_run_downwards():
    up = [
        f"{name} -> {other}"
        for name, others in edges().items()
        for other in others
        if room(name) != room(other) and FLOOR[room(other)] > FLOOR[room(name)]
    ]
    assert not up


def test_no_circle():
    left = edges()
    while free := [name for name, others in left.items() if not others & left.keys()]:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_the_mathematics_imports_nothing_of_the_rest():
    allowed = {"utils.struct", "utils.errors"}
    for name, others in edges().items():
        if room(name) == "diffusion":
            assert {other for other in others if room(other) != "diffusion"} <= allowed, name


def test_networks_import_networks_and_utils():
    for name, others in edges().items():
        if room(name) == "nets":
            assert {room(other) for other in others} <= {"nets", "utils"}, name
