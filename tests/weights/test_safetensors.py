import json
import struct

import ml_dtypes
import numpy as np
import pytest

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


@pytest.mark.reference
def test_the_library_agrees(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    safetensors.write(path, TENSORS, {"format": "pt"})
    theirs = load_file(path)
    save_file(theirs, path, {"format": "pt"})
    for name, array in safetensors.read(path).items():
        np.testing.assert_array_equal(array.astype(np.float32), TENSORS[name].astype(np.float32))


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
