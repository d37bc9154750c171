"""Random folders, tables and tars with what people's files are like: every picture is used with its caption, or named.

A picture's colour is its number, by which it is found again; its caption says that number too.
"""

import csv
import io
import json
import os
import tarfile
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffjax import data
from diffjax.utils.errors import UserError

SIZE = 8
WORDS = [
    "cat",
    "Löwe",
    "naïve dog",
    "猫",
    "кот",
    "a.b",
    "v1.0.2",
    "with space",
    "UPPER",
    "🐶",
    "e\u0301te\u0301",
    "semi;colon",
    "x,y",
    "o'clock",
]
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".Jpg": "JPEG",
    ".JPG": "JPEG",
    ".PNG": "PNG",
} | {
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".ppm": "PPM",
    ".jp2": "JPEG2000",
}
BROKEN = ("half", "empty", "heic", "text")


def colour(number: int) -> tuple[int, int, int]:
    return 16 * (number % 16) + 8, 16 * (number // 16) + 8, 128


def number_of(pixel: np.ndarray) -> int:
    return int(pixel[0]) // 16 + 16 * (int(pixel[1]) // 16)


def encoded(number: int, suffix: str, fault: str = "") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 16), colour(number)).save(
        buffer, FORMATS[suffix], **({"quality": 95} if FORMATS[suffix] == "JPEG" else {})
    )
    whole = buffer.getvalue()
    return {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "heic": b"\0\0\0\x18ftypheic" + whole,
        "text": b"<html>",
    }.get(fault, whole)


@dataclass
class Case:
    """A data set in the making: where it is, and under which of some names each of its pictures must be found
    or named.
    """

    rng: np.random.Generator
    folder: Path
    pictures: dict[int, set[str]] = field(default_factory=dict)
    faults: Counter = field(default_factory=Counter)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def fault(self, probability: float, *kinds: str) -> str:
        """One of the kinds with that probability, counted."""
        if not self.chance(probability):
            return ""
        kind = self.pick(kinds)
        self.faults[kind] += 1
        return kind

    def number(self) -> int:
        return len(self.pictures)

    def name(self) -> str:
        """A picture's name without its ending; sometimes in the form of Unicode that macOS writes."""
        name = f"{self.pick(WORDS)}{'-_ .'[self.rng.integers(4)]}{len(self.pictures)}"
        return unicodedata.normalize(self.pick(["NFC", "NFD"]), name)

    def spelled(self, name: str) -> str:
        """The same name as another system would write it in a table."""
        kind = self.fault(0.3, "NFC", "NFD", "lower case")
        return name.lower() if kind == "lower case" else unicodedata.normalize(kind or "NFC", name) if kind else name


def printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def files(case: Case, count: int, parents: list[Path], beside: bool, odd: bool = True) -> list[tuple[int, Path]]:
    """Picture files in some folders with their texts beside them, if asked; broken ones and oddly placed ones too."""
    made = []
    for _ in range(count):
        number, suffix, parent = case.number(), case.pick(list(FORMATS)), case.pick(parents)
        stem = case.name()
        kinds = ("hidden", "no ending", "not UTF-8", "broken link", "link", "same stem", "apples", "archive", "pipe")
        fault = case.fault(0.25, *kinds) if odd else ""
        stem = f".{stem}" if fault == "hidden" else stem
        if fault == "not UTF-8":
            stem = os.fsdecode(stem.encode() + b"\xff\xe9")
        path = parent / (stem + ("" if fault == "no ending" else suffix))
        broken = case.fault(0.1, *BROKEN)
        body = encoded(number, suffix, broken)
        if fault == "no ending" and broken:
            continue  # nobody can tell what that was
        if fault == "broken link":
            path.symlink_to(parent / "nowhere.png")
        elif fault == "pipe":
            os.mkfifo(path)
        elif fault == "archive":
            path = path.with_name(f"{stem}.zip")
            with zipfile.ZipFile(path, "w") as packed:
                packed.writestr("a.png", body)
        elif fault == "link":
            outside = case.folder.parent / f"outside{number}"
            outside.write_bytes(body)
            path.symlink_to(outside)
        else:
            path.write_bytes(body)
        case.pictures[number] = {printable(os.path.relpath(path, case.folder))}
        if fault == "apples":
            path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7" + bytes(80))
        texted = fault not in ("hidden", "archive")
        if beside and texted:
            spelled = stem if fault == "not UTF-8" else case.spelled(stem)
            text = parent / f"{path.name if case.chance(0.2) else spelled}.txt"
            text.write_text(f"number {number}", encoding=case.pick(["utf-8", "utf-8-sig", "utf-16"]))
        if texted:
            made.append((number, path))
    return made


def folders(case: Case, classes: bool) -> list[Path]:
    """Folders of the data set, some of them links to elsewhere; and links that lead nowhere good."""
    found = [] if classes else [case.folder]
    for index in range(int(case.rng.integers(1, 4))):
        path = case.folder / f"{case.pick(WORDS)}{index}"
        if case.fault(0.3, "linked folder"):
            real = case.folder.parent / f"real{index}"
            real.mkdir()
            path.symlink_to(real)
        else:
            path.mkdir()
        found.append(path)
        if case.fault(0.2, "loop"):
            (path / "again").symlink_to(case.folder)
    return found


def a_folder(case: Case) -> dict:
    made = files(case, int(case.rng.integers(3, 9)), folders(case, False), beside=True)
    if case.chance(0.5):
        (case.folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (case.folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    return {"name": "captioned_folder", "path": str(case.folder)} if made else {}


def a_class_folder(case: Case) -> dict:
    files(case, int(case.rng.integers(3, 9)), folders(case, True), beside=False)
    return {"name": "class_folder", "path": str(case.folder)}


def metadata(case: Case) -> dict:
    """A folder with a table for all its pictures, whose paths may be absolute."""
    made = files(case, int(case.rng.integers(3, 9)), folders(case, False), beside=False)
    rows = [
        (name_in(case, path), f"number {number}")
        for number, path in made
        if path.name.isprintable() and b"\xff" not in os.fsencode(path)
    ]
    kind = case.pick([".csv", ".jsonl", ".tsv"])
    write_rows(case, case.folder / f"metadata{kind}", rows)
    return {"name": "captioned_folder", "path": str(case.folder)}


def name_in(case: Case, path: Path) -> str:
    """What a table calls a picture."""
    if case.fault(0.2, "absolute path"):
        return str(path)
    name = case.spelled(os.path.relpath(path, case.folder))
    if case.fault(0.1, "backslashes"):
        name = name.replace("/", "\\")
    return f" {name} " if case.fault(0.1, "spaces around") else name


def a_table(case: Case) -> dict:
    """A table of files, and whatever can be wrong with its rows."""
    made = files(case, int(case.rng.integers(4, 9)), folders(case, False), beside=False, odd=False)
    rows = [(name_in(case, path), f"number {number}") for number, path in made]
    path = case.folder / f"links{case.pick(['.csv', '.tsv', '.jsonl', '.parquet'])}"
    write_rows(case, path, rows)
    where = {".parquet": "row {0}", ".jsonl": "line {0}"}.get(path.suffix, "line {1}")
    for number, names in case.pictures.items():
        case.pictures[number] = names | {f"{path.name} {where.format(number + 1, number + 2)}"}
    return {"name": "captioned_table", "path": str(path)}


def write_rows(case: Case, path: Path, rows: list[tuple[str, str]]) -> None:
    keys = case.pick([("file_name", "text"), ("image", "caption"), ("Path", "Prompt"), (" file ", " text")])
    if path.suffix == ".parquet":
        table = [dict(zip(map(str.strip, keys), row)) for row in rows]
        if case.fault(0.3, "null caption"):
            table[0][keys[1].strip()] = None
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=int(case.rng.integers(1, 9)))
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(keys, row)), ensure_ascii=case.chance(0.5)) for row in rows]
        if kind := case.fault(0.4, "null row", "cut line", "number for caption"):
            lines[-1] = {"null row": "null", "cut line": lines[-1][:-3]}.get(
                kind, json.dumps({keys[0]: rows[-1][0], keys[1]: 3})
            )
        path.write_text("\n".join(lines) + "\n" * case.chance(0.8), encoding=case.pick(["utf-8", "utf-8-sig"]))
    else:
        write_separated(case, path, keys, rows)


def write_separated(case: Case, path: Path, keys: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    between = "\t" if path.suffix == ".tsv" else case.pick([",", ",", ";"])
    buffer = io.StringIO()
    writer = csv.writer(
        buffer,
        delimiter=between,
        lineterminator=case.pick(["\n", "\r\n"]),
        quoting=case.pick([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    )
    writer.writerows([keys, *rows])
    text = buffer.getvalue()
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(end)
    at = int(case.rng.integers(1, len(rows) + 1))
    kind = case.fault(
        0.5, "stray quote", "open quote", "comma", "short row", "blank rows", "null name", "no end", "utf-16"
    )
    if kind == "stray quote":
        lines[at] = lines[at].replace("number", case.pick(['the "number"', '"the" number']))
    elif kind == "open quote":
        lines[at] = lines[at].replace("number", '"number', 1)
    elif kind == "comma":
        lines[at] += f"{between} and more"
    elif kind == "short row":
        lines[at] = lines[at].partition(between)[0]
    elif kind == "blank rows":
        lines = [part for line in lines for part in (line, "", between)]
    elif kind == "null name":
        lines[at] = lines[at][lines[at].index(between) :] if lines[at].count(between) == 1 else lines[at]
    path.write_bytes(
        (end.join(lines).rstrip() if kind == "no end" else end.join(lines)).encode(
            "utf-16" if kind == "utf-16" else "utf-8"
        )
    )


REFUSING = {"stray quote", "open quote", "comma", "short row"}
"""Faults of a table that hide what other rows say: it may be refused whole."""


def hugging_face(case: Case) -> dict:
    """Parquet files that hold their pictures."""
    (case.folder / "data").mkdir()
    parts = int(case.rng.integers(1, 4))
    for part in range(parts):
        rows, name = [], f"train-{part:05}-of-{parts:05}.parquet"
        for row in range(int(case.rng.integers(1, 6))):
            number, suffix = case.number(), case.pick(list(FORMATS))
            kind = case.fault(0.2, *BROKEN, "null picture", "null caption", "path only")
            value = {"bytes": encoded(number, suffix, kind), "path": case.pick([f"{number}{suffix}", None])}
            if kind == "path only":
                (case.folder / "data" / f"{number}{suffix}").write_bytes(value["bytes"])
                value = {"bytes": None, "path": f"{number}{suffix}"}
            rows.append(
                {
                    "image": None if kind == "null picture" else value,
                    "text": None if kind == "null caption" else f"number {number}",
                }
            )
            case.pictures[number] = {f"{case.folder.name}/data/{name} row {row + 1}"}
        schema = pyarrow.schema(
            {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "text": pyarrow.string()}
        )
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, case.folder / "data" / name, row_group_size=int(case.rng.integers(1, 4)))
    return {"name": "captioned_table", "path": str(case.folder)}


def a_tar(case: Case) -> dict:
    """Tar files with dots in keys, the same key again, links, and members in any order."""
    for shard in range(int(case.rng.integers(1, 3))):
        members = []
        for _ in range(int(case.rng.integers(2, 7))):
            number, suffix = case.number(), case.pick(list(FORMATS))
            stem = f"{case.pick(['', 'a/', 'v1.2/b.c/', './'])}{case.name()}"
            kind = case.fault(
                0.4,
                *BROKEN,
                "hidden",
                "no ending",
                "hard link",
                "link outside",
                "same key",
                "apples",
                "NFD text",
                "no text",
            )
            name = stem + ("" if kind == "no ending" else suffix)
            if kind == "hidden":
                name = os.path.join(os.path.dirname(name), "." + os.path.basename(name))
            texts = [(unicodedata.normalize("NFD", stem) if kind == "NFD text" else stem) + ".txt"] * (
                kind != "no text"
            )
            pair = [(name, encoded(number, suffix, kind)), *((text, f"number {number}".encode()) for text in texts)]
            if kind == "link outside":
                pair[0] = (name, "/etc/hostname")
            if kind == "hard link":
                pair[0] = (name, f"{stem}.original.{'png'}")
                members.append((f"{stem}.original.png", encoded(number, ".png")))
            if kind == "apples":
                members.append(
                    (os.path.join(os.path.dirname(stem), f"._{os.path.basename(stem)}{suffix}"), b"\0\5\x16\7")
                )
            case.pictures[number] = {f"{case.folder.name}/{shard}.tar/{name}", f"{shard}.tar/{name}"}
            members += pair
            if kind == "same key":
                again = case.number()
                members += [(name, encoded(again, suffix)), (texts[0], f"number {again}".encode())]
                case.pictures[again] = {f"{shard}.tar/{name}#2"}
        write_tar(case.folder / f"{shard}.tar", members)
    return {"name": "webdataset", "path": str(case.folder)}


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            if isinstance(body, str):
                info.type, info.linkname, body = tarfile.LNKTYPE, body, b""
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


KINDS = (a_folder, a_class_folder, metadata, a_table, hugging_face, a_tar)


def check(seed: int, root: Path, counts: Counter) -> None:
    """One data set: its pictures are counted as used, named, or refused with it."""
    rng = np.random.default_rng(seed)
    folder = root / f"{seed}" / "set"
    folder.mkdir(parents=True)
    case = Case(rng, folder)
    make = KINDS[seed % len(KINDS)]
    settings = make(case)
    if not settings or not case.pictures:
        return
    counts["sets"] += 1
    counts["pictures"] += len(case.pictures)
    counts["oddities"] += case.faults.total()
    settings |= {"size": SIZE, "data_dir": str(root / f"{seed}" / "prepared")}
    try:
        found = data.load(settings)
    except UserError as error:
        assert "\n" not in str(error)
        unusable = any(text in str(error) for text in ("can be used", "has no pictures"))
        assert REFUSING & case.faults.keys() or unusable, (seed, make.__name__, dict(case.faults), str(error))
        counts["refused"] += len(case.pictures)
        return
    shown = found.examples(range(len(found)))
    used = Counter(number_of(image[2, 2]) for image in shown["image"])
    left_out = {name for name, _ in found.skipped.read()}
    for image, captions in zip(shown["image"], shown["captions"]):
        if make is not a_class_folder and captions:
            (caption,) = captions  # in a .tsv a stray quote is a letter
            assert caption.replace('"', "") in (said := f"number {number_of(image[2, 2])}", f"the {said}"), (
                seed,
                make.__name__,
                dict(case.faults),
            )
    for number, names in case.pictures.items():
        named = names & left_out
        counts["used" if used[number] else "named" if named else "silent"] += 1
        assert used[number] or named, (seed, make.__name__, dict(case.faults), number, names, left_out)


def run(seeds, root, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DIFFJAX_HOME", str(root / "home"))
    counts = Counter()
    for seed in seeds:
        check(seed, root, counts)
    with capsys.disabled():
        told = {name: counts[name] for name in ("sets", "oddities", "pictures", "used", "named", "refused", "silent")}
        print(f"\n{told}")


def test_every_picture_is_used_or_named(tmp_path, monkeypatch, capsys):
    run(range(30), tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_every_picture_of_300_data_sets_is_used_or_named(tmp_path, monkeypatch, capsys):
    run(range(1000, 1300), tmp_path, monkeypatch, capsys)
