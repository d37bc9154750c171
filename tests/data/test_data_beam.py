"""Data prepared by Beam are those that one process prepares."""

import importlib.util
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffjax import data
from diffjax.utils.errors import UserError

beam = pytest.mark.skipif(not importlib.util.find_spec("apache_beam"), reason="needs the extra `beam`")


def shards(folder, count=3, each=5):
    """Tar files of pictures with captions, one of them broken."""
    draw = np.random.default_rng(0)
    for i in range(count):
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{i}.tar", "w") as tar:
            for j in range(each):
                buffer = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(buffer, ("PNG", "JPEG")[j % 2])
                picture = buffer.getvalue()[: 40 if i == j == 1 else None]
                for name, body in ((f"{j}.{('png', 'jpg')[j % 2]}", picture), (f"{j}.txt", f"thing {i} {j}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
    return {"name": "webdataset", "path": str(folder), "size": 16}


@beam
@pytest.mark.parametrize("kind", ["webdataset", "captioned_folder"])
def test_beam_prepares_the_same_records(tmp_path, kind):
    config = shards(tmp_path / "shards")
    if kind == "captioned_folder":
        for file in (tmp_path / "shards").glob("*.tar"):
            with tarfile.open(file) as tar:
                tar.extractall(tmp_path / "pictures" / file.stem, filter="data")
        config |= {"name": kind, "path": str(tmp_path / "pictures")}
    data.prepare_by_beam({**config, "data_dir": str(tmp_path / "beam")}, "--runner=DirectRunner")
    ours, theirs = (data.load({**config, "data_dir": str(tmp_path / name)}) for name in ("one", "beam"))
    assert len(theirs) == 14 and ours.records.digest() == theirs.records.digest()
    assert [ours.records[i] for i in range(14)] == [theirs.records[i] for i in range(14)]
    assert ours.skipped.read() == theirs.skipped.read() and len(theirs.skipped.read()) == 1


@beam
def test_nothing_that_can_be_used_is_said(tmp_path):
    config = shards(tmp_path / "shards") | {"size": 64, "data_dir": str(tmp_path / "beam")}
    with pytest.raises(UserError, match="none of the pictures in .* can be used"):
        data.prepare_by_beam(config, "--runner=DirectRunner")


def test_without_beam_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(UserError, match=r"pip install 'diffjax\[beam\]'"):
        data.prepare_by_beam(shards(tmp_path), "")
    with pytest.raises(UserError, match="leave it out for openmoji"):
        data.prepare_by_beam({"name": "openmoji"}, "")
