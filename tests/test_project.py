"""Installed outside of a checkout: what travels with the package, and what is said of what does not."""

import ast
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import diffjax
from diffjax import cli, config, project
from diffjax.utils import install
from diffjax.utils.errors import UserError

ROOT = Path(__file__).parents[1]


def test_init_writes_the_experiments_and_says_how_to_go_on(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "my work")]) == 0
    assert f"cd '{tmp_path / 'my work'}'" in capsys.readouterr().out
    for file in (ROOT / "experiments").rglob("*.py"):
        assert (tmp_path / "my work" / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert {"runs/", "drawn/", "pictures/"} <= set((tmp_path / "my work" / ".gitignore").read_text().split())
    assert cli.main(["init", str(tmp_path / "my work")]) == 0


def test_init_changes_nothing_that_is_there(tmp_path):
    (tmp_path / ".gitignore").write_text("mine")
    with pytest.raises(UserError, match=".gitignore is there and another one: choose an empty folder"):
        project.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]
    with pytest.raises(UserError, match="cannot write .*; choose another folder"):
        project.create(tmp_path / ".gitignore")


def test_an_experiment_that_comes_with_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load("experiments/minimagen/emoji_tiny_base32.py").name == "emoji_tiny_base32"
    Path("experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "emoji.py", "experiments/mine.py")
    Path("experiments/emoji.py").write_text("def get_config(): return 'mine'")
    assert config.load("experiments/emoji.py") == "mine" and config.load("experiments/mine.py").name == "emoji"
    for missing in ("experiments/none.py", "emoji.py", "experiments/../setup.py", "experiments"):
        with pytest.raises(UserError, match="no config file"):
            config.load(missing)


def test_the_short_names_are_there_and_known_to_type_checkers():
    imports = [
        node for node in ast.walk(ast.parse(Path(diffjax.__file__).read_text())) if isinstance(node, ast.ImportFrom)
    ]
    typed = {alias.name for node in imports if node.module.startswith("diffjax") for alias in node.names}
    assert typed | {"__version__"} == {*diffjax.__all__} and all(hasattr(diffjax, name) for name in diffjax.__all__)


def test_what_an_extra_needs_is_named_as_pip_finds_it(monkeypatch):
    needed = [
        "numpy>=2",
        "resvg-py>=0.3; extra == 'emoji'",
        'emoji>=2.14; extra == "emoji"',
        "pytest>=8; extra == 'test'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert install.to_install("emoji") == f"{shlex.quote(sys.executable)} -m pip install 'resvg-py>=0.3' 'emoji>=2.14'"
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert install.to_install("emoji") == f"bash {shlex.quote(str(ROOT / 'scripts' / 'setup.sh'))} emoji"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package, built from a copy of its sources."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("diffjax", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_has_all_of_the_package_and_the_experiments(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("diffjax", "experiments"):
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        inside = {str(file.relative_to(ROOT)) for file in files}
        assert {name if folder == "diffjax" else f"diffjax/{name}" for name in inside} <= names
    assert "diffjax/py.typed" in names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The programs of an environment of its own with the wheel installed; what it needs is that of the tests."""
    venv = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        venv / "bin" / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    return venv / "bin"


def test_installed_it_runs_where_there_is_no_checkout(installed, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = lambda program, *words, folder=tmp_path: (
        subprocess.run(
            [installed / program, *words], cwd=folder, env=env, check=True, capture_output=True, text=True
        ).stdout
    )
    where = run("python", "-c", "import diffjax; assert diffjax.load; print(diffjax.__version__, diffjax.__file__)")
    assert where.split() == [
        diffjax.__version__,
        str(next(installed.parent.glob("lib/python*/site-packages/diffjax/__init__.py"))),
    ]
    assert "train the experiment of a config file" in run("diffjax", "--help")
    run("diffjax", "init", "work")
    assert (tmp_path / "work" / "experiments" / "minimagen" / "base64.py").is_file()
    told = run("diffjax", "plan", "--config", "experiments/emoji.py", "--device", "h100", folder=tmp_path / "work")
    assert "320 steps of 128 images" in told
