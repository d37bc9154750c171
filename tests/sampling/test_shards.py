import dataclasses
import errno
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
import tensorflow_datasets as tfds
import toys
from PIL import Image

from diffjax import loading
from diffjax.data.webdataset import Shards as Tars
from diffjax.models import prompt_cache
from diffjax.parallel import hosts
from diffjax.sampling import batches, folder, job
from diffjax.sampling.job import Request
from diffjax.sampling.shards import FORMATS
from diffjax.utils import image
from diffjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """The models that `generate` loads, by name, on one device."""
    found = {"plain": toys.model(), "texts": toys.model(text=True), "classes": toys.model(classes=("cat", "dog"))}
    monkeypatch.setattr(loading, "load", lambda name, *_, **__: found[name].replace(name=name))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    return found


def contents(out):
    """The bytes of the files of many in a folder."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if ".tar" in path.name or "-of-" in path.name}


def members(out):
    """The bytes of the members of all tar files, in their order."""
    found = {}
    for path in sorted(Path(out).glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def test_tar_files_hold_the_pictures_that_a_folder_does(tmp_path):
    request = dict(prompts=("red heart", "pizza"), num=3, seed=5)
    job.generate(Request("texts", **request), tmp_path / "png")
    gallery = job.generate(Request("texts", **request, format="webdataset", per_file=4), tmp_path / "tar")
    there = ["00000.tar", "00001.tar", "grid.png", "manifest.json"]
    assert sorted(path.name for path in (tmp_path / "tar").iterdir()) == there
    found = members(tmp_path / "tar")
    assert [*found] == [f"{i:08d}.{suffix}" for i in range(6) for suffix in ("png", "txt")]
    pngs = sorted((tmp_path / "png").glob("0*.png"))
    assert [found[f"{i:08d}.png"] for i in range(6)] == [path.read_bytes() for path in pngs]
    assert [found[f"{i:08d}.txt"].decode() for i in range(6)] == ["red heart"] * 3 + ["pizza"] * 3
    read = [picture.captions for picture in Tars(tmp_path / "tar").pictures()]
    assert read == [("red heart",)] * 3 + [("pizza",)] * 3
    entries = folder.read_manifest(tmp_path / "tar" / "manifest.json")["shards"]
    expected = [(size, folder.sha256(gallery.file(i))) for i, size in enumerate((4, 2))]
    assert [(entry["images"], entry["sha256"]) for entry in entries] == expected


def test_a_tfds_data_set_holds_the_pictures_that_a_folder_does(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\ndog\n")
    request = dict(each_label=str(tmp_path / "labels.txt"), num=7)
    job.generate(Request("classes", **request), tmp_path / "png")
    job.generate(Request("classes", **request, format="array_record", per_file=3), tmp_path / "records")
    examples = [*tfds.builder_from_directory(tmp_path / "records").as_data_source("train")]
    assert [example["number"] for example in examples] == [*range(7)]
    assert [example["label"].decode() for example in examples] == ["cat", "dog", "dog", "cat", "dog", "dog", "cat"]
    for i, example in enumerate(examples):
        assert (example["image"] == image.read_png(tmp_path / "png" / f"{i:08d}.png")[0]).all()


def test_each_picture_is_of_its_line_and_has_the_key_of_its_number(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("red heart\npizza\n")
    job.generate(Request("texts", each_prompt=str(tmp_path / "prompts.txt"), num=3, seed=2), tmp_path / "out")
    lines = ["red heart", "pizza", "red heart"]
    expected = image.to_uint8(models["texts"].sample(jax.random.key(2), num=3, prompt=lines))
    for i, line in enumerate(lines):
        pixels, about = image.read_png(tmp_path / "out" / f"{i:08d}.png")
        assert (pixels == expected[i]).all() and about["prompt"] == line
    (tmp_path / "prompts.txt").write_text("red heart\nheart\n")
    with pytest.raises(UserError, match="files.each_prompt is"):
        job.generate(Request("texts", each_prompt=str(tmp_path / "prompts.txt"), num=3, seed=2), tmp_path / "out")


def test_many_prompts_are_read_batch_by_batch_to_the_same_pictures(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("".join(f"thing {i}\n" for i in range(9)))
    request = Request("texts", each_prompt=str(tmp_path / "prompts.txt"), num=9)
    job.generate(request, tmp_path / "few")
    monkeypatch.setattr(job, "MANY", 4)
    job.generate(request, tmp_path / "many")
    for path in (tmp_path / "few").glob("0*.png"):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_the_conditioning_of_many_prompts_stays_on_disk(monkeypatch):
    words, loads = toys.model(text=True).text, []
    prompts = [f"thing {i}" for i in range(6)]
    load = lambda: loads.append(1) or words
    whole = prompt_cache.remembered("toy", prompts, load)
    monkeypatch.setattr(prompt_cache, "MANY", 4)
    on_disk = prompt_cache.remembered("toy", prompts, load)
    assert isinstance(on_disk, prompt_cache.OnDisk) and loads == [1]
    for name, leaf in whole(["thing 3", "thing 0"]).items():
        assert (on_disk(["thing 3", "thing 0"])[name] == leaf).all()
    with pytest.raises(UserError, match="'cat' was not among the prompts"):
        on_disk(["cat"])


def test_without_a_terminal_a_line_says_now_and_then_what_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batches, "REPORT_SECONDS", 0.0)
    job.generate(Request("plain", num=12, steps=2, batch=4), tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("12 images")]
    assert any(line.split()[2] == "4/6" and "steps, left" in line for line in lines), lines


class Killed(BaseException):
    pass


def die(*_):
    raise Killed


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("moment", ["while drawing", "before a file", "after a file"])
def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path, monkeypatch, format, moment):
    request = Request("plain", num=11, steps=3, format=format, per_file=6)
    job.generate(request, tmp_path / "whole")
    pack = job.Shards._pack
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "while drawing":
            patch.setattr(job.Job, "finish", die)
        else:
            after = lambda gallery, index: die(pack(gallery, index))
            patch.setattr(job.Shards, "_pack", after if moment == "after a file" else die)
        job.generate(request, tmp_path / "killed")
    assert bool(contents(tmp_path / "killed")) == (moment == "after a file")
    job.generate(request, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not any((tmp_path / "killed" / name).exists() for name in folder.UNDER_WAY)


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_is_drawn_again(tmp_path, caplog, format):
    request = Request("plain", num=8, steps=2, format=format, per_file=4)
    gallery = job.generate(request, tmp_path / "out")
    whole = contents(tmp_path / "out")
    gallery.file(1).write_bytes(gallery.file(1).read_bytes()[:-1])
    job.generate(request, tmp_path / "out")
    assert contents(tmp_path / "out") == whole and f"{gallery.file(1)} is damaged: it is drawn again" in caplog.text


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_sheet_is_made_again_from_the_file_of_its_pictures(tmp_path, monkeypatch, format):
    request = Request("texts", prompts=("red heart", "pizza"), num=4, steps=2, format=format, per_file=3)
    gallery = job.generate(request, tmp_path / "out")
    sheet = tmp_path / "out" / "grid.png"
    whole, written = sheet.read_bytes(), {path: path.stat().st_mtime_ns for path in map(gallery.file, range(3))}
    for damage in (sheet.unlink, lambda: sheet.write_bytes(whole[:-7]), lambda: sheet.write_bytes(whole[:-1] + b"?")):
        damage()
        with monkeypatch.context() as patch:
            patch.setattr(job.Job, "run", die)
            job.generate(request, tmp_path / "out")
        assert sheet.read_bytes() == whole
    assert written == {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(folder, "ON_SHEET", 3)
    job.generate(dataclasses.replace(request, format="png"), tmp_path / "png")
    assert (tmp_path / "png" / "grid.png").read_bytes() == whole


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: data[:80] + b"\0" + data[81:], lambda _: b""])
def test_a_damaged_picture_is_drawn_again(tmp_path, caplog, damage):
    job.generate(Request("plain", num=2, steps=2), tmp_path)
    path = tmp_path / "0001.png"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    job.generate(Request("plain", num=2, steps=2), tmp_path)
    assert path.read_bytes() == whole and "is damaged" in caplog.text


def test_a_damaged_manifest_is_said_with_a_remedy(tmp_path):
    request = Request("plain", num=2, steps=2)
    job.generate(request, tmp_path)
    (tmp_path / "manifest.json").write_text('{"recipe": {')
    with pytest.raises(UserError, match="manifest.json is damaged: put it back, or --overwrite draws all again"):
        job.generate(request, tmp_path)
    job.generate(request, tmp_path, overwrite=True)
    assert folder.read_manifest(tmp_path / "manifest.json")["images"]


def test_shards_are_replayed_and_never_mixed_with_others(tmp_path, capsys):
    how = {"num": 5, "steps": 2, "format": "webdataset", "per_file": 2}
    job.generate(Request("plain", **how), tmp_path / "out")
    assert job.replay(tmp_path / "out" / "manifest.json", tmp_path / "again")
    assert "3 of 3 files: the same, byte for byte" in capsys.readouterr().out
    for other in ({"num": 6}, {"per_file": 3}, {"format": "png"}):
        with pytest.raises(UserError, match="holds pictures of another recipe"):
            job.generate(Request("plain", **how | other), tmp_path / "out")
    job.generate(Request("plain", num=2, steps=2), tmp_path / "out", overwrite=True)
    there = ["0000.png", "0001.png", "grid.png", "manifest.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == there


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, format):
    request = Request("plain", num=6, steps=2, format=format, per_file=3)
    job.generate(request, tmp_path / "whole")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device; free some space"):
        patch.setattr(type(FORMATS[format]), "write", full)
        job.generate(request, tmp_path / "full")
    job.generate(request, tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.mark.parametrize("format", ["png", *FORMATS])
def test_two_processes_draw_what_one_does_each_its_own(tmp_path, monkeypatch, format):
    request = Request("plain", num=30, steps=2, format=format, per_file=8)
    job.generate(request, tmp_path / "one")
    together, process, drawn = threading.Barrier(2), threading.local(), []
    monkeypatch.setattr(hosts, "meet", lambda: together.wait(60))
    monkeypatch.setattr(hosts, "first", lambda function: (function() if process.index == 0 else None, hosts.meet()))
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "index", lambda: process.index)
    write = folder.Gallery.write
    note = lambda self, pictures, images: (drawn.extend(pictures), write(self, pictures, images))
    monkeypatch.setattr(folder.Gallery, "write", note)

    def run(index):
        process.index = index
        job.generate(request, tmp_path / "two")

    with ThreadPoolExecutor(2) as processes:
        list(processes.map(run, range(2)))
    assert len(drawn) == len({*drawn}) == 30
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in ("one", "two"))
    assert all(one[name] == two[name] for name in one.keys() | two.keys() if name != "manifest.json")


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import toys
from diffjax import loading
from diffjax.parallel import devices, hosts
from diffjax.sampling import job
devices.join_hosts()
model = toys.model().replace(name="plain")
loading.load = lambda *_, **__: model
job.generate(job.Request("plain", num=300, steps=3, format="webdataset", per_file=40), sys.argv[2])
hosts.leave()
"""


def start(out):
    """The job of 300 pictures, begun as two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    alike = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}  # as the fixture `optimized` has it
    environment = os.environ | alike | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-c", SCRIPT, str(Path(toys.__file__).parent), str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, **quiet) for i in range(2)]


@pytest.mark.slow
def test_one_process_and_two_that_are_killed_draw_the_same_300_pictures(tmp_path):
    request = Request("plain", num=300, steps=3, format="webdataset", per_file=40)
    job.generate(request, tmp_path / "one")
    killed = start(tmp_path / "two")
    while not list((tmp_path / "two").glob("*.tar")):
        assert all(process.poll() is None for process in killed)
        time.sleep(0.01)
    for process in killed:
        process.kill()
        process.wait()
    assert len(contents(tmp_path / "two")) < 8
    assert [process.wait() for process in start(tmp_path / "two")] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(contents(tmp_path / "one")) == 8
    job.generate(dataclasses.replace(request, batch=7), tmp_path / "other")
    one, other = (pixels(tmp_path / name) for name in ("one", "other"))
    assert len(one) == 300 and one == other


def pixels(out):
    """The values of all pictures of the tar files in a folder."""
    return {name: Image.open(io.BytesIO(data)).tobytes() for name, data in members(out).items()}
