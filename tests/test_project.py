"""Installed outside of a checkout: what travels with the package, and what is said of what does not."""

import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

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


def test_the_wheel_has_all_of_the_package_and_the_experiments(tmp_path):
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    for name in ("diffjax", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("diffjax", "experiments"):
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        inside = {str(file.relative_to(ROOT)) for file in files}
        assert {name if folder == "diffjax" else f"diffjax/{name}" for name in inside} <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "diffjax", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed")},
        check=True,
    )
    run("init", "work")
    assert (tmp_path / "work" / "experiments" / "minimagen" / "base64.py").is_file()
