"""Files as torch.save writes them, made without torch."""

import io
import pickle
import struct
import zipfile

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "bfloat16": "BFloat16Storage"}


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Storage:
    def __init__(self, key, array, *view):
        self.id = ("storage", Global("torch", STORAGES[array.dtype.name]), key, "cpu", array.size, *view)


class Pickler(pickle._Pickler):
    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(b"R")
        elif isinstance(value, Storage):
            self.save(value.id)
            self.write(b"Q")
        else:
            super().save(value, save_persistent_id)


def dumps(value):
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def tensor(key, array, size=None, stride=None, offset=0, view=()):
    """The call that rebuilds a tensor from the storage `key`."""
    size = array.shape if size is None else size
    stride = tuple(step // array.itemsize for step in array.strides) if stride is None else stride
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"), Storage(key, array, *view), offset, size, stride, False, hooks
    )


def write(path, value, storages, compression=zipfile.ZIP_STORED):
    """A zip with the pickle of `value` (or these bytes) and each storage at a multiple of 64 bytes."""
    program = value if isinstance(value, bytes) else dumps(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [("data.pkl", program), ("byteorder", b"little"), ("version", b"3\n")]:
            archive.writestr(f"archive/{name}", data)
        for key, array in storages.items():
            info = zipfile.ZipInfo(f"archive/data/{key}")
            info.compress_type = compression
            room = -(archive.fp.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = struct.pack("<HH", 0x4246, room) + b"Z" * room
            archive.writestr(info, np.ascontiguousarray(array).tobytes())


def write_state(path, tensors, **options):
    """`torch.save(state_dict)`."""
    storages = {str(i): np.ascontiguousarray(array) for i, array in enumerate(tensors.values())}
    value = {name: tensor(key, array) for name, (key, array) in zip(tensors, storages.items())}
    write(path, value, storages, **options)


def write_old_state(path, tensors):
    """`torch.save(state_dict)` of torch before 1.6."""
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    value = {name: tensor(name, array, view=(None,)) for name, array in tensors.items()}
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [dumps(part) for part in (0x1950A86A20F9469CFC6C, 1001, sizes, value, list(tensors)[::-1])]
    for array in list(tensors.values())[::-1]:
        parts.append(struct.pack("<q", array.size) + array.tobytes())
    path.write_bytes(b"".join(parts))
