"""What a job will cost, said before it runs: parameters, bytes, memory, floating-point operations and time.

Only configuration files are read; networks are traced on shapes. The time of a program is the sum of its parts at a device's
rates, `products / rate + convolutions / rate + traffic / bandwidth`; rates come from a short calibration of the device at hand,
kept in the cache folder, or from a table of published peaks at the share of them that programs reach.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax import files
from diffjax.errors import UserError, unknown
from diffjax.nets import Cost, cost

SHARE = 0.5
"""The share of a published peak that networks of this kind reach."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of 16-bit and 32-bit products and of convolutions, and bytes a second of memory."""

    products16: float
    products32: float
    convolutions: float
    bandwidth: float

    def seconds(self, cost: Cost) -> float:
        """The time of a program of this cost."""
        return (
            cost.products16 / self.products16
            + cost.products32 / self.products32
            + cost.convolutions / self.convolutions
            + cost.traffic / self.bandwidth
        )


PEAKS = {
    # dense 16-bit, 32-bit (TF32 where products take it), convolutions as 32-bit, memory; vendors' datasheets
    "h100": Rates(989e12, 494e12, 494e12, 3.35e12),
    "h200": Rates(989e12, 494e12, 494e12, 4.8e12),
    "a100": Rates(312e12, 156e12, 156e12, 2.04e12),
    "t4": Rates(65e12, 8.1e12, 8.1e12, 0.32e12),
    "v5e": Rates(197e12, 49e12, 49e12, 0.82e12),
}
MEMORY = {"h100": 80e9, "h200": 141e9, "a100": 80e9, "t4": 16e9, "v5e": 16e9}


@dataclass(frozen=True)
class Part:
    """A network of the job: arguments as shapes, and how often it is called."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    calls: float


@dataclass(frozen=True)
class Estimate:
    """One part's figures: parameters, their bytes, the bytes that a call holds at once, and the cost of all its calls."""

    name: str
    parameters: int
    weights: int
    activations: int
    calls: float
    cost: Cost


def estimate(part: Part) -> Estimate:
    """The figures of a part, from shapes alone."""
    variables = jax.eval_shape(part.module.init, jax.random.key(0), *part.inputs, **part.named)
    leaves = jax.tree.leaves(variables["params"])
    call = lambda variables, inputs, named: part.module.apply(variables, *inputs, **named)
    program = jax.make_jaxpr(call)(variables, part.inputs, part.named).jaxpr
    return Estimate(
        part.name,
        sum(math.prod(leaf.shape) for leaf in leaves),
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
        live_bytes(program),
        part.calls,
        cost(part.module, *part.inputs, **part.named).times(part.calls),
    )


def live_bytes(program: Any) -> int:
    """The most bytes of intermediate values alive at once, if nothing were fused; inner programs count when they run."""
    size = lambda value: math.prod(value.aval.shape) * value.aval.dtype.itemsize if hasattr(value.aval, "shape") else 0
    last = {}
    for position, equation in enumerate(program.eqns):
        for value in equation.invars:
            if not hasattr(value, "val"):
                last[value] = position
    own = set(program.invars) | set(program.constvars)
    live, most = 0, 0
    for position, equation in enumerate(program.eqns):
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inside = max((live_bytes(value) for value in inner if hasattr(value, "eqns")), default=0)
        live += sum(size(value) for value in equation.outvars)
        most = max(most, live + inside)
        used = {value for value in equation.invars if not hasattr(value, "val")}
        dead = {value for value in used if last[value] == position} - own
        live -= sum(size(value) for value in dead) + sum(size(v) for v in equation.outvars if v not in last)
    return most


def compiled_bytes(part: Part) -> int:
    """The temporary bytes that the compiler allocates for a call: exact, at the price of compiling."""
    variables = jax.eval_shape(part.module.init, jax.random.key(0), *part.inputs, **part.named)
    call = jax.jit(lambda variables, inputs, named: part.module.apply(variables, *inputs, **named))
    return call.lower(variables, part.inputs, part.named).compile().memory_analysis().temp_size_in_bytes


def rates(device: str | None = None) -> tuple[str, Rates]:
    """The device's name and rates: measured (once, then cached) for the one at hand, from the table for a named one.

    Raises `UserError` for a name that is not in the table.
    """
    if device is not None and device != jax.default_backend():
        if device not in PEAKS:
            raise unknown("device", device, [*PEAKS, jax.default_backend()])
        peak = PEAKS[device]
        return device, replace(peak, **{name: SHARE * value for name, value in asdict(peak).items() if name != "bandwidth"})
    kind = f"{jax.devices()[0].device_kind}, {jax.local_device_count()} devices, jax {jax.__version__}"
    path = files.home() / "calibration.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if kind not in known:
        known[kind] = asdict(calibrate())
        files.write_json(path, known)
    return kind, Rates(**known[kind])


def calibrate() -> Rates:
    """Rates of the device at hand, a few seconds: products of the size that networks have, four convolutions, one copy."""
    random = lambda *shape, dtype=jnp.float32: jax.random.normal(jax.random.key(0), shape, dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    convolve = jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    rate = lambda n, dtype: 2 * n**3 / _seconds(product, random(n, n, dtype=dtype), random(n, n, dtype=dtype))
    shapes = ((128, 128), (64, 256), (32, 256), (16, 512))
    took = sum(_seconds(convolve, random(1, side, side, c), random(3, 3, c, c)) for side, c in shapes)
    worked = sum(2 * 9 * (side * c) ** 2 for side, c in shapes)
    big = random(1 << 24)
    return Rates(
        rate(768, jnp.bfloat16), rate(768, jnp.float32), worked / took, 2 * big.nbytes / _seconds(jax.jit(lambda x: 1.5 * x), big)
    )


def _seconds(function: Callable, *arguments: Any) -> float:
    """The median time of a call, compiled before."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return sorted(times)[2]


def pipeline_parts(folder: Path, size: int | None, batch: int, steps: int, dtype: Any) -> list[Part]:
    """The networks of a published pipeline folder and how often sampling calls them; only its JSON files are read."""
    from diffjax.weights import describe
    from diffjax.weights.folder import component

    module = describe(component(folder, "unet")).clone(dtype=dtype, param_dtype=dtype)
    side = size or module.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    label = jax.ShapeDtypeStruct((batch,), jnp.int32) if module.num_class_embeds else None
    inputs = (jax.ShapeDtypeStruct((batch, height, width, module.in_channels), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.float32))
    return [Part("unet", module, inputs, {"label": label} if label else {}, steps)]


def duration(seconds: float) -> str:
    """Seconds in words: `0.4 s`, `38 s`, `31 min`, `2.1 h`."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
