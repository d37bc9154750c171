import gzip
import io
import json
import tarfile

import pytest
from PIL import Image

from diffjax import data
from diffjax.data import webdataset
from diffjax.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))


def encoded(red, form, size=(20, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            body = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def load(path, **fields):
    return data.load({"name": "webdataset", "path": str(path), "size": 16, **fields})


def reds(found):
    shown = found.examples(range(len(found)))
    return {captions: int(image[0, 0, 0]) // 10 * 10 for captions, image in zip(shown["captions"], shown["image"])}


def test_pictures_with_their_captions(tmp_path):
    shard = write(
        tmp_path / "0.tar",
        [
            ("a/1.png", encoded(10, "PNG")),
            ("a/1.txt", "one\nfirst\n".encode()),
            ("a/1.json", json.dumps({"caption": "one", "width": 20}).encode()),
            ("a/2.json", b'{"text": ["two"]}'),
            ("a/2.cls", b"7"),
            ("a/2.JPG", encoded(40, "JPEG")),
            ("b/1.webp", encoded(80, "WEBP")),
            ("b/1.txt", "three".encode()),
            ("b/1.seg.png", encoded(0, "PNG")),
        ],
    )
    assert reds(load(shard)) == {("one", "first"): 10, ("two",): 40, ("three",): 80}


def test_shards_are_one_data_set_that_is_prepared_once(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    for number in range(3):
        write(tmp_path / "shards" / f"{number}.tar", [("0.png", encoded(10 * number, "PNG")), ("0.txt", f"{number}".encode())])
    assert reds(load(tmp_path / "shards")) == {("0",): 0, ("1",): 10, ("2",): 20}
    assert reds(load(tmp_path / "shards" / "[12].tar")) == {("1",): 10, ("2",): 20}
    monkeypatch.setattr(webdataset, "_index", None)
    assert len(load(tmp_path / "shards")) == 3


def test_hostile_members_touch_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(webdataset.MOST_BYTES, ".txt", 50)
    outside = tmp_path / "outside.png"
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(250, "PNG"))
    shard = write(
        tmp_path / "evil.tar",
        [
            ("../outside.png", encoded(10, "PNG")),
            ("../outside.txt", b"up"),
            (f"{tmp_path}/outside2.png", encoded(20, "PNG")),
            (f"{tmp_path}/outside2.txt", b"root"),
            link("leak.png", str(secret)),
            ("leak.txt", b"leak"),
            link("hard.png", str(secret), tarfile.LNKTYPE),
            ("long.png", encoded(30, "PNG")),
            ("long.txt", b"x" * 51),
            ("odd.png", encoded(40, "PNG")),
            ("odd.txt", b"\xff\xfe\xff"),
            ("small.png", encoded(50, "PNG", (8, 8))),
            ("small.txt", b"small"),
            ("broken.png", b"nothing"),
            ("broken.txt", b"broken"),
            ("silent.png", encoded(60, "PNG")),
        ],
    )
    before = {file for file in tmp_path.rglob("*") if "home" not in file.parts}
    found = load(shard)
    assert reds(found) == {("up",): 10, ("root",): 20}
    assert {file for file in tmp_path.rglob("*") if "home" not in file.parts} == before and not outside.exists()
    assert {name: why.partition(";")[0][:45] for name, why in found.skipped.read()} == {
        "evil.tar/leak.png": f"is a link to {secret}"[:45],
        "evil.tar/hard.png": f"is a link to {secret}"[:45],
        "evil.tar/long.png": "long.txt has more than 0 MiB",
        "evil.tar/odd.png": "odd.txt cannot be read: line 1 is not UTF-8: ",
        "evil.tar/small.png": "a picture is 8 x 8 pixels, smaller than data.",
        "evil.tar/broken.png": "cannot be read: no picture in any known forma",
        "evil.tar/silent.png": "has no caption",
    }


def test_damaged_and_compressed_shards_are_named(tmp_path):
    whole = write(tmp_path / "0.tar", [(f"{i}.png", encoded(i, "PNG")) for i in range(9)]).read_bytes()
    for content in (whole[:700], b"nothing at all", gzip.compress(whole)):
        (tmp_path / "0.tar").write_bytes(content)
        with pytest.raises(UserError, match="0.tar is no tar file, or damaged .* download it again, and uncompress it"):
            load(tmp_path / "0.tar")
    with pytest.raises(UserError, match="is no .tar file, folder of them or pattern"):
        load(tmp_path / "1.tar")
