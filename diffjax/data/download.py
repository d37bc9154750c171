"""Pictures fetched from the web into the cache folder, many at once; nothing that comes back is trusted.

Only http and https are spoken, whatever an answer leads to. An answer has to begin in time, to end in time, to stay
within `MOST_BYTES`, and to decode as a picture to its end; it is kept only then. What may pass is tried
`ATTEMPTS` times.
"""

import functools
import hashlib
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from diffjax.data.images import looks_like_picture, open_picture
from diffjax.data.prepare import in_parallel
from diffjax.utils import files
from diffjax.utils.progress import track

THREADS = 32
ATTEMPTS = 3
REDIRECTS = 5
SILENCE, WHOLE = 10.0, 60.0
"""Seconds in which something, and everything, has to come."""

PAUSE = 1.0
"""Seconds before the second attempt; twice that before the third."""

MOST_BYTES = 32 * 2**20
CHUNK = 2**16
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class Refused(Exception):
    """An answer that no other attempt would change."""


def is_link(name: str) -> bool:
    """Whether a picture's name is a URL that can be fetched."""
    return name.lower().startswith(("http://", "https://"))


def place(url: str) -> Path:
    """Where the picture of a URL is kept."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    return files.home() / "downloads" / digest[:2] / digest


def fetch(urls: Iterable[str]) -> dict[str, str]:
    """Fetch every URL to its `place`, under a progress bar; those that could not be had, each with the reason.

    Raises `UserError` when the cache folder cannot be written. Broken off, what was fetched stays.
    """
    urls = list(urls)
    fetcher = _Fetcher()
    try:
        reasons = dict(track(in_parallel(fetcher, urls, THREADS), "fetching the pictures", len(urls)))
    finally:
        fetcher.stop.set()
    return {url: reasons[url] for url in urls if reasons[url]}


@dataclass(frozen=True)
class _Fetcher:
    """`fetcher(url)` is "" once the picture is in its place, else why it is not; `stop` ends all soon."""

    stop: threading.Event = field(default_factory=threading.Event)
    pools: dict[str | None, Any] = field(default_factory=dict)

    def __call__(self, url: str) -> str:
        import urllib3

        why = "stopped"
        for attempt in range(ATTEMPTS):
            if self.stop.wait(PAUSE * attempt):
                break
            try:
                files.write_atomic(place(url), self._picture(url))
                return ""
            except Refused as error:
                return str(error)
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return why

    def _picture(self, url: str) -> bytes:
        deadline = time.monotonic() + WHOLE
        for _ in range(REDIRECTS + 1):
            if not is_link(url):
                raise Refused(f"leads to {url[:80]}, which is not on the web")
            with self._answer(url) as answer:
                if 300 <= answer.status < 400 and "location" in answer.headers:
                    url = urljoin(url, answer.headers["location"])
                    continue
                if answer.status != 200:
                    raise (OSError if answer.status in BUSY else Refused)(f"{answer.status} {answer.reason}")
                return _checked(self._read(answer, deadline))
        raise Refused(f"more than {REDIRECTS} redirections")

    def _answer(self, url: str) -> Any:
        """The answer's head; its body is read by and by, as it is sent."""
        import urllib3

        parts = urlsplit(url)
        proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
        if proxy not in self.pools:
            pool = functools.partial(urllib3.ProxyManager, proxy) if proxy else urllib3.PoolManager
            self.pools[proxy] = pool(num_pools=4 * THREADS, maxsize=THREADS)
        return self.pools[proxy].request(
            "GET",
            url,
            headers={"User-Agent": "diffjax", "Accept-Encoding": "identity"},
            timeout=SILENCE,
            retries=False,
            redirect=False,
            preload_content=False,
        )

    def _read(self, answer: Any, deadline: float) -> bytes:
        data = bytearray()
        while chunk := answer.read1(CHUNK, decode_content=False):
            data += chunk
            if len(data) > MOST_BYTES:
                raise Refused(f"has more than {MOST_BYTES // 2**20} MiB")
            if time.monotonic() > deadline or self.stop.is_set():
                raise TimeoutError(f"not all there after {WHOLE:.0f} s")
        return bytes(data)


def _checked(data: bytes) -> bytes:
    """The data, if all of them are a picture; one that is cut off may come whole the next time."""
    try:
        picture = open_picture(data, 1)
        picture.load()
    except Exception as error:
        if looks_like_picture(data[:12]):
            raise OSError(f"is not all there: {error}") from error
        raise Refused(f"is no picture: {error}") from error
    return data


def broken(url: str) -> bool:
    """Whether the file that was kept for a URL is no whole picture."""
    try:
        _checked(place(url).read_bytes())
    except (Refused, OSError):
        return True
    return False
