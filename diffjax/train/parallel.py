"""One step function on all devices: `jit` over sharded batches and states, or `pmap`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from diffjax.parallel import devices, hosts, layout
from diffjax.parallel.devices import Rule
from diffjax.train.state import State
from diffjax.train.step import Batch, Step


class Parallel(NamedTuple):
    """How a step runs on devices.

    `create(function, *arguments)` computes a tree (a state, or parameters) and `place` takes one from the host to where
    `step` wants it; `feed` takes this host's part of a batch, which is `share = (i, n)`: number i of n equal ones.
    `step(state, batch) -> (state, metrics)` frees the state that it is given. `gather` has one copy of each leaf, as
    checkpoints take it; `own` (called by all hosts) has it on this host's devices alone, for what one host computes.
    """

    create: Callable[..., Any]
    place: Callable[[PyTree], PyTree]
    feed: Callable[[dict[str, np.ndarray]], Batch]
    step: Callable[[State, Batch], tuple[State, dict[str, Any]]]
    gather: Callable[[PyTree], PyTree]
    own: Callable[[PyTree], PyTree]
    share: tuple[int, int]


def by_jit(step: Step, mesh: Mesh, rules: Sequence[Rule] = (), offload: bool = False) -> Parallel:
    """The step compiled once for a state that lies as `layout.places` says (whole on every device without rules) and
    batches that are split over all axes of the mesh but `model`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = functools.partial(layout.places, rules=rules, over=mesh, offload=offload)

    def constrained(tree: PyTree) -> PyTree:
        tree = jax.lax.with_sharding_constraint(tree, devices.shard_by_rules(tree, rules, mesh))
        return moved(tree, layout.HOST)

    def moved(tree: PyTree, kind: str) -> PyTree:
        """What can lie in the memory of hosts, in memory of that kind."""

        def move(leaf: Any, place: NamedSharding) -> Any:
            return jax.device_put(leaf, place.with_memory_kind(kind)) if layout.is_hosted(place) else leaf

        return jax.tree.map(move, tree, places(tree))

    def stepped(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            state, metrics = step(moved(state, "device"), batch)
        return constrained(state), jax.lax.with_sharding_constraint(metrics, everywhere)

    def create(function: Callable[..., Any], *arguments: Any) -> Any:
        return jax.jit(lambda *given: constrained(function(*given)))(*arguments)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    def place(tree: PyTree) -> PyTree:
        shardings = places(tree)  # of a key, not of its bits, which stay together
        return _plainly(lambda plain: jax.tree.map(put, plain, shardings), tree)

    def own(tree: PyTree) -> PyTree:
        if not hosts.spread(tree):
            return jax.tree.map(layout.fetch, tree)
        here = layout.here(mesh)
        return jax.tree.map(put, jax.tree.map(hosts.whole, tree), devices.shard_by_rules(tree, rules, here))

    return Parallel(
        create=create,
        place=place,
        feed=lambda batch: layout.shard_batch(batch, mesh),
        step=jax.jit(stepped, donate_argnums=0),
        gather=lambda tree: tree,
        own=own,
        share=layout.share(mesh),
    )


def by_pmap(step: Step, mesh: Mesh) -> Parallel:
    """The step mapped over a leading axis of this host's devices: every leaf of the state is there once for each."""
    local = mesh.local_devices
    own = Mesh(np.asarray(local), ("data",))
    split = NamedSharding(own, PartitionSpec("data"))

    def replicate(leaf: np.ndarray) -> jax.Array:
        return jax.device_put(np.broadcast_to(leaf, (len(local), *leaf.shape)), split)

    def place(tree: PyTree) -> PyTree:
        return _plainly(lambda plain: jax.tree.map(replicate, plain), tree)

    def feed(batch: dict[str, np.ndarray]) -> Batch:
        return jax.tree.map(lambda x: x.reshape(len(local), -1, *x.shape[1:]), layout.shard_batch(batch, own))

    mapped = jax.pmap(
        lambda state, batch: step(state, batch, axis_name="data"),
        axis_name="data",
        out_axes=(0, None),
        donate_argnums=0,
        devices=None if jax.process_count() > 1 else local,
    )

    def gather(tree: PyTree) -> PyTree:
        return _plainly(lambda plain: plain, jax.tree.map(lambda leaf: leaf[0], tree))

    return Parallel(
        create=lambda function, *arguments: place(jax.jit(function)(*arguments)),
        place=place,
        feed=feed,
        step=mapped,
        gather=gather,
        own=gather,
        share=(jax.process_index(), jax.process_count()),
    )


def _plainly(function: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """`function` of the tree in numpy arrays, keys as their bits, which are keys again afterwards."""
    is_key = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), tree)
    bits = jax.tree.map(lambda leaf, key: jax.random.key_data(leaf) if key else leaf, tree, is_key)
    done = function(jax.device_get(bits))
    return jax.tree.map(lambda leaf, key: jax.random.wrap_key_data(leaf) if key else leaf, done, is_key)
