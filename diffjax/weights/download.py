"""Files of one commit of the hub, downloaded into its folder: several at once, each going on where it was broken off.

What is under way lies in `blobs/CHECKSUM.partial` and goes on from there, in this process or a later one. A file counts
as there once it is whole and its content is what its checksum says.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from diffjax.utils import files
from diffjax.utils.errors import UserError

AT_ONCE = 4
CHUNK = 2**20
RETRIES = 3
"""How often a file is asked for again without a byte more."""

PAUSE = 1.0
"""Seconds before it is asked for again the first time; twice as many each time after."""

BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP: try again later."""


@dataclass(frozen=True)
class Remote:
    """A file of the hub: where it is, its checksum (git's or SHA-256) and its bytes (None where the server says
    nothing).
    """

    name: str
    url: str
    checksum: str
    size: int | None


def download_files(repo: str, commit: str, names: Sequence[str], folder: Path) -> None:
    """Have all those files of a commit in `folder/snapshots/COMMIT`; files that are there are not asked for.

    Raises `UserError` for a disk that is too small, and for a file that arrived damaged; `OSError` and the errors of
    huggingface_hub for the rest.
    """
    snapshot = folder / "snapshots" / commit
    missing = lambda: [name for name in names if not (snapshot / name).is_file()]
    if not missing():
        return
    with _alone(folder), ThreadPoolExecutor(AT_ONCE) as pool:
        remotes = list(pool.map(lambda name: _remote(repo, commit, name), missing()))
        left = {remote.checksum: remote for remote in remotes if not _blob(folder, remote).is_file()}
        _bring(repo, list(left.values()), folder, pool)
        for remote in remotes:
            _link(_blob(folder, remote), snapshot / remote.name)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        files.lock(file)
        yield


def _remote(repo: str, commit: str, name: str) -> Remote:
    import huggingface_hub
    from huggingface_hub import constants

    url = huggingface_hub.hf_hub_url(repo, name, revision=commit)
    told = huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if told.etag is None or not re.fullmatch(r"[\w-]+", told.etag):
        raise UserError(f"{url} has no checksum: check HF_ENDPOINT and the proxy")
    return Remote(name, url, told.etag, told.size)


def _blob(folder: Path, remote: Remote) -> Path:
    return folder / "blobs" / remote.checksum


def _partial(folder: Path, remote: Remote) -> Path:
    return folder / "blobs" / f"{remote.checksum}.partial"


def _bring(repo: str, remotes: Sequence[Remote], folder: Path, pool: ThreadPoolExecutor) -> None:
    """Download files beside each other; the first error, or Ctrl-C, stops all."""
    if not remotes:
        return
    (folder / "blobs").mkdir(exist_ok=True)
    sizes = [remote.size or 0 for remote in remotes]
    held = [_size(_partial(folder, remote)) for remote in remotes]
    _refuse_a_small_disk(repo, sum(sizes) - sum(held), folder)
    stop = threading.Event()
    with _progress(f"downloading {repo}", sum(sizes), sum(held)) as advance:
        futures = [pool.submit(_whole, remote, folder, stop, advance) for remote in remotes]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()


def _refuse_a_small_disk(repo: str, size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{repo} needs {size / 1e9:.3g} GB and {folder.parent} has {free / 1e9:.3g}: free some space, or "
            "set DIFFJAX_HOME"
        )


@contextlib.contextmanager
def _progress(title: str, total: int, held: int) -> Iterator[Callable[[int], None]]:
    """What to call with the number of bytes that came: a bar on stderr, a single line where that is no terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        print(f"{title} ({(total - held) / 1e6:.1f} MB)", file=sys.stderr, flush=True)
        yield lambda count: None
        return
    columns = (*progress.Progress.get_default_columns(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=held)
        yield lambda count: bar.update(task, advance=count)


def _whole(remote: Remote, folder: Path, stop: threading.Event, advance: Callable[[int], None]) -> None:
    """Download one file, again and again while that brings it further, and check it."""
    path, failures = _partial(folder, remote), 0
    if remote.size is None or _size(path) > remote.size:
        path.unlink(missing_ok=True)
    path.touch()
    while _size(path) != remote.size and not stop.is_set():
        held = _size(path)
        error = _append(remote, path, stop, advance)
        if error is None and remote.size is None:
            break
        failures = 0 if _size(path) > held else failures + 1
        if failures > RETRIES:
            raise error or UserError(f"{remote.url} ends early: run the same command again to go on")
        stop.wait(PAUSE * 2**failures if error else 0)
    if stop.is_set():
        return
    if not _sound(path, remote.checksum):
        path.unlink()
        raise UserError(f"{remote.name} arrived damaged: run the same command again")
    os.replace(path, _blob(folder, remote))


def _append(remote: Remote, path: Path, stop: threading.Event, advance: Callable[[int], None]) -> Exception | None:
    """Ask for what a file lacks, and write what comes. Returns the error after which asking again may help;
    raises others.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors, utils

    held = _size(path)
    headers = utils.build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    session = huggingface_hub.get_session()
    try:
        with session.stream("GET", remote.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            huggingface_hub.hf_raise_for_status(response)
            with path.open("ab" if response.status_code == 206 else "wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    advance(len(chunk))
                    if stop.is_set():
                        return None
    except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status not in BUSY:
            raise
        return error
    return None


def _sound(path: Path, checksum: str) -> bool:
    """Whether a file's content has that checksum: SHA-256, or SHA-1 of it or of git's object; others are
    not checked.
    """
    with path.open("rb") as file:
        if len(checksum) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == checksum
        if len(checksum) != 40:
            return True
        head = b"blob %d\0" % _size(path)
        digests = [hashlib.sha1(), hashlib.sha1(head)]
        while chunk := file.read(CHUNK):
            for digest in digests:
                digest.update(chunk)
        return checksum in [digest.hexdigest() for digest in digests]


def _link(blob: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(blob, path.parent))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
