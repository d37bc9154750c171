import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from diffjax.utils.errors import UserError
from diffjax.weights.names import POINTWISE, Names, read_params, table, write_params

NAMES = Names(
    renames=((r"^blocks/", "layers/{}/"), (r"_(\d+)/", r"/\1/")),
    layouts=(("shortcut/kernel$", POINTWISE),),
    aliases=((r"^old\.", "conv_0."), (r"\.gamma$", ".weight")),
    ignored="^unused$",
)


def draw(*shape):
    return np.random.RandomState(len(shape)).standard_normal(shape).astype(np.float32)


PARAMS = {
    "conv_0": {"kernel": draw(3, 3, 4, 5), "bias": draw(5)},
    "shortcut": {"kernel": draw(4, 5)},
    "norm": {"scale": draw(5)},
    "table": {"embedding": draw(7, 5)},
    "blocks": {"dense": {"kernel": draw(2, 4, 5)}},
}
SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)


def read(tensors, **options):
    return read_params(tensors, SHAPES, NAMES, "folder", **options)


def test_keys_and_layouts():
    tensors = write_params(PARAMS, NAMES)
    assert {key: array.shape for key, array in tensors.items()} == {
        "conv.0.weight": (5, 4, 3, 3),
        "conv.0.bias": (5,),
        "shortcut.weight": (5, 4, 1, 1),
        "norm.weight": (5,),
        "table.weight": (7, 5),
        "layers.0.dense.weight": (5, 4),
        "layers.1.dense.weight": (5, 4),
    }
    np.testing.assert_array_equal(tensors["conv.0.weight"][1, 2], PARAMS["conv_0"]["kernel"][:, :, 2, 1])
    np.testing.assert_array_equal(tensors["layers.1.dense.weight"], PARAMS["blocks"]["dense"]["kernel"][1].T)


def test_reading_inverts_writing():
    jax.tree.map(np.testing.assert_array_equal, read(write_params(PARAMS, NAMES)), PARAMS)


def test_matrices_may_be_kept_as_convolutions_and_the_reverse():
    tensors = write_params(PARAMS, NAMES)
    tensors["layers.0.dense.weight"] = tensors["layers.0.dense.weight"][:, :, None, None]
    tensors["layers.1.dense.weight"] = tensors["layers.1.dense.weight"][:, :, None]
    tensors["shortcut.weight"] = tensors["shortcut.weight"][:, :, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, read(tensors), PARAMS)


def test_dtypes_are_the_file_s_or_as_asked():
    tensors = write_params(PARAMS, NAMES)
    tensors["norm.weight"] = tensors["norm.weight"].astype(ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(read(tensors))} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(read(tensors, dtype=jnp.float16))} == {jnp.dtype("float16")}


def test_everything_wrong_is_said_at_once():
    tensors = write_params(PARAMS, NAMES)
    del tensors["norm.weight"], tensors["layers.1.dense.weight"]
    tensors |= {"extra": draw(1), "unused": draw(1), "conv.0.bias": draw(6), "conv.0.weight": draw(5)}
    tensors["table.weight"] = tensors["table.weight"].astype(np.int32)
    with pytest.raises(UserError) as error:
        read(tensors)
    assert str(error.value) == (
        "folder does not fit its configuration; 2 missing: layers.1.dense.weight, norm.weight; 1 unexpected: extra; "
        "2 of another shape: conv.0.bias [6], conv.0.weight [5]; 1 not floating: table.weight"
    )


def test_a_long_list_is_cut_short():
    with pytest.raises(UserError, match="20 unexpected: .* and 12 more"):
        read(write_params(PARAMS, NAMES) | {f"extra{i}": draw(1) for i in range(20)})


def test_aliases_are_other_names_for_the_same():
    names = Names(aliases=((r"\.gamma$", ".weight"),))
    shapes = {"norm": {"scale": jax.ShapeDtypeStruct((3,), np.float32)}}
    old = read_params({"norm.gamma": np.ones(3, np.float32)}, shapes, names, "folder")
    np.testing.assert_array_equal(old["norm"]["scale"], np.ones(3))
    with pytest.raises(UserError, match="given twice: norm.weight"):
        read_params({"norm.gamma": np.ones(3), "norm.weight": np.ones(3)}, shapes, names, "folder")


def test_a_table_has_one_line_a_leaf():
    lines = {row.path: row.keys for row in table(SHAPES, NAMES)}
    assert lines["blocks/dense/kernel"] == ("layers.0.dense.weight", "layers.1.dense.weight") and len(lines) == 6


def test_leaves_go_where_they_are_placed():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    spec = {"conv_0/kernel": (None, None, "data"), "blocks/dense/kernel": (None, "data"), "table/embedding": ()}

    def placement(path, shape):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec.get(path, ())))

    placed = read(write_params(PARAMS, NAMES), sharding=placement)
    jax.tree.map(np.testing.assert_array_equal, placed, PARAMS)
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        name = "/".join(entry.key for entry in path)
        assert leaf.sharding.is_equivalent_to(placement(name, leaf.shape), leaf.ndim), name


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_stacked_leaves_keep_the_files_numbers(dtype):
    tensors = {key: tensor.astype(dtype) for key, tensor in write_params(PARAMS, NAMES).items()}
    leaf = read(tensors)["blocks"]["dense"]["kernel"]
    expected = np.stack([tensors[f"layers.{i}.dense.weight"].T for i in range(2)])
    np.testing.assert_array_equal(leaf, expected.astype(leaf.dtype))
    assert leaf.dtype == (np.float32 if dtype is np.float64 else dtype)
