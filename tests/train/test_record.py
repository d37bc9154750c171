import json
import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from diffjax.train import record
from diffjax.utils import provenance
from diffjax.utils.errors import UserError


def config(**changes):
    base = {"seed": 0, "train": {"steps": 10, "batch": 4}, "dit": {"width": 8, "sizes": (1, 2)}}
    base |= {"data": {"path": "here", "workers": 0}, "sample": {"prompts": ("b",)}}
    config = ConfigDict(base)
    config.update_from_flattened_dict({name: value for name, value in changes.items() if name != "init_from"})
    config.update({name: value for name, value in changes.items() if name == "init_from"})
    return config


def claim(folder, **changes):
    with record.claim(folder, config(**changes)):
        pass


def test_a_run_says_how_it_was_started(tmp_path):
    claim(tmp_path / "run")
    claim(tmp_path / "run", **{"train.steps": 20})
    first, second = json.loads((tmp_path / "run" / "run.json").read_text())
    assert first["packages"]["jax"] and first["device"].startswith("CPU") and first["command"]
    assert (
        set(first) == {"time", "command", "git", "python", "packages", "device", "determinism", "host"} == set(second)
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 20


def test_another_config_is_refused_and_the_difference_shown(tmp_path):
    claim(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        claim(tmp_path, **{"train.batch": 8, "dit.width": 16, "train.steps": 99})
    assert "dit.width is 8 there and 16 here; train.batch is 4 there and 8 here" in str(error.value)
    assert "steps" not in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_may_change_is_noted_and_what_is_allowed_too(tmp_path, capsys):
    def begin(allow=False, **changes):
        with record.claim(tmp_path, config(**changes), allow):
            pass
        return json.loads((tmp_path / "changes.json").read_text()) if (tmp_path / "changes.json").exists() else []

    assert begin() == begin() == []
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (entry,) = begin(**{"train.steps": 20, "data.path": "elsewhere", "data.workers": 4, "sample.prompts": ("a",)})
    moved = {
        "train.steps": [10, 20],
        "data.path": ["here", "elsewhere"],
        "data.workers": [0, 4],
        "sample.prompts": [["b"], ["a"]],
    }
    assert entry["step"] == 7 and entry["changes"] == moved and set(entry) == {"time", "step", "changes"}
    with pytest.raises(UserError, match="dit.width is 8 there and 16 here.*--allow-change"):
        begin(**{"dit.width": 16})
    assert [one["changes"] for one in begin(allow=True, **{"dit.width": 16})][1]["dit.width"] == [8, 16]
    assert "changed: dit.width was 8 and is 16\n" in capsys.readouterr().out


def test_what_a_run_begins_from_changes_until_it_has_begun(tmp_path):
    claim(tmp_path)
    with record.claim(tmp_path, config(init_from={"run": "a"}), allow_change=True):
        pass
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    claim(tmp_path, init_from={"run": "a"})
    for other in ({"run": "b"}, None):
        with (
            pytest.raises(UserError, match="has begun"),
            record.claim(tmp_path, config(init_from=other), allow_change=True),
        ):
            pass


def test_changes_that_could_not_begin_leave_the_run_as_it_was(tmp_path):
    claim(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    for error in (UserError, KeyboardInterrupt):
        with pytest.raises(error), record.claim(tmp_path, config(**{"train.batch": 8}), allow_change=True):
            raise error("no such data")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before
    claim(tmp_path)


def test_a_config_that_could_not_begin_can_be_mended(tmp_path):
    (tmp_path / "notes.json").write_text("mine")

    def begin(metrics=False, **changes):
        with record.claim(tmp_path, config(**changes)):
            (tmp_path / "data.json").write_text("of the data")
            if metrics:
                (tmp_path / "metrics.jsonl").write_text("{}")
            raise UserError("no such data")

    for batch in (8, 16):
        with pytest.raises(UserError, match="no such data"):
            begin(**{"train.batch": batch})
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "notes.json"}
    with pytest.raises(UserError, match="no such data"):
        begin(metrics=True)
    with pytest.raises(UserError, match="no such data"):
        begin()
    with pytest.raises(UserError, match="holds a run of another config"):
        claim(tmp_path, **{"train.batch": 8})


def test_a_run_that_could_not_begin_leaves_no_folder(tmp_path):
    for name in ("deep/run", "other"):
        with pytest.raises(UserError), record.claim(tmp_path / "runs" / name, config()):
            if name == "other":
                (tmp_path / "runs" / "own").mkdir()
            raise UserError("no such data")
        assert not (tmp_path / "runs" / name).exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "own"]


def test_a_field_more_or_less_is_a_difference():
    there, here = {"a": {"b": 1}}, {"a": {"b": 1, "c": None}, "d": 2}
    assert provenance.differences(there, here, record.MAY_CHANGE) == ["d is null there and 2 here"]
    assert provenance.differences(here, there, record.MAY_CHANGE) == ["d is 2 there and null here"]


def test_two_processes_cannot_train_in_one_workdir(tmp_path):
    code = f"""
import fcntl, sys
file = open({str(tmp_path / ".lock")!r}, "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print(77, end="", file=file, flush=True)
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="process 77 is training in"):
            claim(tmp_path)
        other.stdin.close()
    claim(tmp_path)


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        claim(tmp_path / "file" / "run")


def test_git_state(tmp_path):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    assert provenance.git_state(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a", "commit", "-m", "a")
    index = tmp_path / ".git" / "index"
    os.utime(tmp_path / "a", (0, 0))  # `git status` would note that the file is the same all the same
    before = index.read_bytes()
    assert provenance.git_state(tmp_path)["changed"] is False and index.read_bytes() == before
    (tmp_path / "a").write_text("2")
    state = provenance.git_state(tmp_path)
    assert state["changed"] is True and len(state["commit"]) == 40
