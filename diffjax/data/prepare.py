"""Preparing a TFDS builder once, whole or not at all."""

import contextlib
import errno
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from diffjax.utils.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) as they are done; few more than so many are begun at a time, and none once nobody asks."""
    waiting, pool = iter(items), ThreadPoolExecutor(threads)
    running: dict = {}
    try:
        while True:
            running |= {pool.submit(work, item): item for item in itertools.islice(waiting, 2 * threads - len(running))}
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what TFDS prints: our own builders show one bar instead."""
    import tensorflow_datasets as tfds

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)


def prepared(
    make_builder: Callable[[], Any], before: Callable[[], None] = lambda: None, quiet: bool = True, download: Any = None
) -> Any:
    """A builder whose array_record files are on disk, written now if they were not; `before()` is called then.

    `make_builder` returns a fresh builder; `download` is TFDS's `DownloadConfig`, where it is another one. TFDS writes
    to a temporary folder and renames it, so an interrupted preparation leaves nothing behind, and of two processes that
    prepare the same data the later takes the earlier's.
    Raises `UserError` when the disk is full or the folder cannot be written.
    """
    with _quiet() if quiet else contextlib.nullcontext():
        builder = make_builder()
        if builder.is_prepared():
            return builder
        before()
        try:
            builder.download_and_prepare(file_format="array_record", download_config=download)
        except (OSError, RuntimeError) as error:
            if make_builder().is_prepared():
                return make_builder()
            if reason := _unwritable(error):
                remedy = "free some space or set data.data_dir to another folder"
                raise UserError(f"cannot write the data to {builder.data_path}: {reason}; {remedy}") from error
            raise
    return builder


@contextlib.contextmanager
def damaged(place: Path) -> Iterator[None]:
    """A block that reads what was prepared in a folder: whatever its readers stumble over there is a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0][:200]
        raise UserError(
            f"what was prepared in {place} is damaged ({why}): remove that folder, and it is prepared again"
        ) from error


def _unwritable(error: OSError | RuntimeError) -> str | None:
    """What keeps the folder from being written, if that is the error; array_record says it in its message alone."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return os.strerror(number)
    return None
