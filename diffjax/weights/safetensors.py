"""The safetensors format, bfloat16 and float8 included: tensors are views of the memory-mapped file.

A file is the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets) and the
tensors' bytes, C-ordered and little endian, with neither holes nor overlaps. The library `safetensors` copies what it
reads, gives numpy no float8, and writes from memory that holds all tensors at once; tests hold this module to it.
"""

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffjax.utils import files
from diffjax.utils.errors import UserError
from diffjax.weights import foreign

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
MAX_HEADER = 100_000_000


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of one file by name, as read-only views of the file.

    Raises `UserError` for anything that is not a whole, well-formed safetensors file.
    """
    data = map_bytes(Path(path))
    with _sound(path):
        header, start = _header(data)
        header.pop(METADATA, None)
        return _tensors(header, data[start:])


def metadata(path: str | Path) -> dict[str, str]:
    """The texts that one file says of itself; `UserError` as of `read`."""
    with _sound(path):
        found = _header(map_bytes(Path(path)))[0].get(METADATA, {})
        if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
            raise _Malformed("its metadata are no texts")
        return found


@contextlib.contextmanager
def _sound(path: str | Path) -> Iterator[None]:
    try:
        yield
    except _Malformed as error:
        if known := foreign.recognised(Path(path)):
            raise UserError(f"{path} {known}") from error
        raise UserError(f"{path} is not a sound safetensors file: {error}; download or write it again") from error


def map_bytes(path: Path) -> np.ndarray:
    """The file as a read-only array of bytes, mapped rather than read; `UserError` when there is no such file."""
    try:
        if path.stat().st_size == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; name an existing file") from error


class _Malformed(Exception):
    """What is wrong with a file, without its name."""


def _header(data: np.ndarray) -> tuple[dict[str, Any], int]:
    """The decoded header, and where the tensors begin."""
    if data.size < 8:
        raise _Malformed(f"{data.size} bytes hold no header")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER, data.size - 8):
        raise _Malformed(f"a header of {length} bytes does not fit in a file of {data.size}")
    try:
        header = json.loads(data[8 : 8 + length].tobytes().decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _Malformed("its header is no JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _tensors(header: dict[str, Any], data: np.ndarray) -> dict[str, np.ndarray]:
    spans = {name: _span(name, entry, data.size) for name, entry in header.items()}
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise _Malformed(f"tensor {name!a} begins at byte {begin}, not at {end}")
        end = stop
    if end != data.size:
        raise _Malformed(f"its tensors end at byte {end} of {data.size}")
    return {name: _view(name, header[name], data[begin:stop]) for name, (begin, stop) in spans.items()}


def _span(name: str, entry: Any, size: int) -> tuple[int, int]:
    """Checked data offsets of one entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"the entry of {name!a} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Malformed(f"tensor {name!a} has the unknown dtype {str(dtype)[:20]!a}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _Malformed(f"shape or data_offsets of {name!a} are not lists of whole numbers")
    begin, stop = offsets
    if not begin <= stop <= size:
        raise _Malformed(f"tensor {name!a} lies outside the file")
    if math.prod(shape) * DTYPES[dtype].itemsize != stop - begin:
        raise _Malformed(f"the shape of {name!a} needs other than its {stop - begin} bytes")
    return begin, stop


def _counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _view(name: str, entry: dict[str, Any], data: np.ndarray) -> np.ndarray:
    try:
        return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except ValueError as error:
        raise _Malformed(f"tensor {name!a}: {error}") from error


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the order of decreasing item size, then name, one in memory at a time, atomically."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        array = tensors[name]
        header[name] = {
            "dtype": NAMES[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.open_atomic(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
