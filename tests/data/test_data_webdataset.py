import gzip
import io
import json
import tarfile

import pytest
from PIL import Image

from diffjax import data
from diffjax.data import webdataset
from diffjax.data.skipped import Skipped
from diffjax.utils.errors import UserError


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
            ("a/1.txt", b"one\nfirst\n"),
            ("a/1.json", json.dumps({"caption": "one", "width": 20}).encode()),
            ("a/2.json", b'{"text": ["two"]}'),
            ("a/2.cls", b"7"),
            ("a/2.JPG", encoded(40, "JPEG")),
            ("b/1.webp", encoded(80, "WEBP")),
            ("b/1.txt", b"three"),
            ("b/1.seg.png", encoded(0, "PNG")),
        ],
    )
    assert reds(load(shard)) == {("one", "first"): 10, ("two",): 40, ("three",): 80}


def test_shards_are_one_data_set_that_is_prepared_once(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    for number in range(3):
        write(
            tmp_path / "shards" / f"{number}.tar",
            [("0.png", encoded(10 * number, "PNG")), ("0.txt", f"{number}".encode())],
        )
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


def named(found):
    return dict(found.skipped.read())


def test_dots_in_keys_hide_no_picture(tmp_path):
    shard = write(
        tmp_path / "0.tar",
        [
            ("v1.0/2020.01.02.png", encoded(10, "PNG")),
            ("v1.0/2020.01.02.txt", b"a date"),
            ("v1.0/2020.01.03.png", encoded(20, "PNG")),
            ("v1.0/2020.01.03.txt", b"another"),
            ("pair.left.png", encoded(30, "PNG")),
            ("pair.right.png", encoded(40, "PNG")),
            ("pair.txt", b"both"),
            ("scene.jpg", encoded(50, "JPEG")),
            ("scene.depth.png", encoded(60, "PNG")),
            ("scene.txt", b"a scene"),
            ("whole.png.txt", b"by its whole name"),
            ("whole.png", encoded(70, "PNG")),
        ],
    )
    found = load(shard)
    assert len(found) == 6
    shown = found.examples(range(6))
    told = sorted(
        (captions[0], round(int(image[0, 0, 0]), -1)) for captions, image in zip(shown["captions"], shown["image"])
    )
    assert told == [
        ("a date", 10),
        ("a scene", 50),
        ("another", 20),
        ("both", 30),
        ("both", 40),
        ("by its whole name", 70),
    ]
    assert named(found) == {"0.tar/scene.depth.png": "is another picture of its key, without captions of its own"}


def test_the_same_key_again_is_another_sample(tmp_path):
    once = [
        ("1.png", encoded(10, "PNG")),
        ("1.txt", b"one"),
        ("2.png", encoded(20, "PNG")),
        ("2.jpg", encoded(30, "JPEG")),
        ("2.txt", b"two"),
    ]
    again = [("1.webp", encoded(40, "WEBP")), ("1.txt", b"three"), ("2.txt", b"four"), ("2.png", encoded(50, "PNG"))]
    found = load(write(tmp_path / "0.tar", once + again))
    shown = found.examples(range(len(found)))
    told = sorted(
        (captions[0], round(int(image[0, 0, 0]), -1)) for captions, image in zip(shown["captions"], shown["image"])
    )
    assert told == [("four", 50), ("one", 10), ("three", 40), ("two", 20), ("two", 30)]


def test_links_within_a_shard_are_what_they_lead_to(tmp_path):
    shard = write(
        tmp_path / "0.tar",
        [
            link("early.png", "a/1.png"),
            ("early.txt", b"early"),
            ("a/1.png", encoded(10, "PNG")),
            ("a/1.txt", b"one"),
            link("hard.png", "a/1.png", tarfile.LNKTYPE),
            link("hard.txt", "a/1.txt", tarfile.LNKTYPE),
            link("b/up.png", "../a/1.png"),
            ("b/up.txt", b"up"),
            link("round.png", "round.png"),
            link("thing.cls", "/etc/hostname"),
        ],
    )
    found = load(shard)
    shown = found.examples(range(len(found)))
    assert sorted(captions[0] for captions in shown["captions"]) == ["early", "one", "one", "up"]
    assert {int(image[0, 0, 0]) // 10 for image in shown["image"]} == {1}
    assert named(found) == {"0.tar/round.png": "is a link that leads to itself"}


def test_what_might_be_a_picture_is_named(tmp_path):
    shard = write(
        tmp_path / "0.tar",
        [
            ("good.JPE", encoded(10, "JPEG")),
            ("good.txt", b"good"),
            ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(20)),
            ("phone.txt", b"phone"),
            (".hidden.png", encoded(20, "PNG")),
            ("._good.JPE", b"\0\5\x16\7"),
            ("bare", encoded(30, "PNG")),
            ("cafe\u0301.png", encoded(40, "PNG")),
            ("caf\u00e9.txt", "caf\u00e9".encode()),
            ("bytes\udcff.png", encoded(50, "PNG")),
            ("bytes\udcff.txt", b"bytes"),
            ("good.npy", b"numbers"),
        ],
    )
    found = load(shard)
    assert reds(found) == {("good",): 10, ("caf\u00e9",): 40, ("bytes",): 50}
    assert {name: why[:20] for name, why in named(found).items()} == {
        "0.tar/phone.heic": "cannot be read: HEIF",
        "0.tar/.hidden.png": "is hidden: its name ",
        "0.tar/bare": "is a picture whose n",
    }


def test_shards_that_were_joined_or_packed_are_refused(tmp_path):
    (tmp_path / "s" / "deep").mkdir(parents=True)
    one = write(tmp_path / "s" / "0.tar", [("0.png", encoded(0, "PNG"))])
    two = write(tmp_path / "s" / "deep" / "0.tar", [("0.png", encoded(10, "PNG"))])
    assert len(load(tmp_path / "s")) == 2
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match="another tar file follows its end: join them with tar --concatenate"):
        load(tmp_path / "joined.tar")
    (tmp_path / "s" / "1.tar.gz").write_bytes(gzip.compress(one.read_bytes()))
    with pytest.raises(UserError, match="1.tar.gz is packed: unpack it"):
        load(tmp_path / "s")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json", "array_record"])
def test_damaged_prepared_data_are_one_line_with_a_remedy(tmp_path, name):
    shard = write(tmp_path / "0.tar", [(f"{i}.{end}", body) for i in range(3) for end, body in _sample(i)])
    load(shard)
    (path,) = (tmp_path / "home" / "data").rglob(f"*{name}*")
    whole = path.read_bytes()
    flipped = [] if name == "array_record" else [bytes([whole[0] ^ 255]) + whole[1:]]  # its first byte is never read
    for spoiled in (whole[: len(whole) // 2], b"", *flipped):
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match="is damaged .*: remove that folder, and it is prepared again"):
            load(shard).records.digest()
    path.write_bytes(whole)
    load(shard).records.digest()


def _sample(number):
    return ("png", encoded(40 * number, "PNG")), ("txt", b"thing")


def test_a_damaged_list_of_what_is_left_out_is_read_as_far_as_it_goes(tmp_path):
    skipped = Skipped(tmp_path)
    skipped.add([("a.png", "is broken"), ("b.png", "is small")])
    lines = skipped.path.read_bytes()
    for damaged in (lines[:-9], b"\xff" + lines, b"[1]\n" + lines):
        skipped.path.write_bytes(damaged)
        assert skipped.read() and set(skipped.read()) <= {("a.png", "is broken"), ("b.png", "is small")}
