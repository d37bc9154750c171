"""Batches for training: batch number k of a seed is a pure function of k, which grain computes ahead of time.

Position p of the endless stream of examples is a record of an order that is drawn anew from (seed, epoch) for every
pass over the data; its crop, flip and caption are drawn from (seed, p). Batch k of size B holds positions k B to
(k + 1) B - 1, of which each process takes its equal, contiguous part: the whole batch is the same for any number of
processes, threads and workers, and the state of the stream is k.
"""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64, UInt8

from diffjax.data.images import colour, decode
from diffjax.data.records import Records
from diffjax.data.skipped import Skipped
from diffjax.utils.errors import UserError

Batch = dict[str, Any]
Read = TypeVar("Read")
Tokenize = Callable[[list[str]], dict[str, np.ndarray]]
Changes = dict[str, tuple[Any, Any]]

CACHE_BYTES = 512 * 2**20
MOST_UNREADABLE_IN_A_ROW = 100
MIDDLE = (0.5, 0.5)
WAIT_SECONDS, CLOSE_SECONDS = 0.1, 10.0


class Example(NamedTuple):
    """A decoded picture with its captions, class (-1: none) and record number."""

    image: UInt8[np.ndarray, "h w c"]
    captions: tuple[str, ...]
    label: int
    index: int


class Pictures:
    """Decoded examples by record number.

    A record that cannot be read is replaced by the next one that can, and named in `skipped`. Pictures are kept decoded
    when all of them fit `CACHE_BYTES` and are always cropped alike.
    """

    def __init__(self, records: Records, config: Any, channels: int, skipped: Skipped):
        self._records, self._skipped = records, skipped
        shape = (config.size, config.size, channels)
        self._decoding = {
            "size": config.size,
            "channels": channels,
            "background": colour(config.background),
            "enlarge": config.enlarge,
        }
        self.labelled = bool(records.class_names)
        self._unreadable: set[int] = set()
        self.cached = config.crop == "center" and len(records) * np.prod(shape) <= CACHE_BYTES
        self._cache: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index: int, at: tuple[float, float] = MIDDLE) -> Example:
        """Record `index`, cropped at `at` (see `images.decode`), or the next one that can be read."""
        tries = min(len(self), MOST_UNREADABLE_IN_A_ROW)
        for candidate in range(index, index + tries):
            found = self._try(candidate % len(self), at)
            if found is not None:
                return found
        raise UserError(f"{tries} records in a row from {index} cannot be read; {self._skipped.path} says why")

    def captions(self, index: int) -> tuple[str, ...]:
        """Record `index`'s captions; none when it cannot be read."""
        record = self._guarded(index, lambda: self._records[index])
        return record.captions if record else ()

    def _try(self, index: int, at: tuple[float, float]) -> Example | None:
        if index in self._cache or index in self._unreadable:
            return self._cache.get(index)
        example = self._guarded(index, lambda: self._decode(index, at))
        if self.cached and example:
            self._cache[index] = example
        return example

    def _decode(self, index: int, at: tuple[float, float]) -> Example:
        record = self._records[index]
        return Example(decode(record.picture, at=at, **self._decoding), record.captions, record.label, index)

    def _guarded(self, index: int, read: Callable[[], Read]) -> Read | None:
        """What `read` returns, or None once the record is noted as unreadable."""
        try:
            return read()
        except UserError:
            raise
        except Exception as error:
            self._unreadable.add(index)
            self._skipped.add([(f"record {index}", f"cannot be read: {error}")])
            logging.getLogger("diffjax").warning("record %d cannot be read; see %s", index, self._skipped.path)
            return None


def choose_caption(captions: tuple[str, ...], config: Any, rng: np.random.Generator) -> str:
    """One caption ("" if there is none), without some of its tags, inside one of the templates.

    Tags are what commas separate; each but the first is left out with probability `tag_dropout`.
    """
    if not captions:
        return ""
    caption = captions[0] if config.caption == "first" else captions[rng.integers(len(captions))]
    if config.tag_dropout:
        first, *tags = caption.split(",")
        caption = ",".join([first, *(tag for tag in tags if rng.random() >= config.tag_dropout)])
    return config.templates[rng.integers(len(config.templates))].replace("{}", caption)


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    return np.random.default_rng((seed, epoch, 1)).permutation(count)


class _BatchSource:
    """`source[k]` is this process's part of batch k."""

    def __init__(
        self,
        pictures: Pictures,
        config: Any,
        batch_size: int,
        seed: int,
        tokenize: Tokenize | None,
        shard: tuple[int, int],
    ):
        self._pictures, self._config, self._tokenize = pictures, config, tokenize
        self._batch_size, self._seed = batch_size, seed
        self._shard, self._shards = shard

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        rows = self._batch_size // self._shards
        start = index * self._batch_size + self._shard * rows
        examples, captions = zip(*(self._view(position) for position in range(start, start + rows)), strict=True)
        batch = {
            "image": np.stack([example.image for example in examples]),
            "index": np.array([example.index for example in examples], np.int64),
        }
        if self._pictures.labelled:
            batch["label"] = np.array([example.label for example in examples], np.int32)
        return batch | self._tokenize(list(captions)) if self._tokenize else batch

    def _view(self, position: int) -> tuple[Example, str]:
        rng = np.random.default_rng((self._seed, position))
        at = tuple(rng.random(2)) if self._config.crop == "random" else MIDDLE
        epoch, offset = divmod(position, len(self._pictures))
        example = self._pictures.example(int(_order(len(self._pictures), self._seed, epoch)[offset]), at)
        if self._config.flip and rng.random() < 0.5:
            example = example._replace(image=example.image[:, ::-1])
        return example, choose_caption(example.captions, self._config, rng) if self._tokenize else ""


def _follow_the_parent(worker: int, workers: int) -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started here never hear of Ctrl-C, not even before `_follow_the_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Batches:
    """The endless stream of batches; `get_state` before a batch and `set_state` later give that batch again.

    A batch is a dict of arrays: `image` uint8 (b, h, w, c), `index` int64 (b,) the record numbers, `label` int32 (b,)
    where the data has classes, and whatever `tokenize` made of the captions.
    """

    def __init__(self, source: _BatchSource, workers: int, threads: int, identity: dict[str, Any]):
        self._source, self._workers, self._threads, self._identity = source, workers, threads, identity
        self._number = 0
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            with _without_interrupts():
                self._iterator = self._start()
                batch = next(self._iterator)
        else:
            batch = next(self._iterator)
        self._number += 1
        if self._workers:  # out of the shared memory that the worker would otherwise have to keep
            batch = {name: np.array(values) for name, values in batch.items()}
        return batch

    def _start(self) -> Iterator[Batch]:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        ahead = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        batches = grain.MapDataset.source(self._source)[self._number :].to_iter_dataset(ahead)
        if self._workers:
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options, worker_init_fn=_follow_the_parent)
        return iter(batches)

    def get_state(self) -> bytes:
        """JSON: the number of the next batch, and what it depends on."""
        return json.dumps(self._identity | {"batch": self._number}).encode()

    def set_state(self, state: bytes, allow_change: bool = False) -> Changes:
        """Go on where `get_state` was: at that batch, or of another batch size at about as many examples.

        Returns what differs, by name, as it was and as it is. Raises `UserError` when data, seed or batch size differ
        and that is not allowed.
        """
        there = json.loads(state)
        number = there.pop("batch")
        both = sorted(there.keys() & self._identity.keys())
        found = {name: (there[name], self._identity[name]) for name in both if there[name] != self._identity[name]}
        if found and not allow_change:
            told = "; ".join(f"{name} was {old} and is {new}" for name, (old, new) in found.items())
            raise UserError(
                f"these are not the data that the checkpoint was trained on: {told}; "
                "put them back, train in a new --workdir, or go on with these by --allow-change"
            )
        self.close()
        self._number = number * there["batch_size"] // self._identity["batch_size"]
        return found

    def close(self) -> None:
        """Stop the threads and worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def batches(
    pictures: Pictures,
    config: Any,
    batch_size: int,
    seed: int,
    tokenize: Tokenize | None,
    shard: tuple[int, int],
    identity: dict[str, Any],
) -> Batches:
    """The stream of `batch_size // shard[1]` rows a batch for process `shard[0]` of `shard[1]`.

    Pictures kept decoded need no decoding ahead: for them `config.workers` starts none.
    """
    if batch_size < 1 or batch_size % shard[1]:
        raise UserError(f"the batch size {batch_size} cannot be shared equally by {shard[1]} processes; change it")
    source = _BatchSource(pictures, config, batch_size, seed, tokenize, shard)
    workers = 0 if pictures.cached else config.workers
    threads = 0 if pictures.cached else 1 if workers else min(8, os.cpu_count() or 1)
    return Batches(source, workers, threads, identity | {"seed": seed, "batch_size": batch_size})


class Prefetch:
    """Batches made and placed on the devices by a thread, `depth` ahead; the state is that of the batch not yet taken.

    `place` takes a batch to the devices. What the thread raises, `next` and `peek` raise; the next `next` tries that
    batch again.
    """

    def __init__(self, batches: Batches, place: Callable[[Batch], Any], depth: int = 2):
        self._batches, self._place, self._depth = batches, place, depth
        self._state = batches.get_state()
        self._head: tuple[Any, bytes, BaseException | None] | None = None
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        placed, self._state = self._first()
        self._head = None
        return placed

    def peek(self) -> Any:
        """The next batch, which `next` will give too."""
        return self._first()[0]

    def _first(self) -> tuple[Any, bytes]:
        """The next batch and the state after it."""
        self.wait()
        assert self._head is not None
        placed, state, error = self._head
        if error is not None:
            self.set_state(self._state)
            raise error
        return placed, state

    def wait(self, leave: Callable[[], bool] = lambda: False) -> bool:
        """Whether the next batch is ready: wait for it, unless `leave()` says not to, now or while waiting."""
        if self._thread is None:
            self._queue: queue.Queue = queue.Queue(self._depth)
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._fill, args=(self._queue, self._stop), daemon=True)
            self._thread.start()
        while not leave():
            if self._head is None:
                try:
                    self._head = self._queue.get(timeout=WAIT_SECONDS)
                except queue.Empty:
                    continue
            return True
        return False

    def _fill(self, ready: queue.Queue, stop: threading.Event) -> None:
        with _without_interrupts():
            self._fill_until(ready, stop.is_set)

    def _fill_until(self, ready: queue.Queue, stopped: Callable[[], bool]) -> None:
        item: tuple = ()
        while not stopped() and not (item and item[2]):
            try:
                placed = self._place(next(self._batches))
                item = (placed, self._batches.get_state(), None)
            except BaseException as error:
                item = (None, None, error)
            while not stopped():
                try:
                    ready.put(item, timeout=WAIT_SECONDS)
                    break
                except queue.Full:
                    pass

    def _join(self, seconds: float | None = None) -> bool:
        """Whether the thread has stopped, within so many seconds."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread, self._head = None, None
        return True

    def get_state(self) -> bytes:
        """As `Batches.get_state`, for the next batch that `next` will give."""
        return self._state

    def set_state(self, state: bytes, allow_change: bool = False) -> Changes:
        """As `Batches.set_state`; batches made ahead are dropped."""
        self._join()
        found = self._batches.set_state(state, allow_change)
        self._state = self._batches.get_state()
        return found

    def close(self) -> None:
        """Stop the thread, then the batches; batches made ahead are made again when asked for.

        A thread that hangs, in a file system that does not answer for example, is left behind.
        """
        if self._join(CLOSE_SECONDS):
            self.set_state(self._state)
            self._batches.close()
