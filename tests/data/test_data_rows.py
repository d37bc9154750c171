"""What rows say, whatever wrote the table: every dialect is read, and every fault is named with its line."""

import json

import pytest

from diffjax.data.rows import read_rows
from diffjax.utils.errors import UserError

TWO = [("a.png", "one"), ("b.png", "two, too")]


def read(folder, text, kind=".csv", encoding="utf-8"):
    (folder / f"t{kind}").write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return [
        (row.picture, *row.captions) if not row.problem else f"{row.where} {row.problem}"
        for row in read_rows(folder / f"t{kind}")
    ]


DIALECTS = {
    "plain": ('file_name,text\na.png,one\nb.png,"two, too"\n', ".csv"),
    "all quoted, no end of line": ('"file_name","text"\n"a.png","one"\n"b.png","two, too"', ".csv"),
    "Windows": ('file_name,text\r\na.png,one\r\nb.png,"two, too"\r\n', ".csv"),
    "old Macintosh": ('file_name,text\ra.png,one\rb.png,"two, too"\r', ".csv"),
    "European Excel": ("file_name;text\na.png;one\nb.png;two, too\n", ".csv"),
    "spaces": ('file_name , text\n a.png , one\n b.png, "two, too"\n', ".csv"),
    "another order and case": ('n,Caption,Path\n1,one,a.png\n2,"two, too",b.png\n', ".csv"),
    "blank rows, empty ends": ('\nfile_name,text\n\na.png,one,\n,\n"b.png","two, too",,\n\n', ".csv"),
    "tabs": ("file_name\ttext\na.png\tone\nb.png\ttwo, too\n", ".tsv"),
    "tabs in a csv": ("file_name\ttext\na.png\tone\nb.png\ttwo, too\n", ".csv"),
    "quoted tabs": ('file_name\ttext\n"a.png"\t"one"\n"b.png"\t"two, too"\n', ".tsv"),
    "lines": ('{"file_name": "a.png", "text": "one"}\n\n{"TEXT": ["two, too", null], "image": " b.png"}', ".jsonl"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(tmp_path, dialect, encoding):
    assert read(tmp_path, *DIALECTS[dialect], encoding) == TWO


def test_quotes_are_what_they_are_meant_to_be(tmp_path):
    assert read(tmp_path, 'file,text\na.png,"say ""hi"""\nb.png,12" disk\nc.png,"two\nlines"\n') == [
        ("a.png", 'say "hi"'),
        ("b.png", '12" disk'),
        ("c.png", "two\nlines"),
    ]
    found = read(
        tmp_path, 'file\ttext\na.png\t"The best" of\nb.png\t12" disk\nc.png\t"say ""hi"""\nd.png\t"open\n', ".tsv"
    )
    assert found == [("a.png", '"The best" of'), ("b.png", '12" disk'), ("c.png", 'say "hi"'), ("d.png", '"open')]


REFUSED = {
    "a quote that swallows all that follows": (
        'file,text\na.png,x\nb.png,"oops\nc.png,y\n',
        "line 3 do not fit .*on line 4",
    ),
    "one that ends at the next": (
        'file,text\na.png,"oops\nb.png,"fine"\n',
        r"begin on line 2 do not fit \(.* on line 3\)",
    ),
    "one that ends at a stray one": (
        'file,text\na.png,"oops\nb.png,x\nc.png,y"\n',
        r"begin on line 2 take in another row \('b.png,x'\)",
    ),
    "text after a quote": ('file,text\na.png,x\nb.png,"big" cat\n', "begin on line 3 do not fit"),
    "a comma that cuts the caption": (
        "file,text\na.png,x\nb.png,a cat, a dog\n",
        "line 3 has 3 fields and the header has 2: put",
    ),
    "a short row": ("file,text,n\na.png,x,1\nb.png,y\n", "line 3 has 2 fields and the header has 3"),
    "the same name twice": ("file,text,Text\na.png,x,y\n", "the header names text 2 times"),
    "no header": ("a.png,one\nb.png,two\n", "line 2 has a.png, one and needs one each"),
    "another encoding": ("file,text\na.png,x\nb.png,Löwe\n".encode("latin-1"), "line 3 is not UTF-8: save it"),
    "only null": ("file,text\n,x\n", "line 2 names no picture"),
}


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_that_hides_rows_refuses_the_table_with_its_line(tmp_path, fault, kind):
    text, message = REFUSED[fault]
    if (kind == ".tsv" and "quote" in fault) or (kind == ".tsv" and "ends at" in fault):
        pytest.skip("a quote is a letter there")
    if kind == ".tsv":
        text, message = (
            (text.replace(b",", b"\t"), message) if isinstance(text, bytes) else (text.replace(",", "\t"), message)
        )
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, text, kind)
    assert f"t{kind}: " in str(raised.value) and "\n" not in str(raised.value)


def test_a_faulty_row_is_left_out_with_its_line(tmp_path):
    assert read(tmp_path, "file,text\na.png,one\n,lost\nb.png,\n") == [
        ("a.png", "one"),
        "line 3 names no picture",
        ("b.png",),
    ]
    table = [
        '{"url": "a.png", "text": "one"}',
        "null",
        '{"url": "b", ',
        '{"url": null, "text": "x"}',
        '{"url": "c", "text": 3}',
    ]
    table += [
        '{"url": "d", "text": null}',
        '{"url": "e", "text": "x", "text": "y"}',
        '{"url": ["f"], "text": "x"}',
        "[" * 5000,
    ]
    found = read(tmp_path, "\n".join(table), ".jsonl")
    assert found[0] == ("a.png", "one") and found[5] == ("d",)
    for row, fault in {
        1: "line 2 is no object with names",
        2: "line 3 cannot be read: ",
        3: "line 4 names no picture",
        4: "line 5 '3' is neither a caption nor",
        6: "line 7 cannot be read: it names text 2 times",
        7: "line 8 has url, text and needs one each of",
        8: "line 9 cannot be read: ",
    }.items():
        assert found[row].startswith(fault)


def test_a_lone_surrogate_is_no_reason_to_stop(tmp_path):
    assert read(tmp_path, json.dumps({"file": "a.png", "text": "x\ud83d"}), ".jsonl") == [("a.png", "x?")]
