"""The scripts against a stand-in for Python that only notes what it is asked, and the lock file they install."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOST_HAS_DRIVER = Path("/sys/module/nvidia/version").exists()
PYTHON = """#!/bin/bash
case "$*" in
    --version) echo "Python 3.12.1" ;;
    "-m venv "*)
        site=.venv/lib/python3.12/site-packages
        mkdir -p .venv/bin $site/pip-25.dist-info
        touch $site/pip-25.dist-info/RECORD
        cp "$0" .venv/bin/python
        echo made >>asked ;;
    "-m pip install "*)
        echo "pip ${*: -2}" >>asked
        ls .venv/lib/python3.12/site-packages >>asked
        [ ! -e broken ] || { echo "ERROR: no such package" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    write_tool(tmp_path, "python", PYTHON)
    return tmp_path


def write_tool(checkout: Path, name: str, text: str) -> None:
    (checkout / "tools" / name).write_text(text)
    (checkout / "tools" / name).chmod(0o755)


def setup(checkout: Path, *extras: str, **environment: str) -> subprocess.CompletedProcess:
    environment = dict(PYTHON=f"{checkout}/tools/python", JAX_BUILD="cpu") | environment
    environment["PATH"] = f"{checkout}/tools:{os.environ['PATH']}"
    command = ["bash", "scripts/setup.sh", *extras]
    return subprocess.run(command, cwd=checkout, env=os.environ | environment, capture_output=True, text=True)


def asked(checkout: Path) -> list[str]:
    """The lines that the stand-in noted since the last call."""
    notes = checkout / "asked"
    lines = notes.read_text().split("\n")[:-1] if notes.exists() else []
    notes.unlink(missing_ok=True)
    return lines


def test_second_call_has_nothing_to_do(checkout):
    first = setup(checkout, "test", "emoji")
    assert first.returncode == 0, first.stderr
    assert "jax for cpu" in first.stdout and "ready" in first.stdout
    assert asked(checkout) == ["made", "pip --editable .[emoji,test]", "pip-25.dist-info"]
    for extras in [("emoji", "test"), ("test",), ()]:
        again = setup(checkout, *extras)
        assert (again.returncode, again.stdout, asked(checkout)) == (0, "", [])


def test_a_new_extra_adds_to_what_is_there(checkout):
    setup(checkout, "emoji")
    asked(checkout)
    assert "ready" in setup(checkout, "reference").stdout
    assert asked(checkout)[0] == "pip --editable .[emoji,reference]"
    assert setup(checkout, "emoji").stdout == ""


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_other_versions_are_installed_into_the_same_environment(checkout, name):
    setup(checkout, "emoji")
    asked(checkout)
    (checkout / name).write_text((checkout / name).read_text() + "# changed\n")
    assert setup(checkout).returncode == 0
    assert asked(checkout)[0] == "pip --editable .[emoji]"


def test_another_build_of_jax_gets_a_new_environment(checkout):
    setup(checkout)
    asked(checkout)
    assert "jax for cuda: JAX_BUILD asks for it" in setup(checkout, JAX_BUILD="cuda").stdout
    assert asked(checkout)[:2] == ["made", "pip --editable .[cuda]"]


def test_failed_install_is_explained_and_goes_on(checkout):
    (checkout / "broken").touch()
    failed = setup(checkout)
    assert failed.returncode == 2
    assert "ERROR: no such package" in failed.stderr and "run this again" in failed.stderr
    (checkout / "broken").unlink()
    asked(checkout)
    assert "ready" in setup(checkout).stdout
    assert asked(checkout)[0] == "pip --editable ."


def test_half_installed_packages_are_installed_again(checkout):
    setup(checkout)
    site = checkout / ".venv/lib/python3.12/site-packages"
    for name in ("half-1.0.dist-info", "~alf"):
        (site / name).mkdir()
    (checkout / ".venv/setup-complete").unlink()
    asked(checkout)
    assert setup(checkout).returncode == 0
    assert asked(checkout) == ["pip --editable .", "pip-25.dist-info"]


@pytest.mark.parametrize("lost", [".venv/bin/python", ".venv/lib/python3.12/site-packages/pip-25.dist-info/RECORD"])
def test_half_made_environment_is_made_again(checkout, lost):
    setup(checkout)
    (checkout / ".venv/setup-complete").unlink()
    (checkout / lost).unlink()
    asked(checkout)
    assert setup(checkout).returncode == 0
    assert asked(checkout)[0] == "made"


def test_old_python_is_refused(checkout):
    write_tool(checkout, "python", "#!/bin/bash\nexit 1\n")
    refused = setup(checkout)
    assert refused.returncode == 2
    assert "no usable Python 3.11 or newer" in refused.stderr and "PYTHON=/path/to/python3" in refused.stderr
    assert not (checkout / ".venv").exists()


def test_unknown_build_is_refused(checkout):
    refused = setup(checkout, JAX_BUILD="gpu")
    assert (refused.returncode, refused.stderr) == (2, "setup: JAX_BUILD is 'gpu'; it can be cpu, cuda or tpu\n")


@pytest.mark.skipif(HOST_HAS_DRIVER, reason="this host's own driver is found first")
@pytest.mark.parametrize(
    "driver, line",
    [
        ("580.95.05", "jax for cuda: NVIDIA driver 580.95.05 found"),
        ("470.256.02", "jax for cpu: NVIDIA driver 470.256.02 is older than 525: update it and run this again"),
    ],
)
def test_driver_decides_the_build(checkout, driver, line):
    write_tool(checkout, "nvidia-smi", f"#!/bin/bash\necho {driver}\n")
    assert line in setup(checkout, JAX_BUILD="").stdout


def test_scripts_are_valid_and_ci_runs_the_linters_and_the_tests():
    for script in [*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]:
        subprocess.run(["bash", "-n", script], check=True)
    assert {"bash scripts/lint.sh", "bash scripts/test.sh"} <= set(
        re.findall("bash [a-z/.]+", (ROOT / ".ci/run").read_text())
    )


@pytest.mark.parametrize("lint, test", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_ci_runs_both_and_fails_where_one_does(checkout, lint, test):
    shutil.copytree(ROOT / ".ci", checkout / ".ci")
    for name, status in (("lint", lint), ("test", test)):
        (checkout / "scripts" / f"{name}.sh").write_text(f"echo {name} >>said\nexit {status}\n")
    assert bool(subprocess.run(["bash", checkout / ".ci/run"]).returncode) == bool(lint or test)
    assert (checkout / "said").read_text().split() == ["lint", "test"]


def test_the_hooks_before_a_commit_are_tools_of_the_dev_extra():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tools = {re.fullmatch(r"\.venv/bin/(\w+)( .*)?", hook["entry"])[1] for hook in hooks}
    assert tools == {"ruff", "pyright"} and tools <= {re.match(r"[\w-]+", line)[0] for line in extras["dev"]}


def test_lock_is_exact_and_names_no_index():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line) for line in lines)


def test_lock_holds_every_requirement():
    locked = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: lines for name, lines in project["optional-dependencies"].items() if name != "beam"
    }  # apart from others
    wanted = [*project["dependencies"], *itertools.chain(*extras.values())]
    assert names(wanted) <= locked


def imported():
    """The distributions whose modules the package imports, anywhere; those that no extra installs are left out."""
    modules = set()
    for file in (ROOT / "diffjax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules |= {name.split(".")[0] for name in [*names, getattr(node, "module", None) or ""]}
    places = metadata.packages_distributions()
    found = {place for module in modules - {"pillow_heif", "wandb"} for place in places.get(module, [])}
    return {name.lower().replace("_", "-") for name in found} - {"diffjax"}


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {extra: names(lines) for extra, lines in project["optional-dependencies"].items()}
    required["all"] = names(project["dependencies"])
    assert imported() <= required["all"] | required["emoji"] | required["explain"] | {"markupsafe"}  # jinja2's
    assert required["all"] - imported() == {"importlib-resources"}


def names(requirements):
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}


def test_importing_the_package_starts_no_device_and_nothing_slow():
    code = """
import importlib, pkgutil, sys
import diffjax
for module in pkgutil.walk_packages(diffjax.__path__, "diffjax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from jax._src import xla_bridge
slow = {"torch", "diffusers", "transformers", "tensorflow", "grain", "matplotlib",
        "huggingface_hub", "tokenizers", "sentencepiece", "tensorboardX"} & set(sys.modules)
sys.exit(f"imported {sorted(slow)}" if slow else "a device was started" if xla_bridge.backends_are_initialized() else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_container_is_made_of_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert not set(copied) & set((ROOT / ".dockerignore").read_text().split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"EXTRAS=([\w,]+)", "\n".join(lines))
    assert named == ["emoji,cuda", "emoji"] and all(name in extras for each in named for name in each.split(","))
