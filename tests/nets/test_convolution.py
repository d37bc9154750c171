"""Convolutions as products: against a float64 sum, against `nn.Conv`, and in all ways that programs are transformed."""

import functools
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax.nets import convolution_programs as programs
from diffjax.nets.convolution import Conv, convolve
from diffjax.utils import processor

ROOT = Path(__file__).parents[2]
SAME, BELOW, AROUND = ((1, 1), (1, 1)), ((0, 1), (0, 1)), ((2, 0), (1, 3))
CASES = {  # (rows, columns, inputs, outputs, height and width of the kernel, stride, padding)
    "3x3": (6, 10, 5, 7, 3, 3, 1, SAME),
    "1x1": (4, 6, 5, 3, 1, 1, 1, ((0, 0), (0, 0))),
    "halving": (8, 6, 4, 5, 3, 3, 2, BELOW),
    "4x4 halving": (8, 6, 3, 4, 4, 4, 2, SAME),
    "result larger": (5, 4, 6, 8, 2, 2, 1, SAME),
    "uneven": (7, 5, 3, 2, 3, 2, 1, AROUND),
    "uneven halving": (9, 7, 3, 2, 2, 3, 2, AROUND),
    "padding wider than the kernel": (3, 3, 2, 3, 1, 1, 1, SAME),
}
WIDE = "uneven", "uneven halving", "padding wider than the kernel"  # of which oneDNN has none


@pytest.fixture
def always(monkeypatch):
    """Products whatever the size and the processor, in blocks of a few rows."""
    monkeypatch.setattr(processor, "has_bfloat16", lambda: True)
    monkeypatch.setattr(programs, "MANY_CHANNELS", 0)
    monkeypatch.setattr(programs, "LARGE", 0)
    monkeypatch.setattr(programs, "BLOCK", 40)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def onednn(always, optimized, monkeypatch):
    """The optional package, as on a machine that is one device."""
    if not processor.NATIVE & processor.flags():
        pytest.skip("this processor emulates bfloat16, and diffjax does not ask oneDNN for it there")
    package = pytest.importorskip("diffjax_onednn", reason="needs pip install ./native", exc_type=ImportError)
    monkeypatch.setattr(programs, "_onednn", lambda: package)


def drawn(case, dtype=np.float32, n=2):
    """An image batch, a kernel and a cotangent, whose numbers bfloat16 holds."""
    h, w, i, o, kh, kw, stride, padding = CASES.get(case, case)
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16).astype(dtype)
    x, kernel = draw(n, h, w, i), draw(kh, kw, i, o)
    y = jax.eval_shape(functools.partial(convolve, stride=stride, padding=padding), x, kernel)
    return x, kernel, draw(*y.shape), stride, padding


def exact(x, kernel, dy, stride, padding):
    """The convolution and its gradients to both, summed place by place in float64."""
    x, kernel, dy = (np.asarray(value, np.float64) for value in (x, kernel, dy))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    y, dx, dkernel = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(kernel.shape[:2]):
        rows, columns = (slice(k, k + stride * size, stride) for k, size in zip((i, j), dy.shape[1:3]))
        y += padded[:, rows, columns] @ kernel[i, j]
        dx[:, rows, columns] += dy @ kernel[i, j].T
        dkernel[i, j] = np.einsum("nhwi,nhwo->io", padded[:, rows, columns], dy)
    inside = tuple(slice(low, low + size) for (low, _), size in zip(padding, x.shape[1:3]))
    return y, dx[:, *inside], dkernel


def error(got, wanted):
    return np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype, bound", [(np.float32, 1e-6), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("case", CASES)
def test_convolution_and_gradients(case, dtype, bound):
    """Against float64: float32 to 1e-6 of the largest number, bfloat16 to one rounding of it."""
    x, kernel, dy, stride, padding = drawn(case, dtype)
    y, pull = jax.jit(lambda x, kernel: jax.vjp(lambda *args: convolve(*args, stride, padding), x, kernel))(x, kernel)
    for got, wanted in zip((y, *pull(dy)), exact(x, kernel, dy, stride, padding)):
        assert got.dtype == dtype and error(got, wanted) < bound


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("case", ["3x3", "1x1", "halving"])
def test_one_block(case):
    """An image that is one block, where no loop keeps XLA from a product with a transpose: of bfloat16 it has none."""
    h, w, _, _, *rest = CASES[case]
    x, kernel, dy, stride, padding = drawn((h, w, 64, 64, *rest), jnp.bfloat16)
    gradient = jax.jit(lambda x, kernel, dy: jax.vjp(lambda *args: convolve(*args, stride, padding), x, kernel)[1](dy))
    for got, wanted in zip(gradient(x, kernel, dy), exact(x, kernel, dy, stride, padding)[1:]):
        assert error(got, wanted) < 2**-8


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_transformed(dtype):
    """vmap, the gradient of vmap, remat and scan give what image by image gives."""
    x, kernel, dy, stride, padding = drawn("result larger", dtype, n=4)
    loss = lambda kernel, x, dy: jnp.sum(jnp.sin(convolve(x, kernel, stride, padding).astype(jnp.float32)) * dy)
    images, cotangents = x[:, None], dy[:, None].astype(jnp.float32)
    one = jax.jit(jax.grad(loss, argnums=(0, 1)))
    singly = [one(kernel, *pair) for pair in zip(images, cotangents)]
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(jnp.float32), *singly)
    over = jax.vmap(jax.grad(loss, argnums=(0, 1)), (None, 0, 0))
    rematted = lambda *pair: jax.grad(jax.checkpoint(loss), argnums=(0, 1))(kernel, *pair)
    scanned = lambda *pairs: jax.lax.scan(lambda carry, pair: (carry, rematted(*pair)), None, pairs)[1]
    for got in (jax.jit(over)(kernel, images, cotangents), jax.jit(scanned)(images, cotangents)):
        for a, b in zip(got, wanted):
            np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=2**-7 if dtype != np.float32 else 1e-5)


def plainly(x, kernel, stride, padding):
    """The convolution of XLA, as jax differentiates it."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype, bound", [(np.float32, 1e-5), (np.float64, 1e-12), (jnp.bfloat16, 2**-5)])
@pytest.mark.parametrize("case", CASES)
def test_forward_mode_and_second_derivatives(case, dtype, bound):
    """By directions, forward over reverse and reverse over reverse, as the plain convolution has them in float64."""
    with jax.enable_x64(True):
        x, kernel, _, stride, padding = drawn(case, dtype)
        ours, plain = (functools.partial(f, stride=stride, padding=padding) for f in (convolve, plainly))
        got = jax.jit(functools.partial(derivatives, ours))(x, kernel)
        wanted = jax.jit(functools.partial(derivatives, plain))(x.astype(np.float64), kernel.astype(np.float64))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert one.dtype == dtype and error(one, np.asarray(other)) < bound


def derivatives(function, x, kernel):
    """First ones along a direction of both operands and of one, and second ones by both ways and by every pair."""
    along = jax.jvp(function, (x, kernel), (jnp.flip(x), jnp.flip(kernel)))
    only = jax.linearize(lambda x: function(x, kernel), x)[1](jnp.flip(x))
    square = lambda x, kernel: jnp.sum(jnp.square(function(x, kernel)))
    slopes = jax.grad(square, (0, 1))
    forward = jax.jvp(slopes, (x, kernel), (jnp.flip(x), jnp.flip(kernel)))
    length = lambda x, kernel: sum(jnp.sum(jnp.square(slope)) for slope in slopes(x, kernel))
    return along, only, forward, jax.grad(length, (0, 1))(x, kernel)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_devices(dtype):
    """A batch split over devices, by jit and by pmap, has the images of one device, and the gradient of the whole."""
    x, kernel, dy, stride, padding = drawn("3x3", dtype, n=8)
    call = lambda x, kernel: convolve(x, kernel, stride, padding)
    gradient = jax.jit(lambda x, kernel, dy: jax.vjp(call, x, kernel)[1](dy))
    rows = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")
    )
    split = jax.device_put((x, dy), rows)
    np.testing.assert_array_equal(jax.jit(call)(x, kernel), jax.jit(call)(split[0], kernel))
    np.testing.assert_array_equal(jax.jit(call)(x, kernel), jax.pmap(call, in_axes=(0, None))(x[:, None], kernel)[:, 0])
    wanted = gradient(x, kernel, dy)
    for got, whole in zip(gradient(split[0], kernel, split[1]), wanted):
        whole = np.asarray(whole, np.float64)
        assert error(got, whole) < (1e-6 if dtype == np.float32 else 2**-7)


def test_meshes():
    """Under the checks of `shard_map` and on a mesh of explicit axes, where a type says where an array lies, the
    gradients are those of one device, by plain convolutions; an automatic mesh changes nothing.
    """
    x, kernel, _, stride, padding = drawn("3x3", n=8)
    mesh = lambda kind: jax.make_mesh((8,), ("data",), axis_types=(kind,))
    automatic, explicit = mesh(jax.sharding.AxisType.Auto), mesh(jax.sharding.AxisType.Explicit)
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    gradients = jax.grad(lambda *pair: jnp.sum(convolve(*pair, stride, padding) ** 2), (0, 1))
    wanted = gradients(x, kernel)
    split = jax.shard_map(gradients, mesh=automatic, in_specs=(rows, whole), out_specs=(rows, whole))
    placed = [jax.device_put(y, jax.NamedSharding(explicit, spec)) for y, spec in ((x, rows), (kernel, whole))]
    with jax.set_mesh(explicit):
        on_mesh = jax.jit(gradients)(*placed)
    for got in (jax.jit(split)(x, kernel), on_mesh):
        for one, other in zip(got, wanted):
            assert error(one, np.asarray(other, np.float64)) < 1e-6
    with jax.sharding.use_abstract_mesh(automatic.abstract_mesh):
        assert "convolution_to_kernel" in str(jax.make_jaxpr(gradients)(x, kernel))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype, bound", [(np.float32, 2e-6), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("case", CASES)
def test_onednn(case, dtype, bound):
    """The optional package, with gradients: against float64, and by bits an image in any batch and under vmap."""
    x, kernel, dy, stride, padding = drawn(case, dtype)
    call = lambda x, kernel: convolve(x, kernel, stride, padding)
    assert ("diffjax_convolution" in jax.jit(call).lower(x, kernel).as_text()) == (case not in WIDE)
    both = jax.jit(lambda x, kernel, dy: (call(x, kernel), *jax.vjp(call, x, kernel)[1](dy)))
    assert ("diffjax_kernel_gradient" in both.lower(x, kernel, dy).as_text()) == (case not in WIDE)
    y, *gradients = both(x, kernel, dy)
    for got, wanted in zip((y, *gradients), exact(x, kernel, dy, stride, padding)):
        assert got.dtype == dtype and error(got, wanted) < bound
    np.testing.assert_array_equal(jax.jit(call)(x[1:], kernel), y[1:])
    rows = jax.jit(jax.vmap(lambda x, dy: jax.vjp(call, x, kernel)[1](dy)[1]))(x[:, None], dy[:, None])
    assert error(rows.sum(0, dtype=np.float32), np.asarray(gradients[1], np.float64)) < bound
    np.testing.assert_array_equal(jax.jit(jax.vmap(call, (0, None)))(x[:, None], kernel)[:, 0], y)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_onednn_elsewhere(dtype):
    """Not in a program for an accelerator; on all devices of a CPU under pmap."""
    x, kernel, _, stride, padding = drawn("3x3", dtype, n=8)
    call = lambda x, kernel: convolve(x, kernel, stride, padding)
    assert "diffjax" not in jax.jit(call).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    split = jax.pmap(call, in_axes=(0, None))(x[:, None], kernel)
    np.testing.assert_array_equal(split[:, 0], jax.jit(call)(x, kernel))


@pytest.mark.parametrize("case", CASES)
def test_a_processor_without_bfloat16_multiplies_float32(case, always, monkeypatch):
    """Nor is oneDNN asked, which refuses there what it would have to emulate."""
    monkeypatch.setattr(processor, "has_bfloat16", lambda: False)
    asked = []
    noted = lambda result: lambda x, *rest: asked.append(x.dtype) or result(x, *rest)
    gradient = lambda x, dy, shape, *rest: jax.vjp(lambda k: plainly(x, k, *rest), jnp.zeros(shape))[1](dy)[0]
    package = types.SimpleNamespace(convolve=noted(plainly), kernel_gradient=noted(gradient))
    monkeypatch.setattr(programs, "_onednn", lambda: package)
    x, kernel, dy, stride, padding = drawn(case, jnp.bfloat16)
    call = lambda x, kernel: convolve(x, kernel, stride, padding)
    both = jax.jit(lambda x, kernel, dy: (call(x, kernel), *jax.vjp(call, x, kernel)[1](dy)))
    for got, wanted in zip(both(x, kernel, dy), exact(x, kernel, dy, stride, padding)):
        assert got.dtype == jnp.bfloat16 and error(got, wanted) < 2**-8
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", both.lower(x, kernel, dy).as_text())
    assert products and not any("bf16" in product for product in products) and jnp.bfloat16 not in asked


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_onednn_is_built(tmp_path):
    """The command of the documentation, in an environment of its own that sees this one's packages."""
    python = tmp_path / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path)}))
    (site / "here.pth").write_text(sysconfig.get_path("purelib"))
    source = shutil.copytree(ROOT / "native", tmp_path / "native")
    subprocess.run([python, "-m", "pip", "install", "-q", source], check=True)
    ones = "map(jax.numpy.ones, [(1, 4, 4, 8), (3, 3, 8, 8)])"
    program = f"import jax, diffjax_onednn as d; print(d.convolve(*{ones}, 1, ((1, 1), (1, 1))).max())"
    said = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(said) == 72


def test_onednn_is_optional(monkeypatch):
    """Switched off by its variable, not taken for several devices, not missed where it is not installed or an earlier
    one, which had no gradients.
    """
    find = programs._onednn.__wrapped__
    package = types.SimpleNamespace(convolve=object(), kernel_gradient=object())
    monkeypatch.setitem(sys.modules, "diffjax_onednn", package)
    assert find() is None
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert find() is package
    for absent in (None, types.SimpleNamespace(convolve=object())):
        monkeypatch.setitem(sys.modules, "diffjax_onednn", absent)
        assert find() is None
    monkeypatch.setitem(sys.modules, "diffjax_onednn", package)
    monkeypatch.setenv("DIFFJAX_ONEDNN", "0")
    assert find() is None


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_images_do_not_depend_on_the_batch(dtype):
    """Bit for bit, at a width where products are taken and with blocks of other heights."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((5, 32, 32, 64)), dtype)
    kernel = jnp.asarray(random.standard_normal((3, 3, 64, 64)) / 24, dtype)
    call = jax.jit(functools.partial(convolve, padding=SAME))
    whole = call(x, kernel)
    for n in (1, 3):
        np.testing.assert_array_equal(call(x[:n], kernel), whole[:n])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_other_platforms(platform, dtype):
    """A program for an accelerator is plain convolutions: one forward, two for the gradients; no loops, no products."""
    x, kernel, dy, stride, padding = drawn("result larger", dtype)
    call = lambda x, kernel: convolve(x, kernel, stride, padding)
    for function, count in (lambda x, kernel, dy: call(x, kernel), 1), (lambda *a: jax.vjp(call, *a[:2])[1](a[2]), 2):
        text = jax.jit(function).trace(x, kernel, dy).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == count
        assert "stablehlo.while" not in text and "stablehlo.dot" not in text


@pytest.mark.parametrize(
    "fields", [{"padding": 1}, {"padding": BELOW, "strides": 2}, {"padding": 0, "kernel_init": nn.initializers.zeros}]
)
def test_parameters_are_those_of_flax(fields):
    """Names, shapes, initial values and the result."""
    x = jax.random.normal(jax.random.key(1), (2, 6, 8, 5))
    ours, flax = Conv(7, (3, 3), **fields), nn.Conv(7, (3, 3), **fields)
    params = flax.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), params)
    np.testing.assert_allclose(ours.apply(params, x), flax.apply(params, x), rtol=0, atol=1e-6)


def test_gradient_of_a_bias_is_summed_in_float32():
    """Of more pixels than bfloat16 can count: 2,304 ones, which a sum in bfloat16 leaves at 256."""
    x, conv = jnp.ones((1, 48, 48, 3), jnp.bfloat16), Conv(5, (1, 1), dtype=jnp.bfloat16)
    params = conv.init(jax.random.key(0), x)["params"]
    loss = lambda params: jnp.sum(conv.apply({"params": params}, x).astype(jnp.float32))
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(params)["bias"], 48 * 48)
