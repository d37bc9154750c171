"""Devices that share the heads of a transformer, in numbers that do not divide them: the same result, in programs
that move little.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.models import sd3
from diffjax.nets import lora
from diffjax.nets.layers import attention, matmul
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.quantize import SCHEMES, quantize_kernels
from diffjax.nets.split import Split, pad_heads
from diffjax.parallel import devices, layout, sharding
from diffjax.plan import hlo, tree_bytes
from diffjax.plan.compiled import placed
from diffjax.utils.errors import UserError

TOY = MMDiT(8, 2, 4, 4, 2, 8, 3, 16, 8, 8, dual_attention_layers=(0,))
KERNELS = ("blocks_0/attn/to_q/kernel", "blocks_0/attn/to_out_0/kernel", "blocks_1/attn/add_v_proj/kernel")


def inputs(module, rows, tokens=5):
    side, channels = module.sample_size, module.in_channels
    shapes = ((rows, side, side, channels), (rows,), (rows, tokens, module.joint_attention_dim))
    return (*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes), pooled(module, rows))


def pooled(module, rows):
    return jax.ShapeDtypeStruct((rows, module.pooled_projection_dim), jnp.float32)


@functools.cache
def drawn():
    """Random parameters, biases of keys and values included."""
    shapes = jax.eval_shape(TOY.init, jax.random.key(0), *inputs(TOY, 1))["params"]
    random = np.random.RandomState(0)
    return jax.tree.map(lambda leaf: jnp.float32(random.standard_normal(leaf.shape) / 5), shapes)


@functools.cache
def called(rows):
    """A function of module and parameters: the network's output for so many random rows."""
    random = np.random.RandomState(rows)
    given = [random.standard_normal(leaf.shape).astype(np.float32) for leaf in inputs(TOY, rows)]
    return lambda module, params: np.asarray(jax.jit(module.apply)({"params": params}, *given))


def split(module, params, way, over):
    """As `sd3.shared` does, over some devices."""
    how = sd3.split_over(way, over)
    more = how.padded(module.num_attention_heads) - module.num_attention_heads
    params = pad_heads(params, module.num_attention_heads, module.attention_head_dim, more)
    places = devices.shard_by_rules(params, sharding.WAYS[way].rules, how.mesh)
    return module.clone(split=how), jax.device_put(params, places)


@pytest.mark.parametrize(
    "way, count, rows",
    [("tensor", 2, 2), ("tensor", 8, 1), ("fsdp", 2, 2), ("fsdp", 4, 1), ("both", 4, 1), ("both", 8, 2)],
)
def test_devices_that_do_not_divide_the_heads_give_what_one_gives(way, count, rows):
    exact = called(rows)(TOY, drawn())
    found = called(rows)(*split(TOY, drawn(), way, jax.devices()[:count]))
    assert np.abs(found - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
def test_heads_of_zeros_beside_adapters_and_fewer_bits(bits):
    params = drawn() if bits is None else quantize_kernels(drawn(), SCHEMES[bits])
    flat, random = traverse_util.flatten_dict(drawn(), sep="/"), np.random.RandomState(1)
    draw = lambda *shape: jnp.float32(random.standard_normal(shape))
    adapters = {}
    for path in KERNELS:
        *layers, i, o = flat[path].shape
        ab = draw(*layers, i, 2), draw(*layers, 2, o)
        adapters[path] = lora.Adapter(*ab, jnp.ones((*layers, 2)), gain=draw(*layers, o), bias=draw(*layers, o))
    params = lora.join(params, adapters)
    exact, found = called(2)(TOY, params), called(2)(*split(TOY, params, "tensor", jax.devices()[:4]))
    assert np.abs(found - exact).max() <= 2e-6 * np.abs(exact).max()


def test_groups_of_four_bits_that_end_within_a_head_are_refused():
    kernel = SCHEMES["int4"](jnp.ones((1, 128, 8)))
    assert pad_heads({"to_out_0": {"kernel": kernel}}, 2, 64, 1)["to_out_0"]["kernel"].scales.shape == (1, 3, 8)
    with pytest.raises(UserError, match="take int8"):
        pad_heads({"to_out_0": {"kernel": kernel}}, 4, 32, 1)


WIDE = MMDiT(32, 2, 4, 4, 3, 64, 5, 128, 64, 32, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


@functools.cache
def compiled(kind, count, way, rows=2):
    """The transformer of five heads, compiled for that many devices of a kind."""
    how = sd3.split_over(way, devices.absent(kind, count))
    module = WIDE.clone(split=how)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs(module, rows))["params"]
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        params,
        devices.shard_by_rules(params, sharding.WAYS[way].rules, how.mesh),
    )
    whole = NamedSharding(how.mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in inputs(module, rows, 77)]
    return jax.jit(module.apply, out_shardings=whole).lower({"params": params}, *given).compile()


def activations():
    """The bytes of both streams."""
    return 2 * (WIDE.sample_size**2 // 4 + 77) * WIDE.width * 2


@pytest.mark.accelerators
@pytest.mark.parametrize("kind, count, way", [("h100", 4, way) for way in sharding.WAYS] + [("h100", 8, "tensor")])
def test_gpus_share_heads_that_they_do_not_divide(kind, count, way, compiler):
    compiler(kind)
    program = compiled(kind, count, way)
    assert "__cudnn$fmha" in program.as_text()


@pytest.mark.accelerators
@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_tensor_parallelism_sums_twice_a_layer_in_half_precision_and_gathers_no_heads(kind, compiler):
    compiler(kind)
    moved = hlo.collectives(hlo.read(compiled(kind, 4, "tensor").as_text()), 4)
    gathered = sum(size for name, size in moved.items() if name != "all-reduce")
    assert gathered < 0.01 * moved["all-reduce"]
    assert moved["all-reduce"] <= 1.1 * WIDE.num_layers * 2 * (2 * 3 / 4) * activations()


@pytest.mark.accelerators
@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_devices_that_share_kernels_send_the_smaller_of_kernel_and_rows(kind, compiler):
    """Two layers, the inner one wide; of many rows each kernel comes in bfloat16 forwards and backwards, and its
    gradient goes in float32.
    """
    compiler(kind)
    mesh = layout.mesh("fsdp", 1, devices.absent(kind, 4))
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 1024), (1024, 256))]
    places = devices.shard_by_rules(kernels, layout.RULES["fsdp"], mesh)

    def loss(kernels, x):
        for kernel in kernels:
            x = matmul(jnp.sin(x), kernel, jnp.bfloat16)
        return jnp.sum(x * x)

    def gradients(kernels, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.lax.with_sharding_constraint(jax.grad(loss)(kernels, x), places)

    size, given = tree_bytes(kernels), [placed(kernels, places)]
    for rows, most in ((8192, 3 / 4 * 2 * size), (4, 6 * 4 * 4 * (256 + 1024))):
        x = jax.ShapeDtypeStruct((rows, 256), jnp.float32, sharding=layout.rows(mesh))
        moved = hlo.collectives(hlo.read(jax.jit(gradients).lower(*given, x).compile().as_text()), 4)
        assert 0 < sum(moved.values()) < 1.05 * most, (rows, moved)


@pytest.mark.accelerators
def test_gpus_copy_no_weights_of_layers_that_are_compiled_one_by_one(compiler):
    compiler("h100")
    module, mesh = WIDE.clone(scan=False), devices.data_mesh(devices.absent("h100"))
    given = inputs(module, 2, 77)
    params = jax.eval_shape(module.init, jax.random.key(0), *given)
    there = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    program = jax.jit(module.apply).lower(*jax.tree.map(there, (params, *given))).compile()
    assert hlo.copied(hlo.read(program.as_text())) < 0.01 * tree_bytes(params)


@pytest.mark.accelerators
@pytest.mark.parametrize("kind, kernel", [("v5e", "tpu_custom_call"), ("h100", "__cudnn$fmha")])
def test_attention_is_fused_where_the_program_runs(kind, kernel, compiler):
    compiler(kind)
    mesh = devices.data_mesh(devices.absent(kind))
    x = jax.ShapeDtypeStruct((2, 1100, 5, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    alone = jax.shard_map(attention, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    for function in (alone, jax.grad(lambda *qkv: jnp.sum(alone(*qkv)).astype(jnp.float32))):
        program = jax.jit(function).lower(x, x, x).compile()
        assert kernel in program.as_text()
        assert program.memory_analysis().temp_size_in_bytes < 1100**2 * 5 * 2 * 4


@pytest.mark.parametrize("shape, rows", [((1, 1, 4), 3), ((2, 1, 2), 4), ((4, 2, 1), 8)])
def test_attention_under_a_mesh_is_shared_by_rows_and_heads(shape, rows):
    """Three heads, a mask of rows and a bias of heads: values and gradients are those of one device."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape), layout.AXES)
    random = np.random.RandomState(0)
    q, k, v, bias = (np.float32(random.standard_normal(size)) for size in ((rows, 5, 3, 8),) * 3 + ((1, 3, 5, 5),))
    mask = np.arange(5) < random.randint(1, 6, (rows, 1, 1, 1))

    def loss(shared, q, k, v, bias):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            split = Split.here()
        y = split.attend(attention, q, k, v, mask, bias) if shared else attention(q, k, v, mask, bias)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, (1, 2, 3, 4), has_aux=True), static_argnums=0)
    whole = jax.device_put((q, k, v, bias), NamedSharding(mesh, PartitionSpec()))
    for one, many in zip(jax.tree.leaves(run(False, q, k, v, bias)), jax.tree.leaves(run(True, *whole))):
        assert np.abs(one - many).max() <= 1e-6 * np.abs(one).max()


def test_no_mesh_and_one_device_share_nothing():
    one = devices.data_mesh(jax.devices()[:1])
    assert Split.here() is None
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        assert Split.here() is None
    with jax.sharding.use_abstract_mesh(devices.data_mesh().abstract_mesh):
        assert Split.here().padded(3) == 3 and Split.here().rows == ("data",)
