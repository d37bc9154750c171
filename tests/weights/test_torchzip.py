import zipfile

import ml_dtypes
import numpy as np
import pytest
import torchfile
from torchfile import Call, Global

from diffjax.utils.errors import UserError
from diffjax.weights import torchzip

ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def read(tmp_path, value, storages=None, **options):
    path = tmp_path / "model.bin"
    torchfile.write(path, value, {"0": ARRAY} if storages is None else storages, **options)
    return torchzip.read(path)


def test_tensors_are_views_with_their_strides(tmp_path):
    values = {
        "whole": torchfile.tensor("0", ARRAY),
        "turned": torchfile.tensor("0", ARRAY, (4, 3), (1, 4), offset=12),
        "empty": torchfile.tensor("0", ARRAY, (0, 5), (5, 1)),
        "number": torchfile.tensor("0", ARRAY, (), (), offset=7),
    }
    found = read(tmp_path, values)
    np.testing.assert_array_equal(found["whole"], ARRAY)
    np.testing.assert_array_equal(found["turned"], ARRAY[1].T)
    assert found["empty"].shape == (0, 5) and found["number"] == 7
    assert not found["whole"].flags.owndata and not found["whole"].flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.int64, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, dtype):
    array = ARRAY.astype(dtype)
    found = read(tmp_path, torchfile.tensor("0", array), {"0": array})
    assert found.dtype == dtype and np.array_equal(found, array)


def test_containers_parameters_and_plain_values(tmp_path):
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), torchfile.tensor("0", ARRAY), True, ())
    ordered = Call(Global("collections", "OrderedDict"), [["a", 1], ["b", None]])
    value = {"p": parameter, "o": ordered, "l": [1, 2.5, "x", (True, False)], "n": 2**40}
    found = read(tmp_path, value)
    np.testing.assert_array_equal(found.pop("p"), ARRAY)
    assert found == {"o": {"a": 1, "b": None}, "l": [1, 2.5, "x", (True, False)], "n": 2**40}


def test_other_names_are_refused_and_never_run(tmp_path):
    with pytest.raises(UserError, match="names 'os.system'"):
        read(tmp_path, {"w": Call(Global("os", "system"), f"touch {tmp_path}/ran")})
    with pytest.raises(UserError, match="numpy.core.multiarray.scalar"):
        read(tmp_path, Call(Global("numpy.core.multiarray", "scalar")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        torchfile.tensor("0", ARRAY, (5, 5), (5, 1)),
        torchfile.tensor("0", ARRAY, (2, 2), (100, 1)),
        torchfile.tensor("0", ARRAY, (2,), (-1,), offset=5),
        torchfile.tensor("0", ARRAY, (2**60,), (0,)),
        torchfile.tensor("0", ARRAY, (2, 2), (1,)),
        torchfile.tensor("1", ARRAY),
        torchfile.tensor("0", ARRAY[:1]),
        Call(Global("torch._utils", "_rebuild_tensor_v2"), None, 0, (1,), (1,)),
        Call(Global("torch", "FloatStorage")),
        {(("a",), "b"): 1},
    ],
)
def test_impossible_tensors_are_refused(tmp_path, value):
    with pytest.raises(UserError, match="model.bin"):
        read(tmp_path, value)


@pytest.mark.parametrize(
    "program",
    [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02(.", b"\x80\x02h\x00.", b"\x80\x02K\x01K\x02s.", b"cos\nsystem\n."],
)
def test_broken_pickles_are_refused(tmp_path, program):
    with pytest.raises(UserError, match="model.bin"):
        read(tmp_path, program)


def test_a_pickle_cannot_ask_for_memory_or_time(tmp_path):
    """A memo index of 4 billion costs nothing; a tuple that doubles 64 times is never walked through."""
    doubled = b"(" + b"K\x01" + b"t" + b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(64))
    assert read(tmp_path, b"\x80\x02K\x07r\xff\xff\xff\xff.") == 7
    with pytest.raises(UserError):
        read(tmp_path, b"\x80\x02}" + doubled + b"K\x01s.")
    with pytest.raises(UserError):
        read(tmp_path, b"\x80\x02" + doubled + b"Q.")


def test_what_is_not_a_file_of_torch_is_refused(tmp_path):
    with pytest.raises(UserError, match="compressed"):
        read(tmp_path, torchfile.tensor("0", ARRAY), compression=zipfile.ZIP_DEFLATED)
    path = tmp_path / "model.bin"
    with pytest.raises(UserError, match="name an existing file"):
        torchzip.read(tmp_path / "absent.bin")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(UserError, match="data.pkl"):
        torchzip.read(path)


def test_files_of_before_torch_1_6(tmp_path):
    path = tmp_path / "old.bin"
    tensors = {"a": ARRAY, "half": ARRAY.astype(np.float16), "odd": np.arange(3)}
    torchfile.write_old_state(path, tensors)
    found = torchzip.read(path)
    assert list(found) == list(tensors) and not found["a"].flags.owndata
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    whole = path.read_bytes()
    for end in (3, 20, 200, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="old.bin"):
            torchzip.read(path)
    for right, wrong in (
        (b"\x19.", b"\x18."),
        (b"FloatStorage", b"BoolStorage"),
        (b"X\x01\x00\x00\x00a", b"X\x01\x00\x00\x00b"),
    ):
        path.write_bytes(wrong.join(whole.rsplit(right, 1)))
        with pytest.raises(UserError, match="old.bin"):
            torchzip.read(path)


@pytest.mark.reference
def test_equals_torch_before_1_6(tmp_path):
    import torch

    state = {
        "a": torch.randn(3, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.ones(5, dtype=torch.bfloat16),
    }
    state["part"] = state["a"][1:, :2]
    torch.save(state, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    found = torchzip.read(tmp_path / "model.bin")
    for name, value in state.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), value.float().numpy())


@pytest.mark.reference
@pytest.mark.parametrize("protocol", [2, 4])
def test_equals_torch(tmp_path, protocol):
    import torch

    layer = torch.nn.Conv2d(3, 4, 3).to(torch.bfloat16)
    state = layer.state_dict() | {"parameter": torch.nn.Parameter(torch.ones(3))}
    state |= {"turned": torch.arange(6.0).reshape(2, 3).T, "number": torch.tensor(3)}
    state |= {"none": torch.zeros(0, 3), "flags": torch.tensor([True, False])}
    torch.save(state, tmp_path / "model.bin", pickle_protocol=protocol)
    found = torchzip.read(tmp_path / "model.bin")
    assert list(found) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), value.detach().float().numpy())
