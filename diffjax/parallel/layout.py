"""How the state and the batches of training lie on devices: a mesh, and rules by name for every network we train.

The mesh has three axes. `replica`: each has a whole copy of the state. `data`: each has other examples, and a part of
the state (FSDP; ZeRO stage 3, Rajbhandari et al. 2020). `model`: each has the same examples and a part of every large
product (Megatron, Shoeybi et al. 2019, section 3): what splits a hidden layer's outputs is followed by a product that
is split by its inputs, so that a pair needs one sum over devices. Devices of one host stand together, and the last axis
changes fastest.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from diffjax.parallel.devices import Rule, shard_by_rules
from diffjax.parallel.sharding import rules_of
from diffjax.utils.errors import UserError

AXES = ("replica", "data", "model")

OUTPUTS = r"/((to_|add_)?[qkv](_proj)?|gate|up|net_0_proj|ff_in|conv1|time_emb_proj)/(kernel|bias)$"
INPUTS = r"/(to_out_0|to_add_out|out|down|net_2|ff_out|conv2|\w+_linear|adapt(_out|_last)?)/kernel$"
RULES: dict[str, tuple[Rule, ...]] = {"data": ()} | rules_of(OUTPUTS, INPUTS)
"""The rules of each mode; a moment or an average of a parameter has its name, and so its place."""

HOST = "pinned_host"
"""Memory of a host that its devices reach."""

OFFLOADED = re.compile(r"^(ema|optimizer)/")
"""What of a state can lie in the memory of hosts: what a step needs only as it ends."""


def mesh(mode: str, replicas: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """The devices (all of them by default) as a mesh of the axes `AXES`, of which `replicas` parts have a copy each.

    "data" has a copy on every device. "both" takes for `model` the largest number of devices that divides a copy's,
    is at most its root, and fits one host. Raises `UserError` for numbers that do not divide.
    """
    chosen = sorted(jax.devices() if devices is None else devices, key=lambda one: (one.process_index, one.id))
    count = len(chosen)
    if mode == "data":
        if replicas != 1:
            raise UserError("train.shard=data has a copy on every device: leave train.replicas at 1, or take fsdp")
        return Mesh(np.asarray(chosen).reshape(count, 1, 1), AXES)
    if count % replicas:
        raise UserError(f"train.replicas={replicas} does not divide {count} devices: choose a divisor")
    part, local = count // replicas, count // len({one.process_index for one in chosen})
    models = {"fsdp": 1, "tensor": part, "both": _root(part, local)}[mode]
    if mode == "both" and models == 1:
        raise UserError(f"train.shard=both cannot split {part} devices in two ways: take fsdp or tensor")
    if math.gcd(models, local) not in (models, local):
        raise UserError(f"parts of {models} devices do not fit hosts of {local}: choose another train.replicas")
    return Mesh(np.asarray(chosen).reshape(replicas, part // models, models), AXES)


def _root(count: int, local: int) -> int:
    return max(size for size in range(1, math.isqrt(count) + 1) if count % size == 0 and local % size == 0)


def places(tree: Any, rules: Sequence[Rule], over: Mesh, offload: bool = False) -> Any:
    """Where a state lies, or a part of one: `shard_by_rules`, and with `offload` the arrays of `OFFLOADED` in the
    memory of hosts.
    """

    def kept(path: Any, leaf: Any, place: NamedSharding) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        hosted = offload and leaf.ndim and OFFLOADED.search(name)
        return place.with_memory_kind(HOST) if hosted else place

    return jax.tree_util.tree_map_with_path(kept, tree, shard_by_rules(tree, rules, over))


def is_hosted(place: Sharding) -> bool:
    """Whether an array of this sharding lies in the memory of hosts."""
    return place.memory_kind == HOST


def fetch(leaf: jax.Array) -> jax.Array:
    """The array in its devices' own memory, wherever it lies."""
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) if is_hosted(leaf.sharding) else leaf


def rows(over: Mesh) -> NamedSharding:
    """Where the rows of a batch lie: split over every axis but `model`."""
    return NamedSharding(over, PartitionSpec(tuple(name for name in over.axis_names if name != "model")))


def parts(over: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(size for name, size in over.shape.items() if name != "model")


def share(over: Mesh) -> tuple[int, int]:
    """(i, n): this process reads part i of n equal ones of every batch; processes of one `model` axis read the same."""
    number = parts(over)
    places = rows(over).addressable_devices_indices_map((number,))
    own = sorted({index[0].indices(number)[0] for index in places.values() if index})
    return own[0] // len(own), number // len(own)


def check_batch(batch: int, accumulate: int, over: Mesh) -> None:
    """Raises `UserError` for a batch that cannot be split over the mesh into so many micro-batches."""
    count = parts(over)
    if batch % (accumulate * count):
        raise UserError(
            f"train.batch {batch} cannot be split into {accumulate} micro-batches on {count} devices: choose a "
            f"multiple of {accumulate * count}"
        )


def shard_batch(batch: Any, over: Mesh) -> Any:
    """This host's part of a batch, leaves (b, ...), as global arrays split as `rows` says.

    Raises `UserError` when b is no multiple of this host's parts.
    """
    (_, shares), placed = share(over), rows(over)
    size, local = len(jax.tree.leaves(batch)[0]), parts(over) // shares
    if size % local:
        raise UserError(f"a batch of {size} cannot be split over {local} devices: choose a multiple of {local}")
    whole = lambda x: (shares * size, *x.shape[1:])
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(placed, np.asarray(x), whole(x)), batch)


def here(over: Mesh) -> Mesh:
    """This host's devices alone, along `model` where the mesh has more than one there, else along `data`."""
    local = over.local_devices
    shape = (1, 1, len(local)) if over.shape["model"] > 1 else (1, len(local), 1)
    return Mesh(np.asarray(local).reshape(shape), AXES)
