"""One step function on all devices: `jit` over sharded batches, or `pmap`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.parallel import devices
from diffjax.train.state import State, flat, typed
from diffjax.train.step import Batch, Step


class Parallel(NamedTuple):
    """`place` a state (numpy or device leaves) and `feed` this host's batch to where `step` wants them; `gather` one
    copy back.

    `step(state, batch) -> (state, metrics)` frees the state that it is given.
    """

    place: Callable[[State], State]
    feed: Callable[[dict[str, np.ndarray]], Batch]
    step: Callable[[State, Batch], tuple[State, dict[str, Any]]]
    gather: Callable[[State], State]


def by_jit(step: Step, mesh: Mesh) -> Parallel:
    """The step compiled once for a replicated state and batches split over the mesh's axis `data`."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Parallel(
        place=lambda state: typed(devices.replicate(jax.device_get(flat(state)), mesh)),
        feed=lambda batch: devices.shard_batch(batch, mesh),
        step=jax.jit(step, donate_argnums=0, out_shardings=everywhere),
        gather=lambda state: state,
    )


def by_pmap(step: Step, mesh: Mesh) -> Parallel:
    """The step mapped over a leading axis of this host's devices: every leaf of the state is there once for each."""
    local = mesh.local_devices
    own = Mesh(np.asarray(local), ("data",))
    split = NamedSharding(own, PartitionSpec("data"))

    def replicate(leaf: np.ndarray) -> jax.Array:
        return jax.device_put(np.broadcast_to(leaf, (len(local), *leaf.shape)), split)

    def feed(batch: dict[str, np.ndarray]) -> Batch:
        return jax.tree.map(lambda x: x.reshape(len(local), -1, *x.shape[1:]), devices.shard_batch(batch, own))

    mapped = jax.pmap(
        lambda state, batch: step(state, batch, axis_name="data"),
        axis_name="data",
        out_axes=(0, None),
        donate_argnums=0,
        devices=None if jax.process_count() > 1 else local,
    )
    return Parallel(
        place=lambda state: typed(jax.tree.map(replicate, jax.device_get(flat(state)))),
        feed=feed,
        step=mapped,
        gather=lambda state: typed(jax.device_get(jax.tree.map(lambda leaf: leaf[0], flat(state)))),
    )
