"""A table of files and links, its pictures fetched from a server of this machine that misbehaves in every way."""

import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from diffjax import cli, data
from diffjax.data import download
from diffjax.utils.errors import UserError


def picture(red=255, size=(24, 32), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (red, 0, 128)).save(buffer, form)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by path, and counts how often it was asked for each."""

    def do_GET(self):
        self.server.asked.append(self.path)
        getattr(self, self.path.strip("/").partition("-")[0])()

    def say(self, body, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def good(self):
        self.say(picture(int(self.path.partition("-")[2].partition("/")[0] or 0)))

    def small(self):
        self.say(picture(size=(8, 40)))

    def page(self):
        self.say(b"<html>not for you</html>")

    def postscript(self):
        self.say(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n")

    def gone(self):
        self.say(b"", 404)

    def busy(self):
        self.say(*((b"", 503) if self.server.asked.count(self.path) < 3 else (picture(90),)))

    def cut(self):
        self.say(picture()[:60], length=len(picture()))

    def closed(self):
        self.send_response(200)  # no length: the connection's end is the picture's
        self.end_headers()
        self.wfile.write(picture(40, form="JPEG")[: -200 if self.server.asked.count(self.path) < 2 else None])

    def short(self):
        self.say(picture(), length=len(picture()) - 30)

    def empty(self):
        self.say(b"", length=0)

    def moved(self):
        self.say(b"", 302, Location="/good-30")

    def file(self):
        self.say(b"", 302, Location="file:///etc/hostname")

    def circle(self):
        self.say(b"", 302, Location="/circle")

    def huge(self):
        self.say(b"x" * 5000)

    def slow(self):
        self.send_response(200)
        self.end_headers()
        for byte in picture():
            self.wfile.write(bytes([byte]))
            time.sleep(0.01)

    def silent(self):
        time.sleep(1.5)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.handle_error = [], lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def site(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "MOST_BYTES", 4000)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    server.asked.clear()
    return f"http://127.0.0.1:{server.server_port}"


REASONS = {
    "page": "is no picture",
    "postscript": "is no picture",
    "gone": "404 Not Found",
    "cut": "IncompleteRead",
    "short": "is not all there",
    "empty": "is no picture: the file is empty",
    "file": "leads to file:///etc/hostname, which is not on the web",
    "circle": "more than 5 redirections",
    "huge": "has more than",
}


def test_every_answer_is_a_picture_or_a_reason(site):
    good = {"good-10": 10, "moved": 30, "busy": 90, "closed": 40, "good-70/with a space.png": 70}
    urls = [f"{site}/{name}" for name in (*good, *REASONS)]
    failed = download.fetch([*urls, "http://127.0.0.1:1/x", "http://[/"])
    for name, reason in REASONS.items():
        assert reason in failed.pop(f"{site}/{name}")
    assert failed.keys() == {"http://127.0.0.1:1/x", "http://[/"}
    kept = [np.asarray(Image.open(download.place(f"{site}/{name}")))[0, 0, 0] for name in good]
    np.testing.assert_allclose(kept, list(good.values()), atol=2)
    assert not any(download.place(f"{site}/{name}").exists() for name in REASONS)


def test_what_comes_too_slowly_is_given_up(site, monkeypatch):
    monkeypatch.setattr(download, "SILENCE", 0.8)
    monkeypatch.setattr(download, "WHOLE", 0.4)
    failed = download.fetch([f"{site}/slow", f"{site}/silent"])
    assert "not all there after" in failed[f"{site}/slow"] and "ReadTimeoutError" in failed[f"{site}/silent"]


def write(folder, rows, kind):
    file = folder / f"links{kind}"
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        between = "\t" if kind == ".tsv" else ","
        file.write_text("".join(between.join(line) + "\n" for line in [rows[0], *(row.values() for row in rows)]))
    return file


def settings(path, **fields):
    return {"name": "captioned_table", "path": str(path), "size": 16, **fields}


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_files_and_links_of_every_kind_of_table(site, tmp_path, kind, server):
    (tmp_path / "near.png").write_bytes(picture(200))
    named = [("near.png", "near"), (f"{site}/good-50", "far"), (f"{site}/good-50", "again"), (f"{site}/gone", "lost")]
    table = write(tmp_path, [{"URL": name, "TEXT": text} for name, text in [*named, (f"{site}/small", "tiny")]], kind)
    with pytest.raises(UserError, match=r"names 3 pictures on the web, .*: run `diffjax prepare` with the same"):
        data.load(settings(table))
    assert not server.asked
    data.fetch(settings(table))
    found = data.load(settings(table))
    shown = found.examples(range(len(found)))
    assert {captions: image[0, 0, 0] for captions, image in zip(shown["captions"], shown["image"])} == {
        ("near",): 200,
        ("far", "again"): 50,
    }
    assert [(name, why.partition(";")[0]) for name, why in found.skipped.read()] == [
        (f"{site}/gone", "cannot be fetched: 404 Not Found"),
        (f"{site}/small", "a picture is 8 x 40 pixels, smaller than data.size=16"),
    ]
    assert sorted(server.asked) == ["/gone", "/good-50", "/small"]


def test_what_was_fetched_or_failed_is_not_asked_for_again_but_on_demand(site, tmp_path, server, capsys):
    rows = [{"url": f"{site}/{name}", "text": name} for name in ("good-1", "good-2", "gone")]
    table = write(tmp_path, rows, ".jsonl")
    data.fetch(settings(table))
    said = capsys.readouterr().out
    assert "2 of 3 pictures fetched" in said and "(--retry tries them again)" in said
    server.asked.clear()
    data.fetch(settings(table))
    assert len(data.load(settings(table))) == 2 and not server.asked
    write(tmp_path, [*rows, {"url": f"{site}/good-3", "text": "new"}], ".jsonl")
    data.fetch(settings(table))
    assert sorted(server.asked) == ["/gone", "/good-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "gone", Handler.good)
        data.fetch(settings(table), retry=True)
    assert len(data.load(settings(table))) == 4


def test_what_an_earlier_version_kept_half_is_named_and_mended_on_demand(site, tmp_path, server):
    table = write(tmp_path, [{"url": f"{site}/good-{i}", "text": f"number {i}"} for i in range(3)], ".csv")
    data.fetch(settings(table))
    half = download.place(f"{site}/good-1")
    half.write_bytes(half.read_bytes()[:60])
    found = data.load(settings(table))
    assert len(found) == 2 and [name for name, _ in found.skipped.read()] == [f"{site}/good-1"]
    server.asked.clear()
    data.fetch(settings(table), retry=True)
    assert server.asked == ["/good-1"] and len(data.load(settings(table))) == 3


def test_pictures_that_a_parquet_file_holds(site, tmp_path):
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"image": image, "text": pyarrow.string(), "label": pyarrow.int64()})
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    schema = schema.with_metadata({"huggingface": json.dumps(names)})
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("a card")
    for part in range(2):
        rows = [
            {
                "image": {"bytes": picture(20 * (4 * part + i)), "path": None},
                "text": f"number {4 * part + i}",
                "label": i % 2,
            }
            for i in range(4)
        ]
        file = tmp_path / "set" / "data" / f"train-{part:05}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file, row_group_size=3)
    found = data.load(settings(tmp_path / "set"))
    shown = found.examples(range(8))
    reds = {
        captions: (int(image[0, 0, 0]), label)
        for captions, image, label in zip(shown["captions"], shown["image"], shown["label"])
    }
    assert reds == {(f"number {i}",): (20 * i, i % 2) for i in range(8)} and found.class_names == ("cat", "dog")
    assert len(data.load(settings(tmp_path / "set" / "data" / "train-00001*"))) == 4
    only = pyarrow.Table.from_pylist([{"image": picture(80)}], schema=pyarrow.schema({"image": pyarrow.binary()}))
    pyarrow.parquet.write_table(only, tmp_path / "only.parquet")
    assert not data.load(settings(tmp_path / "only.parquet")).has_captions
    with pytest.raises(UserError, match="holds pictures itself: set data.name to captioned_table"):
        (tmp_path / "set" / "a.png").write_bytes(picture())
        data.load(settings(tmp_path / "set", name="captioned_folder"))


def test_files_are_found_as_people_write_them(site, tmp_path):
    (tmp_path / "Sub").mkdir()
    for number, name in enumerate(["caf\u00e9.png", "e\u0301.png", "Sub/B.PNG", "Sub/c.jfif"]):
        (tmp_path / name).write_bytes(picture(20 * number))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    names = ["cafe\u0301.png", "\u00e9.png", "sub\\b.png", str(tmp_path / "Sub" / "c.jfif"), "gone.png", "missing.png"]
    table = write(
        tmp_path, [{"file name": "x", " image ": name, " text": f"number {i}"} for i, name in enumerate(names)], ".csv"
    )
    found = data.load(settings(table))
    shown = found.examples(range(len(found)))
    assert {captions: image[0, 0, 0] for captions, image in zip(shown["captions"], shown["image"])} == {
        (f"number {i}",): 20 * i for i in range(4)
    }
    assert found.skipped.read() == [("gone.png", "is a link that leads nowhere"), ("missing.png", "is not there")]


def test_a_picture_is_one_by_whichever_path(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(picture(40))
    (tmp_path / "sub").mkdir()
    write(
        tmp_path,
        [{"file": name, "text": name[-9:]} for name in ("a.png", "./a.png", f"{tmp_path}/a.png", "sub/../a.png")],
        ".csv",
    )
    for path in ("links.csv", "./sub/../links.csv", str(tmp_path / "links.csv")):
        assert len(data.load(settings(path))) == 1
    for name in (b"\xff\xe9", "🐶".encode(), b"[a] *%s"):
        folder = tmp_path / os.fsdecode(name)
        folder.mkdir()
        (folder / "a.png").write_bytes(picture(40))
        assert len(data.load(settings(write(folder, [{"file": "a.png", "text": "x"}], ".csv")))) == 1


def test_interrupted_it_goes_on(site, tmp_path, server, monkeypatch):
    table = write(tmp_path, [{"url": f"{site}/good-{i}", "text": "x"} for i in range(4)], ".jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(download, "THREADS", 1)
        patch.setattr(download, "track", lambda items, *_: (_ for _ in [next(iter(items)), interrupt()]))
        with pytest.raises(KeyboardInterrupt):
            data.fetch(settings(table))
    assert len(server.asked) < 4
    data.fetch(settings(table))
    assert len(data.load(settings(table))) == 4
    assert server.asked.count("/good-0") == 1 and set(server.asked) == {f"/good-{i}" for i in range(4)}


def interrupt():
    raise KeyboardInterrupt


def test_the_command(site, tmp_path, capsys):
    table = write(tmp_path, [{"url": f"{site}/good-{i}", "text": f"number {i}"} for i in range(3)], ".csv")
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    return ConfigDict({{'data': {settings(table)!r}, 'text': None}})\n"
    )
    assert cli.main(["prepare", "--config", str(tmp_path / "config.py")]) == 0
    assert capsys.readouterr().out == "3 of 3 pictures fetched\nready: 3 pictures of 16 pixels\n"
    (tmp_path / "config.py").write_text("import ml_collections\nget_config = ml_collections.ConfigDict\n")
    assert cli.main(["prepare", "--config", str(tmp_path / "config.py")]) == 2
    assert "there is nothing to prepare" in capsys.readouterr().err


WRONG = {
    "missing.csv": ("file,text\nnowhere.png,x\n", r"1 caption without a picture, the first is .*nowhere.png"),
    "number.jsonl": ('{"url": 3, "text": "x"}\n', "line 1 has url, text and needs .* the first a path or URL"),
    "list.jsonl": ("[1]\n", "line 1 is no object with names"),
    "not.parquet": ("nothing", "cannot read the captions in .*not.parquet"),
    "pictures.zip": ("", "is no .csv, .jsonl, .parquet, .tsv file, folder of them or pattern"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_one_clear_line(site, tmp_path, name):
    text, message = WRONG[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        data.load(settings(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_many_tables_are_one(site, tmp_path):
    (tmp_path / "parts").mkdir()
    for number in range(3):
        (tmp_path / "parts" / f"{number}.png").write_bytes(picture(number))
        (tmp_path / "parts" / f"part-{number}.csv").write_text(f"path,caption\n{number}.png,x\n")
    assert len(data.load(settings(tmp_path / "parts"))) == 3
    assert len(data.load(settings(tmp_path / "parts" / "part-[12]*"))) == 2


def test_the_wrong_name_is_said(site, tmp_path):
    (tmp_path / "t.csv").write_text("path,caption\n")
    with pytest.raises(UserError, match="is a file: set data.name to captioned_table"):
        data.load({"name": "captioned_folder", "path": str(tmp_path / "t.csv")})
