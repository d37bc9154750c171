"""The files of `torch.save` (.bin, .pt, .pth), read without torch and without running anything they say.

Such a file is a zip of `NAME/data.pkl`, a pickle in which tensors refer to storages, and `NAME/data/KEY`, their bytes;
before torch 1.6 it was a row of pickles with the bytes behind them. The pickle is interpreted here, opcode by opcode:
containers, strings, numbers, the storages and the few functions of `GLOBALS`; whatever else it names is refused by
that name.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from diffjax.utils.errors import UserError
from diffjax.weights import foreign
from diffjax.weights.safetensors import map_bytes

STORAGES = {
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
}
LOCAL_HEADER = struct.Struct("<4s22xHH")
PICKLE = b"\x80\x02"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read(path: str | Path) -> Any:
    """What `torch.save` was given: containers, numbers and strings, with each tensor a view of the mapped file.

    Raises `UserError` for a damaged file, and any object but those named above.
    """
    path = Path(path)
    data = map_bytes(path)
    try:
        if data[:2].tobytes() == PICKLE:
            with path.open("rb") as file:
                return _Row(file, data).value()
        with zipfile.ZipFile(path) as archive:
            storages = _Storages(archive, data)
        return _interpret(storages.record("data.pkl").tobytes(), storages)
    except _Malformed as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, OverflowError, struct.error) as error:
        if known := foreign.recognised(path, but=foreign.PICKLE):
            raise UserError(f"{path} {known}") from error
        raise UserError(f"{path} is no sound file of torch.save: {error}; download it again") from error


class _Malformed(Exception):
    """What is wrong with a file, without its name."""


class _Storages:
    """The zip's records, each as a slice of the mapped file."""

    def __init__(self, archive: zipfile.ZipFile, data: np.ndarray) -> None:
        self.data = data
        self.records = {info.filename: info for info in archive.infolist()}
        programs = [name for name in self.records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise _Malformed("it holds no data.pkl")
        self.prefix = programs[0].removesuffix("data.pkl")
        if self.prefix + "byteorder" in self.records and self.record("byteorder").tobytes() != b"little":
            raise _Malformed("its numbers are big-endian")

    def record(self, name: str) -> np.ndarray:
        """The bytes of one record."""
        info = self.records.get(self.prefix + name)
        if info is None:
            raise _Malformed(f"the record {name[:40]!a} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Malformed(f"the record {name[:40]!a} is compressed or encrypted; write it again with torch.save")
        head = self.data[max(info.header_offset, 0) :][: LOCAL_HEADER.size].tobytes()
        if len(head) < LOCAL_HEADER.size or not head.startswith(b"PK\3\4"):
            raise _Malformed(f"the record {name[:40]!a} is damaged")
        begin = info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(head)[1:])
        if begin + info.file_size > self.data.size:
            raise _Malformed(f"the record {name[:40]!a} lies outside the file")
        return self.data[begin : begin + info.file_size]

    def storage(self, reference: Any) -> np.ndarray:
        """The flat array that a persistent id ('storage', type, key, device, length) refers to."""
        match reference:
            case ("storage", _Global(module="torch", name=name), str(key), str(), int(length)) if name in STORAGES:
                data = self.record(f"data/{key}")
                if length * STORAGES[name].itemsize != data.size:
                    raise _Malformed(f"storage {key[:40]!a} holds {data.size} bytes, not {length} numbers")
                return data.view(STORAGES[name])
        raise _Malformed("it refers to a storage in a way that torch.save does not")


class _Row:
    """A file of before torch 1.6: magic number, protocol, the writer's sizes, the value, the storages' keys;
    then these.

    Each storage is its length, 8 bytes, and its numbers. Where they lie follows from the value, which is read twice.
    """

    def __init__(self, file: BinaryIO, data: np.ndarray) -> None:
        self.file, self.data = file, data
        self.kinds: dict[str, tuple[np.dtype, int]] = {}
        self.begins: dict[str, int] = {}
        if (_interpret(file, self), _interpret(file, self)) != (MAGIC, PROTOCOL):
            raise _Malformed("it does not begin as torch.save begins")
        _interpret(file, self)
        self.program = file.tell()
        _interpret(file, self)
        keys, begin = _as(list, _interpret(file, self)), file.tell()
        for key in keys:
            if _as(str, key) not in self.kinds:
                raise _Malformed(f"nothing refers to storage {key[:40]!a}")
            kind, length = self.kinds[key]
            self.begins[key] = begin + 8
            begin += 8 + length * kind.itemsize
            if begin > data.size or int.from_bytes(data[self.begins[key] - 8 :][:8].tobytes(), "little") != length:
                raise _Malformed(f"storage {key[:40]!a} does not hold {length} numbers")
        if begin != data.size:
            raise _Malformed("its storages are not all of it")

    def value(self) -> Any:
        """What the file holds."""
        self.file.seek(self.program)
        return _interpret(self.file, self)

    def storage(self, reference: Any) -> np.ndarray:
        """The flat array of a persistent id; zeros, as long as nobody knows where it lies."""
        match reference:
            case ("storage", _Global(module="torch", name=name), str(key), str(), int(length), None) if (
                name in STORAGES
            ):
                kind = STORAGES[name]
                if self.kinds.setdefault(key, (kind, length)) != (kind, length):
                    raise _Malformed(f"storage {key[:40]!a} is described in two ways")
                if key not in self.begins:
                    return np.broadcast_to(np.zeros((), kind), length)
                return self.data[self.begins[key] :][: length * kind.itemsize].view(kind)
        raise _Malformed("it refers to a storage in a way that torch.save does not")


@dataclass(frozen=True)
class _Global:
    """A name in the pickle, never looked up."""

    module: str
    name: str


def _ordered_dict(pairs: Any = ()) -> dict:
    if not isinstance(pairs, list | tuple):
        raise _Malformed("an OrderedDict is made of something else than a list")
    result: dict = {}
    _set_items(result, [item for pair in pairs for item in _pair(pair)])
    return result


def _pair(pair: Any) -> tuple:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise _Malformed("an OrderedDict is made of something else than pairs")
    return tuple(pair)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> np.ndarray:
    """A view of `storage`: element (i, j, ..) lies at `offset + i stride[0] + j stride[1] + ..`."""
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, np.ndarray) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise _Malformed("a tensor is described by something else than a storage and whole numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if len(size) != len(stride) or len(size) > 32 or math.prod(size) > storage.size:
        raise _Malformed("a tensor is larger than its storage")
    if math.prod(size) == 0:
        return np.zeros(size, storage.dtype)
    if last >= storage.size:
        raise _Malformed("a tensor lies outside its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _parameter(tensor: Any, *ignored: Any) -> Any:
    return tensor


GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): lambda size: size,
}
MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "INT", "BINFLOAT"}
TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _interpret(program: bytes | BinaryIO, storages: "_Storages | _Row") -> Any:
    """Run a pickle, of a file the one that comes next; its stack and memo hold only what this module makes."""
    machine = _Machine(storages)
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, RecursionError) as error:
        raise _Malformed(f"its pickle is damaged ({type(error).__name__})") from error
    raise _Malformed("its pickle does not end")


class _Machine:
    """The pickle machine's stack and memo."""

    def __init__(self, storages: _Storages | _Row) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """The stack's top, which must be a value."""
        value = self.stack.pop()
        if value is MARK:
            raise _Malformed("its pickle is damaged (MARK)")
        return value

    def pop_to_mark(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        for depth in range(len(self.stack) - 1, -1, -1):
            if self.stack[depth] is MARK:
                values = self.stack[depth + 1 :]
                del self.stack[depth:]
                return values
        raise _Malformed("its pickle is damaged (no MARK)")

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        stack = self.stack
        if name in VALUES or name in TEXTS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            stack.append(tuple([self.pop() for _ in range(TUPLES[name])][::-1]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.push_global(*argument.split(" ", 1))
        elif name not in ("PROTO", "FRAME"):
            operation = getattr(self, f"do_{name.lower()}", None)
            if operation is None:
                raise _Malformed(f"its pickle uses {name}, which a plain file of tensors does not")
            operation()

    def push_global(self, module: str, name: str) -> None:
        """A name, if it is one of those that a file of tensors needs."""
        if (module, name) not in GLOBALS and not (module == "torch" and name in STORAGES):
            full = f"{module}.{name}"[:80]
            raise _Malformed(f"it names {full!a}, which is not allowed; keep only tensors in the file")
        self.stack.append(_Global(module, name))

    def do_mark(self) -> None:
        self.stack.append(MARK)

    def do_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(_as(str, module), _as(str, name))

    def do_tuple(self) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def do_append(self) -> None:
        value = self.pop()
        _as(list, self.stack[-1]).append(value)

    def do_appends(self) -> None:
        values = self.pop_to_mark()
        _as(list, self.stack[-1]).extend(values)

    def do_setitem(self) -> None:
        value, key = self.pop(), self.pop()
        _set_items(_as(dict, self.stack[-1]), [key, value])

    def do_setitems(self) -> None:
        items = self.pop_to_mark()
        _set_items(_as(dict, self.stack[-1]), items)

    def do_binpersid(self) -> None:
        self.stack.append(self.storages.storage(self.pop()))

    def do_build(self) -> None:
        self.pop()
        _as(dict, self.stack[-1])

    def do_reduce(self) -> None:
        arguments, function = _as(tuple, self.pop()), _as(_Global, self.pop())
        self.stack.append(GLOBALS[function.module, function.name](*arguments))


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise _Malformed(f"its pickle treats a {type(value).__name__} as a {kind.__name__}")
    return value


def _set_items(target: dict, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values) or not all(isinstance(key, str | int) for key in keys):
        raise _Malformed("a dictionary in its pickle has keys that are neither names nor numbers")
    target.update(zip(keys, values))
