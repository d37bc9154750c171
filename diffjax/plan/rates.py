"""How fast a device is: measured for the one at hand, from published peaks for others.

The time of a program is the sum of its parts, `products / rate + convolutions / rate + traffic / bandwidth + launches`.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nets import Cost
from diffjax.nets.convolution import convolve
from diffjax.parallel import targets
from diffjax.utils import files
from diffjax.utils.errors import unknown

SHARE = 0.5
"""The share of a published peak that networks of this kind reach."""

ROUNDS = 15
SIDE = 768
LINKS = 16
CONVOLUTIONS = ((128, 128), (64, 256), (32, 256), (16, 512))
"""Sizes to measure at: products of SIDE x SIDE, LINKS small products, 3 x 3 convolutions of (pixels a side,
channels).
"""

CONVOLVED = {16: jnp.bfloat16, 32: jnp.float32}
"""Their dtypes, by bits."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of 16-bit and 32-bit products and of 32-bit convolutions, bytes a second of memory, the
    seconds that it takes to start one operation, whether attention is fused, operations a second of 16-bit convolutions
    (0: those of 32-bit ones), and the bytes a second that come from other devices (0: there are none).
    """

    products16: float
    products32: float
    convolutions: float
    bandwidth: float
    launch: float
    fused: bool = False
    convolutions16: float = 0.0
    network: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """The time of a program of this cost."""
        return self.computing(cost) + self.moving(cost) + cost.launches * self.launch

    def computing(self, cost: Cost) -> float:
        """The time of its products and convolutions."""
        return (
            cost.products16 / self.products16
            + cost.products32 / self.products32
            + cost.convolutions / self.convolutions
            + cost.convolutions16 / (self.convolutions16 or self.convolutions)
        )

    def moving(self, cost: Cost) -> float:
        """The time in which memory moves what they read and write."""
        return (cost.traffic + (0 if self.fused else cost.scores)) / self.bandwidth


def _published(products16: float, products32: float, bandwidth: float, fused: bool, network: float = 0.0) -> Rates:
    """Rates of dense peaks; convolutions count as products."""
    half, single = SHARE * products16, SHARE * products32
    return Rates(half, single, single, bandwidth, 5e-6, fused, half, network)


# Vendors' data sheets; 32-bit products as jax makes them by default: TF32 on H100 and A100, bfloat16 on TPUs. Networks:
# NVLink and the links between TPU chips, what one device receives. v4's are of a core, half a chip.
NAMED = {
    "h100": _published(989e12, 494e12, 3.35e12, True, 450e9),
    "h200": _published(989e12, 494e12, 4.8e12, True, 450e9),
    "a100": _published(312e12, 156e12, 2.04e12, True, 300e9),
    "t4": _published(65e12, 8.1e12, 0.32e12, False),
    "v4": _published(137e12, 137e12, 0.61e12, True, 75e9),
    "v5e": _published(197e12, 197e12, 0.82e12, True, 200e9),
    "v5p": _published(459e12, 459e12, 2.77e12, True, 600e9),
    "v6e": _published(918e12, 918e12, 1.64e12, True, 400e9),
}
T4 = 0.75 * 16e9
"""The bytes that jax takes of a T4's memory, which is no target to compile for."""


def of_device(name: str | None = None) -> tuple[str, Rates]:
    """What to call a device, and its rates: from the table, or measured once and kept in the cache folder.

    `None` is the device that jax computes on; "cpu" is this machine's. Raises `UserError` for a name that is not known.
    """
    backend = jax.default_backend()
    if name in NAMED:
        return f"one {name.upper()}", NAMED[name]
    if name not in (None, "cpu", backend):
        raise unknown("device", name, dict.fromkeys([*NAMED, "cpu", backend]))
    kind = name or backend
    return ("this CPU" if kind == "cpu" else f"this {jax.devices(kind)[0].device_kind}"), _measured(kind)


def memory(name: str | None = None) -> float | None:
    """The bytes of a device's memory that programs can have, where they are known: of a GPU, jax's pool."""
    if name in targets.TARGETS:
        return targets.of(name).memory
    if name == "t4":
        return T4
    kind = name or jax.default_backend()
    if kind == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return (jax.devices(kind)[0].memory_stats() or {}).get("bytes_limit")


def _measured(kind: str) -> Rates:
    device = jax.devices(kind)[0]
    key = f"{device.device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    path = files.home() / "calibration.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if set(known.get(key, ())) != {field.name for field in fields(Rates)}:
        with jax.default_device(device):
            known[key] = asdict(calibrate())
        files.write_json(path, known)
    return Rates(**known[key])


def calibrate() -> Rates:
    """Rates of the default device, in a few seconds: products, convolutions of the sizes that networks have, and
    a copy.

    They take turns, and the best time of each counts: what else the machine does is left out as far as can be.
    """
    draw = np.random.default_rng(0).standard_normal  # jax would compile a program for every shape
    random = lambda *shape, dtype=jnp.float32: jnp.asarray(draw(shape, np.float32).astype(dtype))
    product, convolution = jax.jit(_product), jax.jit(_convolution)
    half, single, big = random(SIDE, SIDE, dtype=jnp.bfloat16), random(SIDE, SIDE), random(1 << 24)
    programs: dict[Any, Any] = {
        "products16": (lambda: product(half, half), 2 * SIDE**3),
        "products32": (lambda: product(single, single), 2 * SIDE**3),
        "bandwidth": (functools.partial(jax.jit(lambda x: 1.5 * x), big), 2 * big.nbytes),
        "launch": (functools.partial(jax.jit(_chain), random(8, 8)), LINKS),
    }
    for side, c in CONVOLUTIONS:
        for bits, dtype in CONVOLVED.items():
            x, w = random(1, side, side, c, dtype=dtype), random(3, 3, c, c, dtype=dtype)
            programs[bits, side] = functools.partial(convolution, x, w), 2 * 9 * (side * c) ** 2
    best = _best({name: program for name, (program, _) in programs.items()})
    speed = {name: work / best[name] for name, (_, work) in programs.items()}
    keys = {bits: [(bits, side) for side, _ in CONVOLUTIONS] for bits in CONVOLVED}
    half, single = (sum(programs[k][1] for k in of) / sum(best[k] for k in of) for of in keys.values())
    products = speed["products16"], speed["products32"]
    return Rates(*products, single, speed["bandwidth"], 1 / speed["launch"], convolutions16=half)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _convolution(x: jax.Array, w: jax.Array) -> jax.Array:
    return convolve(x, w, padding=((1, 1), (1, 1)))


def _chain(x: jax.Array) -> jax.Array:
    """Small products, each waiting for the one before."""
    for _ in range(LINKS):
        x = jnp.sin(x @ x)
    return x


def _best(programs: dict[Any, Callable[[], jax.Array]]) -> dict[Any, float]:
    """The shortest time of each, in seconds, compiled before."""
    best = dict.fromkeys(programs, float("inf"))
    for turn in range(ROUNDS + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program())
            if turn:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best
