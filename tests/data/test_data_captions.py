import json

import pytest
from PIL import Image

from diffjax.data.captions import scan
from diffjax.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.JPG", "sub/c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def found(folder) -> dict[str, tuple[str, ...]]:
    return {picture.file.relative_to(folder).as_posix(): picture.captions for picture in scan(folder)}


def test_text_beside_the_picture_has_a_caption_a_line(folder):
    (folder / "a.txt").write_text("first\n\n second \n")
    (folder / "b.txt").write_text("\ufeffwith a byte order mark")
    (folder / "sub" / "c.png.txt").write_text("named after the file")
    assert found(folder) == {
        "a.png": ("first", "second"),
        "b.JPG": ("with a byte order mark",),
        "sub/c.png": ("named after the file",),
    }


@pytest.mark.parametrize("value", ["a cat", ["a cat"], {"caption": "a cat"}, {"text": ["a cat"], "width": 4}])
def test_json_beside_the_picture(folder, value):
    (folder / "a.json").write_text(json.dumps(value))
    assert found(folder)["a.png"] == ("a cat",)


TABLES = {
    "metadata.csv": 'file_name,text\na.png,"one, quoted"\nsub/c.png,two\n',
    "captions.tsv": "image\tcaption\na.png\tone, quoted\nsub/c.png\ttwo\n",
    "metadata.jsonl": '{"file_name": "a.png", "text": "one, quoted"}\n{"file_name": "sub/c.png", "caption": ["two"]}\n',
    "rows.json": '[{"path": "a.png", "prompt": "one, quoted"}, {"path": "./sub/c.png", "prompt": "two"}]',
    "captions.json": '{"a.png": "one, quoted", "sub/c.png": ["two"]}',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(folder, name):
    (folder / name).write_text(TABLES[name])
    assert found(folder) == {"a.png": ("one, quoted",), "b.JPG": (), "sub/c.png": ("two",)}


def test_a_table_in_a_subfolder_names_files_relative_to_itself(folder):
    (folder / "sub" / "metadata.csv").write_text("file_name,text\nc.png,see\n../a.png,up\n")
    assert found(folder) == {"a.png": ("up",), "b.JPG": (), "sub/c.png": ("see",)}


def test_captions_from_several_places_are_gathered_once_each(folder):
    (folder / "a.txt").write_text("one\n")
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\na.png,two\n")
    assert found(folder)["a.png"] == ("one", "two")


def test_other_files_are_left_alone(folder):
    (folder / "README.txt").write_text("about these pictures")
    (folder / "settings.json").write_text('{"version": 3}')
    (folder / ".hidden.txt").write_text("no caption")
    assert not any(found(folder).values())


BROKEN = {
    "lost.txt": ("a lost caption", r"1 caption without a picture, the first is lost\.\* \(named by lost.txt\); put"),
    "metadata.csv": ("file_name,text\nmissing.png,x\n", "the first is missing.png"),
    "m.csv": ("a,b\n1,2\n", "m.csv: line 2 has a, b and needs one each of file_name"),
    "x.jsonl": ('{"file_name": "a.png"', "cannot read the captions in .*x.jsonl"),
    "a.json": ('{"text": 3}', "'3' is neither a caption nor a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_understood_is_one_clear_line(folder, name):
    text, message = BROKEN[name]
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        scan(folder)
    assert "\n" not in str(raised.value)


def test_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no pictures"):
        scan(tmp_path)
