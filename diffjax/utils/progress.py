"""Progress with the time left, and words for numbers."""

import sys
import time
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], title: str, total: int) -> Iterable[Item]:
    """The items, under a progress bar on stderr that shows the time left; a single line where that is no terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        print(f"{title} ({total})", file=sys.stderr, flush=True)
        return items
    return progress.track(items, title, total=total, console=console, transient=True)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`; a noun takes -s, -es after s, x, ch and sh."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number} {noun}{ending}"


class Every:
    """A clock that says now and then that something is due."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether so many seconds have passed since it last said yes."""
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
