import errno
import os
import subprocess
import sys
import types

import pytest

from diffjax import cli
from diffjax.parallel import devices
from diffjax.utils.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config(size="small"):
    return ConfigDict({"size": size, "train": {"steps": 100, "rate": 1e-3, "ema": True, "betas": (0.9, 0.99)}})
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def trained(monkeypatch):
    """What the training loop was called with, in place of training."""
    calls = []
    loop = types.ModuleType("diffjax.train.loop")
    loop.train = lambda config, workdir, allow_change: calls.append((config, workdir, allow_change))
    monkeypatch.setitem(sys.modules, "diffjax.train.loop", loop)
    monkeypatch.setattr(devices, "start", lambda: None)
    return calls


def commands() -> list[str]:
    return list(cli.COMMANDS)


def test_every_command_teaches(capsys):
    for command in commands():
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert f"examples:\n  diffjax {command}" in text and "--debug" in text


def test_help_imports_nothing_slow():
    code = """
import sys
from diffjax.cli import main
try:
    main(["--help"])
except SystemExit:
    slow = {"jax", "numpy", "flax", "ml_collections", "rich", "PIL"} & set(sys.modules)
    sys.exit(f"imported {slow}" if slow else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_no_command_prints_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    out = capsys.readouterr().out
    assert all(command in out for command in commands())


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["trian"], "unknown command trian: did you mean train?"),
        (["doctor", "--jsn"], "unknown flag --jsn: did you mean --json?"),
        (["doctor", "--requires=gpu"], "unknown flag --requires: did you mean --require?"),
        (["doctor", "--require", "gpus"], "unknown device gpus: did you mean gpu?"),
        (["doctor", "now"], "unexpected argument now (see `diffjax doctor --help`)"),
        (["train", "--workdir", "x"], "the following arguments are required: --config (see `diffjax train --help`)"),
        (["train", "--config"], "argument --config: expected one argument (see `diffjax train --help`)"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(arguments, line, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and line in err and err.count("\n") == 1


def test_train_gets_config_and_workdir(config_file, trained):
    overrides = ["--config.train.steps=7", "--config.train.rate", "2", "--noconfig.train.ema"]
    status = cli.main(["train", "--config", f"{config_file}:large", "--workdir", "w", *overrides])
    assert status == 0
    [(config, workdir, allow_change)] = trained
    expected = {"steps": 7, "rate": 2.0, "ema": False, "betas": (0.9, 0.99)}
    assert config.to_dict() == {"size": "large", "train": expected} and workdir == "w"
    assert not allow_change


def test_train_is_told_what_may_change_and_what_to_begin_from(config_file, trained, capsys):
    flags = ["train", "--config", f"{config_file}:large", "--workdir", "w"]
    assert (
        cli.main([*flags, "--allow-change", "--init-from", "runs/a", "--init-step", "7", "--init-weights", "raw"]) == 0
    )
    [(config, _, allow_change)] = trained
    assert allow_change and config.init_from.to_dict() == {"run": "runs/a", "step": 7, "weights": "raw"}
    assert cli.main([*flags, "--init-step", "7"]) == 2 and "--init-from" in capsys.readouterr().err
    assert (
        cli.main([*flags, "--init-from", "a", "--init-weights", "emma"]) == 2
        and "did you mean ema" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "override, line",
    [
        ("--config.train.stepz=1", "unknown config key train.stepz: did you mean train.steps?"),
        ("--config.train.steps=1.5", "config key train.steps takes a whole number, not 1.5"),
        ("--config.train.ema=maybe", "config key train.ema takes true or false, not maybe"),
        ("--config.train.rate=fast", "config key train.rate takes a number, not fast"),
        ("--config.train.steps", "Missing value for flag --config.train.steps"),
        ("--worktree=x", "unknown flag --worktree: did you mean --workdir?"),
    ],
)
def test_wrong_overrides_are_one_line_and_train_nothing(override, line, config_file, trained, capsys):
    assert cli.main(["train", "--config", config_file, "--workdir", "w", override]) == 2
    assert capsys.readouterr().err == f"diffjax: {line}\n"
    assert trained == []


@pytest.mark.parametrize(
    "source, line",
    [
        (None, "no config file"),
        ("x = 1", "has no get_config()"),
        ("import not_installed", "cannot be run (ModuleNotFoundError: No module named 'not_installed')"),
        ("def get_config(): return {}['x']", "cannot be run (KeyError: 'x')"),
    ],
)
def test_unusable_config_files_are_one_line(source, line, tmp_path, trained, capsys):
    path = tmp_path / "experiment.py"
    if source:
        path.write_text(source)
    assert cli.main(["train", "--config", str(path), "--workdir", "w"]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def fail_with(error, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setattr(cli, "parse", lambda argv: types.SimpleNamespace(run=run))


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("no weights here: look there"), 2, "no weights here: look there"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from what is saved"),
        (OSError(errno.ENOSPC, "No space left", "/data/x"), 2, "the disk is full (/data/x): free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "Permission denied (/data/x)"),
        (MemoryError(), 2, "out of memory: use a smaller batch"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 2, "out of memory: use a smaller batch"),
        (KeyError("params"), 1, "this looks like a bug: KeyError: 'params' (--debug shows where)"),
    ],
)
def test_errors_are_one_line_with_their_status(error, status, line, monkeypatch, capsys):
    fail_with(error, monkeypatch)
    assert cli.main(["x"]) == status
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_debug_shows_the_traceback_and_keeps_the_status(monkeypatch, capsys):
    fail_with(UserError("no weights"), monkeypatch)
    assert cli.main(["x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_silent():
    code = "import sys; from diffjax.cli import main; sys.exit(main(['doctor']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == ("", 0)


def test_a_terminal_of_another_encoding_is_no_bug(tmp_path):
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "diffjax", "init", str(tmp_path / "caf\u00e9")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and r"caf\xe9" in done.stdout, done.stderr


@pytest.mark.parametrize("words", [("sample", "--model", "toy", "--out"), ("convert", "toy")], ids=" ".join)
def test_nothing_is_written_to_an_object_store(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "s3://bucket/out"]) == 2
    assert "s3://bucket/out is an address" in capsys.readouterr().err and not list(tmp_path.iterdir())
