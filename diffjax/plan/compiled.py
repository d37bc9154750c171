"""Programs as the compiler of their devices makes them: memory, what devices send each other, the largest tensors."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from diffjax.parallel import layout
from diffjax.plan import hlo
from diffjax.plan.cost import Part, tree_bytes
from diffjax.utils.errors import UserError

GIB = 2**30

NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED")
NEEDED = re.compile(r"\(?([\d.]+)([GM])\)? (?:exceeds available HBM|of [\d.]+[GM] hbm)|Used ([\d.]+)([GM]) of")
TILES = {"xla_gpu_enable_triton_gemm": False}
"""What lets small products compile where XLA finds no tiles for them."""


@dataclass(frozen=True)
class Compiled:
    """One call of a part on one device, in bytes: what it holds, what it needs beside that, what comes from other
    devices by kind of collective and how much of it while the device works on a product, the slices of stacked weights
    that loops copy, and its largest tensors (shape, bytes, where they arise).

    Where the compiler stops because memory is short, it says no more than how much would be needed in all.
    """

    held: int
    temporary: int
    collectives: Counter[str] = field(default_factory=Counter)
    overlapped: int = 0
    copied: int = 0
    largest: Sequence[tuple[str, int, str]] = ()
    hosted: int = 0

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return self.held + self.temporary


def compile_part(part: Part, devices: Sequence[Any]) -> Compiled:
    """A part compiled for devices: split over them where it can be, else for one of them.

    Raises `UserError` where the compiler stops for another reason than memory, and for what lies in the memory of the
    hosts of GPUs, which jax does not know of devices that are absent.
    """
    if part.hosted and devices[0].platform == "gpu":
        raise UserError("train.offload is compiled for no GPU that is not here: leave --compile out")
    function, held, given = part.over(devices) if part.over else alone(part, devices[0])
    leaves = jax.tree.leaves(held)
    hosted = sum(_shard_bytes(leaf) for leaf in leaves if layout.is_hosted(leaf.sharding))
    own = sum(map(_shard_bytes, leaves)) - hosted
    lowered = function.lower(held, *given)
    try:
        program = _compiled(lowered, devices[0].platform)
    except jax.errors.JaxRuntimeError as error:
        if not NO_ROOM.search(str(error)):
            line = str(error).strip().splitlines()[0][:200]
            raise UserError(f"the compiler of {devices[0].device_kind} stops at {part.name}: {line}") from error
        return Compiled(own, max(0, _said(str(error)) - own), hosted=hosted)
    read = hlo.read(program.as_text())
    moved = hlo.collectives(read, len(devices)), hlo.overlapped(read, len(devices))
    more = _needed(program.memory_analysis()) - own
    return Compiled(own, max(0, more), *moved, hlo.copied(read), hlo.largest(read), hosted)


def _needed(memory: Any) -> int:
    """The bytes of a device that a program needs. Where something is in the memory of its host, the sum of all
    temporaries, among them what is fetched one after the other, is more than the most at once, in which the compiler
    counts what the host holds.
    """
    if memory.host_argument_size_in_bytes:
        return memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new + memory.temp_size_in_bytes


def _compiled(lowered: Any, platform: str) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if platform != "gpu" or "tile" not in str(error):
            raise
        return lowered.compile(TILES)


def _said(text: str) -> int:
    """The bytes that an error of a TPU's compiler says are needed."""
    found = NEEDED.search(text)
    if not found:
        return 0
    number, unit = [group for group in found.groups() if group]
    return int(float(number) * {"G": GIB, "M": 2**20}[unit])


def _shard_bytes(leaf: Any) -> int:
    return tree_bytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))


def alone(part: Part, device: Any) -> tuple[Callable[..., Any], PyTree, tuple[Any, ...]]:
    """The program of one device, as sampling runs it on each, and its arguments there."""
    mesh, whole = Mesh(np.asarray([device]), ("data",)), PartitionSpec()
    call = jax.shard_map(part.call, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    there = lambda tree: placed(tree, NamedSharding(mesh, whole))
    return jax.jit(call, donate_argnums=0 if part.replaces else ()), there(part.held), there(part.given)


def placed(tree: PyTree, sharding: Any) -> PyTree:
    """Shapes with a sharding, one for all leaves or a tree of them."""
    at = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: at(leaf, sharding), tree)
    return jax.tree.map(at, tree, sharding)
