"""Several hosts at one job, as jax.distributed joins them: who decides, what all of them know, and who is gone.

What happens once for all hosts is done by the first one (`first`), which tells the others how it went: they never look
at the same folder at different moments. Every function here but `watch` must be called by all hosts, in the same order.
"""

import collections
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.utils.errors import UserError

T = TypeVar("T")

HEARTBEAT = 20
"""Seconds without a sign of life after which a host is taken to be dead."""

LOOK, GRACE = 2.0, 10.0
"""Seconds between two looks at who is there; and for hosts that end together to say so."""

PATIENCE = 86_400_000
"""Milliseconds for which hosts wait for the first one: it may be fetching a data set."""

LAG = 2
"""Steps that a host may be ahead of the devices."""

_numbers = itertools.count()
_over = threading.Event()


def count() -> int:
    """The number of hosts: 1 unless `join` was called."""
    return _state().num_processes if _client() else 1


def index() -> int:
    """The number of this host; 0 is the first."""
    return _state().process_id if _client() else 0


def join(address: str | None = None, number: int | None = None, place: int | None = None) -> None:
    """Join the other hosts (None: as jax finds out by itself), and end this process once one of them is gone.

    Raises what `jax.distributed.initialize` raises.
    """
    jax.config.update("jax_enable_recoverability", True)  # else jax ends all hosts before their names are said
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is `interrupt`'s
    jax.distributed.initialize(address, number, place, heartbeat_timeout_seconds=HEARTBEAT)
    _client().key_value_set(f"diffjax/name/{index()}", socket.gethostname())
    names = [_client().blocking_key_value_get(f"diffjax/name/{i}", PATIENCE) for i in range(count())]
    if index() == 0 and count() > 1:
        print(f"hosts: {', '.join(f'{i} {name}' for i, name in enumerate(names))}", file=sys.stderr)
    threading.Thread(target=watch, args=(names,), daemon=True, name="hosts").start()


def watch(names: list[str]) -> None:
    """Look who is there, and end this process when one is gone before the job is over."""
    while not _over.wait(LOOK):
        try:
            alive = _client().get_live_nodes(list(range(len(names))))
        except (RuntimeError, ValueError, AttributeError):  # the first host keeps the list: without it, jax ends us
            continue
        gone = [f"{names[i]} (process {i})" for i in range(len(names)) if i not in alive]
        if gone and not _over.wait(GRACE):
            line = f"diffjax: host {', '.join(gone)} is gone: start all hosts again, the same command goes on\n"
            os.write(2, line.encode())
            os._exit(1)


def leave(failed: bool = False) -> None:
    """The end of a command: all hosts end together, the first one last; one that has `failed` waits for the others no
    longer than `GRACE`.
    """
    if count() == 1:
        return
    try:
        _client().wait_at_barrier("diffjax/end", int(1000 * (GRACE - LOOK)) if failed else PATIENCE)
    except (RuntimeError, ValueError):
        time.sleep(0 if failed else 2 * GRACE)  # until it is said who is gone
    _over.set()
    if index():
        jax.distributed.shutdown()
        return
    with contextlib.suppress(RuntimeError, ValueError):
        for _ in range(int(GRACE / 0.1)):
            if len(_client().get_live_nodes(list(range(count())))) == 1:
                break
            time.sleep(0.1)
    time.sleep(LOOK)  # the last of them still waits for the answer to its good-bye


def blame() -> None:
    """Wait until it is known whether an error comes from a host that is gone: then this process ends, saying so."""
    if count() > 1:
        time.sleep(HEARTBEAT + LOOK + GRACE + 2)


def first(function: Callable[[], T]) -> T:
    """What `function`, which only the first host calls, returns there: something that JSON can say.

    Its `UserError` is raised on all hosts.
    """
    if count() == 1:
        return function()
    key = f"diffjax/first/{next(_numbers)}"
    if index():
        said = json.loads(_client().blocking_key_value_get(key, PATIENCE))
        if "error" in said:
            raise UserError(said["error"])
        return said["value"]
    try:
        value = function()
    except UserError as error:
        _client().key_value_set(key, json.dumps({"error": str(error)}))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def in_turn(function: Callable[[], T]) -> T:
    """What `function` returns here; the first host calls it alone, then all others."""
    made: list[T] = []
    first(lambda: made.append(function()))
    return made[0] if made else function()


def meet() -> None:
    """Wait until all hosts are here, however long that takes."""
    if count() > 1:
        _client().wait_at_barrier(f"diffjax/meet/{next(_numbers)}", PATIENCE)


def everywhere(true: bool) -> bool:
    """Whether it is true on every host."""
    if count() == 1:
        return true
    key = f"diffjax/all/{next(_numbers)}"
    _client().key_value_set(f"{key}/{index()}", str(int(true)))
    return all(_client().blocking_key_value_get(f"{key}/{i}", PATIENCE) == "1" for i in range(count()))


def say(line: str) -> None:
    """Print a line, on the first host alone."""
    if index() == 0:
        print(line)


def spread(tree: Any) -> bool:
    """Whether some of its arrays are not all on this host's devices."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))


def whole(leaf: jax.Array) -> np.ndarray:
    """An array that is spread over hosts, whole, on each of them."""
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def total(own: np.ndarray) -> np.ndarray:
    """The sum over hosts of an array that each has in the same shape."""
    return own if count() == 1 else np.asarray(multihost_utils.process_allgather(own)).sum(0, dtype=own.dtype)


class Vote:
    """Whether any host has asked for something, which all of them hear after the same step."""

    def __init__(self):
        whole = Mesh(np.asarray(jax.devices()), ("all",))
        self._split = NamedSharding(whole, PartitionSpec("all"))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(whole, PartitionSpec()))
        self._cast: collections.deque[jax.Array] = collections.deque()

    def ask(self, wanted: bool) -> bool:
        """Take this host's vote after a step; what all hosts said `LAG` steps ago."""
        if count() == 1:
            return wanted
        own = np.full(jax.local_device_count(), wanted, np.int32)
        self._cast.append(self._any(jax.make_array_from_process_local_data(self._split, own)))
        return len(self._cast) > LAG and bool(self._cast.popleft())


def _state() -> Any:
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _state().client
