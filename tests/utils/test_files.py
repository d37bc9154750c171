import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffjax.utils import files
from diffjax.utils.errors import UserError, unknown
from diffjax.utils.files import home, lock, open_atomic, write_atomic, write_json


def test_home_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", "~/elsewhere")
    assert home() == Path("~/elsewhere").expanduser()
    monkeypatch.delenv("DIFFJAX_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert home() == Path("/caches/diffjax")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert home() == Path.home() / ".cache" / "diffjax"


@pytest.mark.parametrize("place", ["gs://bucket/run", Path("s3://bucket/run"), "file:///run"])
def test_an_address_is_no_folder_here(place):
    with pytest.raises(UserError, match="is an address, .*: name a folder on a file system"):
        files.local(place)
    assert files.local("~/run") == Path.home() / "run" and files.local("a/gs:/b") == Path("a/gs:/b")


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.bin"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["b.bin"]


def test_json_keeps_unicode(tmp_path):
    write_json(tmp_path / "x.json", {"prompt": "œuf 🥚"})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "🥚" in text and json.loads(text) == {"prompt": "œuf 🥚"}


def test_interrupted_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_full_disk_is_said_and_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(UserError, match="choose another folder"):
        write_atomic(tmp_path / "x" / "y", b"")


def test_unknown_names_the_nearest_or_all():
    assert str(unknown("sampler", "dpm2m", ["ddim", "dpmpp_2m"])) == "unknown sampler dpm2m: did you mean dpmpp_2m?"
    assert str(unknown("sampler", "xyz", ["ddim", "heun"])) == "unknown sampler xyz: it can be ddim, heun"


def test_a_lock_is_refused_by_the_number_of_its_holder_until_the_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "a+") as first, open(tmp_path / "lock", "a+") as second:
        lock(first)
        with pytest.raises(UserError, match=f"^process {os.getpid()} is at work here; wait for it$"):
            lock(second, refusal="is at work here; wait for it")
        first.close()
        lock(second, refusal="is at work here; wait for it")
    assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_lock_is_waited_for(tmp_path):
    taken = threading.Event()

    def wait():
        with open(tmp_path / "lock", "a+") as second:
            lock(second)
            taken.set()

    with open(tmp_path / "lock", "a+") as first:
        lock(first)
        other = threading.Thread(target=wait)
        other.start()
        assert not taken.wait(0.1)
    assert taken.wait(60)
    other.join()


def test_a_file_system_without_locks_goes_without(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with open(tmp_path / "lock", "a+") as file:
        lock(file)
        lock(file, refusal="is at work here")


def test_what_a_killed_writer_leaves_is_swept(tmp_path):
    code = (
        "import os, signal, sys; from diffjax.utils import files\n"
        "with files.open_atomic(sys.argv[1]) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")])
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    (tmp_path / ".hidden").write_text("mine")
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]
