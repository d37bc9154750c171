"""The rows of tables: which picture, and which captions.

A table has one of `FILE_KEYS` and one of `CAPTION_KEYS` in its header, in any case. A faulty row is left out by its
file and line; a fault that hides what other rows say (quotes that swallow rows, captions that are cut at a comma)
refuses the table.

    .csv      commas, semicolons or tabs, whichever the header has; quotes as RFC 4180 has them
    .tsv      the same where all its quotes fit; else a quote is a letter like any other
    .jsonl    an object on each line
    .parquet  paths, URLs, or the pictures themselves as Hugging Face stores them (`image`: `bytes` and `path`)

Text is UTF-8, or begins with the mark of UTF-16 or UTF-32.
"""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.data.images import SUFFIXES
from diffjax.utils.errors import UserError

FILE_KEYS = ("file_name", "filename", "file", "image", "image_path", "path", "url", "image_url")
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "description")
LABEL_KEYS = ("label", "labels")
TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Inside(NamedTuple):
    """A picture that a table holds itself: a row of a column of a Parquet file's row group; `label` is its class."""

    column: str
    group: int
    row: int
    label: str


class Row(NamedTuple):
    """What a row says: where it is ("line 7"), its picture (a path, a URL, or in the table) and the captions.

    A `problem` says why it cannot be used.
    """

    where: str
    picture: str | Inside
    captions: list[str]
    problem: str = ""


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a table. Raises `UserError` with the line where it is damaged, or no row can be used."""
    kind = file.suffix.lower()
    read = {".jsonl": _objects, ".parquet": _parquet}.get(kind, _separated)
    try:
        yield from named(read(file), "row" if kind == ".parquet" else "line")
    except (ValueError, csv.Error, OSError) as error:
        raise unreadable(file, error) from error


def named(table: Iterable[tuple[int, Any]], unit: str = "row") -> Iterator[Row]:
    """Rows of numbered objects. Raises `ValueError`, the first row's problem, when all have one."""
    first, fits = None, False
    for number, value in table:
        row = _row(f"{unit} {number}", value)
        fits, first = fits or not row.problem, first or row
        yield row
    if first and not fits:
        raise ValueError(f"{first.where} {first.problem}")


def _row(where: str, value: Any) -> Row:
    if isinstance(value, ValueError):
        return Row(where, "", [], f"cannot be read: {value}")
    if not isinstance(value, dict):
        return Row(where, "", [], "is no object with names")
    row = {_key(name): field for name, field in value.items()}
    picture = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), Inside)), None)
    picture = picture or next((row[key] for key in FILE_KEYS if row.get(key)), "")
    told = any(key in row for key in CAPTION_KEYS) or isinstance(picture, Inside)
    if not isinstance(picture, str | Inside) or not told or not any(key in row for key in FILE_KEYS):
        keys = f"{'/'.join(FILE_KEYS)} and {'/'.join(CAPTION_KEYS)}"
        return Row(where, "", [], f"has {', '.join(row)} and needs one each of {keys}, the first a path or URL")
    picture = picture.strip() if isinstance(picture, str) else picture
    try:
        return Row(where, picture, captions_in(row), "" if picture else "names no picture")
    except ValueError as error:
        return Row(where, picture, [], str(error))


def _key(name: Any) -> str:
    return str(name).strip().lower()


def unreadable(file: Path, error: Exception) -> UserError:
    """The error for a file of captions that cannot be read."""
    return UserError(f"cannot read the captions in {file}: {error}; mend the file or remove it")


def text_in(data: bytes) -> str:
    """A text file's content. Raises `ValueError` when it is not UTF-8 and bears no mark of another."""
    try:
        return data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8: save it in that encoding") from error


def _encoding(data: bytes) -> str:
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8-sig")


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file with their ends, one after the other. Raises `ValueError` as `text_in` does."""
    with file.open("rb") as opened:
        encoding = _encoding(opened.read(4))
    with file.open(
        encoding=encoding, newline="", errors="surrogateescape" if encoding == "utf-8-sig" else "strict"
    ) as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"line {number} is not UTF-8: save it in that encoding") from error
            yield line


def _separated(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields by name) of a .csv or .tsv table."""
    head = next(filter(str.strip, _lines(file)), "")
    between = max("\t,;" if file.suffix.lower() == ".tsv" else ",;\t", key=head.count)
    quoted = between != "\t" or _fits(file, between)
    yield from _fitting(_records(file, between, quoted), between)


def _fits(file: Path, between: str) -> bool:
    """Whether a table is one when quotes are read as such."""
    try:
        for _ in _fitting(_records(file, between, True), between):
            pass
    except ValueError:
        return False
    return True


def _records(file: Path, between: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of everything that is not blank. Raises `ValueError` for quotes that do not fit."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(_lines(file), delimiter=between, quoting=quoting, skipinitialspace=True, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            remedy = "put captions with quotes into quotes, and write those inside twice"
            raise ValueError(
                f"the quotes that begin on line {line} do not fit ({error} on line {reader.line_num}): {remedy}"
            ) from error
        if fields is None:
            return
        if any(map(str.strip, fields)):
            yield line, fields if quoted else [_bare(field) for field in fields]


def _bare(field: str) -> str:
    """A field without quotes around it, if those are all there."""
    inside = field[1:-1]
    whole = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if whole else field


def _fitting(records: Iterator[tuple[int, list[str]]], between: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields by name), the names being those of the first record.

    Raises `ValueError` for a record of another length, and one whose quotes have swallowed others.
    """
    header = [_key(name) for name in next(records, (0, []))[1]]
    for name in FILE_KEYS + CAPTION_KEYS:
        if header.count(name) > 1:
            raise ValueError(f"the header names {name} {header.count(name)} times: rename the others")
    for line, fields in records:
        if len(fields) < len(header) or any(map(str.strip, fields[len(header) :])):
            remedy = "put captions with separators into double quotes"
            raise ValueError(f"line {line} has {len(fields)} fields and the header has {len(header)}: {remedy}")
        for inner in (inner for field in fields for inner in field.splitlines()[1:]):
            parts = dict(zip(header, inner.split(between)))
            if len(parts) == len(header) and any(_is_picture(parts[name]) for name in FILE_KEYS if name in parts):
                raise ValueError(
                    f"the quotes that begin on line {line} take in another row ({inner[:40]!r}): close them"
                )
        yield line, dict(zip(header, fields))


def _is_picture(field: str) -> bool:
    name = field.strip(' "').lower()
    return Path(name).suffix in SUFFIXES or name.startswith(("http://", "https://"))


def _objects(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON lines; the value of a line that is none is its error."""
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                yield number, json_in(line)
            except ValueError as error:
                yield number, error


def json_in(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError` when it is none, or names a field twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := next((name for name in FILE_KEYS + CAPTION_KEYS if names.count(name) > 1), None):
        raise ValueError(f"it names {twice} {names.count(twice)} times")
    return dict(pairs)


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, fields by name); of pictures that the table holds itself, where."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        held = [
            field.name for field in table.schema_arrow if _key(field.name) in FILE_KEYS and _holds_bytes(field.type)
        ]
        known = FILE_KEYS + CAPTION_KEYS + (LABEL_KEYS if held else ())
        columns = [name for name in table.schema_arrow.names if _key(name) in known and name not in held]
        classes, number = _classes(table.schema_arrow), 0
        for group in range(table.num_row_groups):
            told = table.read_row_group(group, columns=columns).to_pylist() if columns else []
            for row in range(table.metadata.row_group(group).num_rows):
                number += 1
                fields = told[row] if columns else {}
                label = next((fields[name] for name in columns if _key(name) in LABEL_KEYS), None)
                label = classes[label] if classes and isinstance(label, int) and 0 <= label < len(classes) else label
                yield (
                    number,
                    fields | {name: Inside(name, group, row, "" if label is None else str(label)) for name in held},
                )
    except pyarrow.ArrowException as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
    )


def _classes(schema: Any) -> list[str]:
    """The names of the classes, as Hugging Face keeps them in a table's metadata; none where it does not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return next((list(features[key]["names"]) for key in LABEL_KEYS if "names" in features.get(key, {})), [])
    except (KeyError, TypeError, ValueError):
        return []


def captions_in(value: Any) -> list[str]:
    """The captions in a string, a list of strings, or an object that has them under one of `CAPTION_KEYS`; null
    is none.
    """
    if isinstance(value, dict):
        value = next((value[key] for key in CAPTION_KEYS if value.get(key)), [])
    captions = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(captions, list) or not all(isinstance(caption, str | None) for caption in captions):
        raise ValueError(f"{str(value)[:60]!r} is neither a caption nor a list of captions")
    texts = (caption.encode("utf-8", "replace").decode().strip() for caption in captions if caption)
    return [text for text in texts if text]
