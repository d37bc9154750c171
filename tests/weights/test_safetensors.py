import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors as library
from safetensors.numpy import save_file

from diffjax.utils.errors import UserError
from diffjax.weights import safetensors

TENSORS = {
    "half": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "quarter": np.arange(3, dtype=ml_dtypes.float8_e4m3fn),
    "single": np.arange(4, dtype=np.float32).reshape(2, 2).T,
    "number": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float16),
    "flags": np.array([True, False, True]),
}


def encode(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.write(path, TENSORS, {"format": "pt"})
    found = safetensors.read(path)
    assert set(found) == set(TENSORS)
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    assert not found["single"].flags.owndata


def test_the_library_reads_what_is_written(tmp_path):
    safetensors.write(tmp_path / "model.safetensors", TENSORS, {"format": "pt"})
    found = dict(library.deserialize((tmp_path / "model.safetensors").read_bytes()))
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name]["shape"] == list(array.shape) and found[name]["dtype"] == safetensors.NAMES[array.dtype]
        assert found[name]["data"] == array.tobytes()


def test_what_the_library_writes_is_read_and_written_byte_for_byte(tmp_path):
    known = {name: np.ascontiguousarray(array) for name, array in TENSORS.items() if name != "quarter"}
    save_file(known, tmp_path / "theirs.safetensors", {"format": "pt"})
    found = safetensors.read(tmp_path / "theirs.safetensors")
    safetensors.write(tmp_path / "ours.safetensors", found, safetensors.metadata(tmp_path / "theirs.safetensors"))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    for name, array in known.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no header"),
        (b"1234567", "no header"),
        (encode({}, length=2**63), "does not fit"),
        (encode({"a": entry()}, b"1234", length=1000), "does not fit"),
        (encode(b"{"), "no JSON"),
        (encode(b"\xff\xfe"), "no JSON"),
        (encode(b"[" * 100_000), "no JSON"),
        (encode(b"[]"), "no JSON object"),
        (encode(b'{"a": {}, "a": {}}'), "twice"),
        (encode({"a": [1]}), "not dtype, shape"),
        (encode({"a": entry(more=1)}, b"1234"), "not dtype, shape"),
        (encode({"a": entry("F31")}, b"1234"), "unknown dtype 'F31'"),
        (encode({"a": entry(["F32"])}, b"1234"), "unknown dtype"),
        (encode({"a": entry(shape=[-1])}, b"1234"), "whole numbers"),
        (encode({"a": entry(shape=[True])}, b"1234"), "whole numbers"),
        (encode({"a": entry(shape=[1.0])}, b"1234"), "whole numbers"),
        (encode({"a": entry(shape=[2**70])}, b"1234"), "whole numbers"),
        (encode({"a": entry(offsets=[0])}, b"1234"), "whole numbers"),
        (encode({"a": entry(shape=[2])}, b"1234"), "other than its 4 bytes"),
        (encode({"a": entry(shape=[0, 2**60, 2**60], offsets=[0, 0])}), "'a'"),
        (encode({"a": entry(offsets=[4, 0])}, b"1234"), "outside"),
        (encode({"a": entry(offsets=[4, 8])}, b"1234"), "outside"),
        (encode({"a": entry(offsets=[4, 8])}, b"12345678"), "begins at byte 4"),
        (encode({"a": entry(), "b": entry()}, b"1234"), "begins at byte 0, not at 4"),
        (encode({"a": entry()}, b"12345678"), "end at byte 4 of 8"),
    ],
)
def test_damaged_files_are_refused(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        safetensors.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.safetensors"):
        safetensors.read(tmp_path / "absent.safetensors")
