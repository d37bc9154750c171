import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from diffjax import data
from diffjax.data import captioned_pictures, captions
from diffjax.utils.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    files = ["0.png", "sub/1.png", "2.png", "sub/3.jpg", "4.jpg", "sub/5.jpg"]
    for number, file in enumerate(files):
        Image.new("RGB", (24 + 8 * number, 40), (40 * number, 0, 255)).save(folder / file, quality=95)
    rows = "".join(f"{file},number {number}\n" for number, file in enumerate(files))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    return folder


def load(folder, **fields):
    return data.load({"name": "captioned_folder", "path": str(folder), "size": 16, **fields})


def test_pictures_keep_their_captions(folder):
    dataset = load(folder)
    found = dataset.examples(range(len(dataset)))
    assert found["image"].shape == (6, 16, 16, 3)
    for image, said in zip(found["image"], found["captions"], strict=True):
        number = int(said[0].removeprefix("number "))
        np.testing.assert_allclose(image.mean((0, 1)), (40 * number, 0, 255), atol=2)


def test_a_folder_is_read_again_only_when_it_changed(folder, tmp_path):
    def copies():
        return set((tmp_path / "home").rglob("*.array_record*"))

    load(folder)
    first = copies()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "scan", None)
        assert len(load(folder)) == 6
    assert copies() == first
    (folder / "0.txt").write_text("another caption")
    assert ("number 0", "another caption") in [tuple(sorted(c, reverse=True)) for c in load(folder).captions()]
    assert len(copies()) == 2 * len(first)


def test_unreadable_and_uncaptioned_pictures_are_counted_named_and_left_out(folder, caplog):
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("broken")
    whole = (folder / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "half.txt").write_text("half")
    (folder / "silent.png").write_bytes(whole)
    dataset = load(folder)
    assert len(dataset) == 6
    assert dataset.skipped.read() == [
        ("broken.png", "cannot be read: no picture in any known format"),
        ("half.png", "cannot be read: image file is truncated"),
        ("silent.png", "has no caption"),
    ]
    load(folder)
    assert caplog.text.count(f"3 pictures of captioned_folder are left out; {dataset.skipped.path}") == 2


def test_without_captions_there_is_no_text(folder):
    (folder / "metadata.csv").unlink()
    dataset = load(folder)
    assert len(dataset) == 6 and not dataset.has_captions
    with pytest.raises(UserError, match="has no captions"):
        dataset.batches(2, seed=0, tokenize=len)


def test_smaller_pictures_are_refused_all_at_once_or_enlarged(folder):
    with pytest.raises(UserError, match=r"0.png \(2 of 6 pictures like it\) is 24 x 40 pixels"):
        load(folder, size=40)
    assert load(folder, size=40, enlarge=True).examples([0])["image"].shape == (1, 40, 40, 3)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the pictures in .* can be used; .* says why"):
        load(tmp_path / "only")


def test_a_path_is_needed():
    with pytest.raises(UserError, match="data.path is empty"):
        data.load({"name": "captioned_folder"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write the data"):
        load(folder, data_dir=str(tmp_path / "closed"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("write() failed: No space left on device; writing a file")]
)
def test_a_full_disk_is_one_line(folder, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(captioned_pictures.CaptionedPictures, "download_and_prepare", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        load(folder)


def test_subfolders_are_classes(tmp_path):
    for name, shade in (("red cats", 200), ("dogs", 90)):
        (tmp_path / "pictures" / name / "more").mkdir(parents=True)
        for place in ("1.png", "more/2.png"):
            Image.new("RGB", (20, 20), (shade, 0, 0)).save(tmp_path / "pictures" / name / place)
    dataset = load(tmp_path / "pictures", name="class_folder")
    assert dataset.class_names == ("dogs", "red cats")
    found = dataset.examples(range(4))
    assert found["image"][:, 0, 0, 0].tolist() == [(90, 200)[label] for label in found["label"]]
    np.testing.assert_allclose(dataset.images([3])[0, 0, 0], found["image"][3, 0, 0] / 127.5 - 1, atol=1e-6)
    assert sorted(found["captions"]) == [("dogs",)] * 2 + [("red cats",)] * 2
    assert load(tmp_path / "pictures").num_classes == 0
    Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / "stray.png")
    with pytest.raises(UserError, match="stray.png has no class"):
        load(tmp_path / "pictures", name="class_folder")


def test_linked_folders_are_classes_and_loops_end(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "set" / "dogs").mkdir(parents=True)
    for place in ("real/1.jfif", "set/dogs/2.JPE"):
        Image.new("RGB", (20, 20), (200, 0, 0)).save(tmp_path / place, "JPEG")
    (tmp_path / "set" / "cats").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "dogs" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone").symlink_to(tmp_path / "nowhere")
    found = load(tmp_path / "set", name="class_folder")
    assert found.class_names == ("cats", "dogs") and len(found) == 2
    assert found.skipped.read() == [
        ("dogs/up", "is a link that leads back to a folder around it"),
        ("gone", "is a link that leads nowhere"),
    ]


def test_train_and_test_are_no_classes(tmp_path):
    for split in ("train", "Test"):
        (tmp_path / split / "cats").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / split / "cats" / "1.png")
    with pytest.raises(UserError, match="has the folders Test, train: set data.path to the one"):
        load(tmp_path, name="class_folder")


def test_a_folder_of_grey_pictures_has_one_channel(tmp_path, caplog):
    folder = tmp_path / "grey"
    folder.mkdir()
    for number, mode in enumerate(("L", "1", "LA", "I;16")):
        Image.new(mode, (20, 20), 0).save(folder / f"{number}.png")
    found = load(folder)
    assert found.channels == 1 and found.examples([0])["image"].shape == (1, 16, 16, 1)
    assert "all pictures of captioned_folder are grey and have one channel; data.channels=3" in caplog.text
    assert load(folder, channels=3).examples([0])["image"].shape == (1, 16, 16, 3)
    Image.new("RGB", (20, 20), (9, 9, 200)).save(folder / "colour.png")
    assert load(folder).channels == 3 and load(folder, channels=1).channels == 1
    with pytest.raises(UserError, match='data.channels="2" must be 0 or 1 or 3'):
        load(folder, channels=2)


def content(found):
    return json.loads((found.skipped.folder / "metadata.json").read_text())["content"]


def test_the_same_pictures_are_known_wherever_they_lie(folder, tmp_path):
    first = content(load(folder))
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    (tmp_path / "elsewhere" / "copy" / "notes.md").write_text("another file")
    assert content(load(tmp_path / "elsewhere" / "copy")) == first
    text = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(text.replace("number 0", "number 1", 1))
    exchanged = content(load(folder))
    (folder / "metadata.csv").write_text(text)
    Image.new("RGB", (24, 40), (1, 0, 255)).save(folder / "0.png")
    assert len({first, exchanged, content(load(folder))}) == 3


def test_several_pictures_in_one_file_are_said(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    pages = [Image.new("RGB", (20, 20), (shade, 0, 0)) for shade in (10, 90, 200)]
    pages[0].save(folder / "a.gif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "b.png")
    found = load(folder)
    assert len(found) == 2
    assert found.skipped.read() == [("a.gif after its first", "holds 3 pictures, of which the first is used")]


def test_what_was_left_out_is_remembered_beside_the_data(folder, tmp_path, monkeypatch):
    (folder / "broken.png").write_bytes(b"nothing")
    load(folder, data_dir=str(tmp_path / "shared"))
    monkeypatch.setenv("DIFFJAX_HOME", str(tmp_path / "other home"))
    found = load(folder, data_dir=str(tmp_path / "shared"))
    assert found.skipped.read() == [("broken.png", "cannot be read: no picture in any known format")]
    assert found.skipped.path.name == "left_out.jsonl" and found.skipped.path.is_relative_to(tmp_path / "shared")
