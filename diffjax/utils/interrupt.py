"""Ctrl-C, SIGTERM and a closed terminal, taken at a moment that suits: long jobs save before they leave; a second
signal leaves at once.

A signal that is ignored when the process starts stays ignored: Ctrl-C of what a shell runs in the background, SIGHUP
under nohup.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAME = 1.0
"""Signals that follow each other within so many seconds are one: a key that is held, a terminal and a launcher that
both send.
"""

DEAF = 3.0
"""Seconds after which a main thread that has not heard a signal is taken to be inside a library, a compiler
for example.
"""


SOON = 0.1
"""Seconds after which an interrupt that was lost comes again."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C raises `KeyboardInterrupt`."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(f"signal {number}")
        self.number = number


class Stop:
    """Whether a signal has asked to stop: its `number`, the time of the `latest` one, whether what it raised was
    `dropped`.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.latest = 0.0
        self.dropped = False

    def is_set(self) -> bool:
        """Whether one has."""
        return self.number is not None

    def take(self, number: int) -> bool:
        """Note a signal; whether it is another one than the first."""
        now, before, first = time.monotonic(), self.latest, self.number is None
        self.latest = now
        if first:
            self.number = number
        return not first and now - before > SAME

    def error(self) -> KeyboardInterrupt:
        """What a job raises that was asked to stop."""
        return _error(self.number or signal.SIGINT)


class _Heard:
    """What the handlers of this process have seen: the job that waits for a good moment, and the signal of a
    whole command.
    """

    job: Stop | None = None
    command: Stop | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """A block that the first of `SIGNALS` only asks to stop: `KeyboardInterrupt` comes when the block has ended.

    Another one, `SAME` seconds later or more, raises at once. On other threads than the main one nothing is changed.
    """
    stop = Stop()
    if _Heard.command and _Heard.command.number:  # its KeyboardInterrupt was lost where Python ignores what is raised
        stop.take(_Heard.command.number)

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.take(number):
            raise _error(number)

    _Heard.job, outer = stop, _Heard.job
    try:
        with _handling(ask):
            yield stop
    finally:
        _Heard.job = outer
    if stop.is_set():
        raise stop.error()


@contextlib.contextmanager
def command() -> Iterator[None]:
    """The signals of a process that is one command: a second one ends it at once, whatever the main thread is doing.

    Outside of `stop_on_signal` nothing is to be saved: the first raises `KeyboardInterrupt` or `Terminated`, and where
    the main thread is too deep in a library to raise anything for `DEAF` seconds, ends the process too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, seen = Stop(), Stop()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not heard.is_set() or heard.dropped:
            heard.take(number)
            heard.dropped = False
            raise _error(number)

    receive, send = os.pipe()
    for end in (receive, send):
        os.set_blocking(end, False)
    _Heard.command, outer = heard, _Heard.command
    before = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receive, heard, seen), daemon=True, name="signals")
    watcher.start()
    try:
        with _handling(interrupt), _raising_again(heard, seen):
            yield
    except Exception as error:
        if heard.is_set():  # what a library has made of a KeyboardInterrupt
            raise heard.error() from error
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.close(send)
        watcher.join(timeout=1)  # longer only where a forked process holds the other end
        os.close(receive)
        _Heard.command = outer


@contextlib.contextmanager
def _raising_again(heard: Stop, seen: Stop) -> Iterator[None]:
    """Where a library prints and drops a `KeyboardInterrupt`, in callbacks for example, neither: it comes
    again soon.
    """
    before, timers = (sys.unraisablehook, sys.excepthook), []

    def again(error: BaseException | None) -> bool:
        if not isinstance(error, KeyboardInterrupt) or not heard.is_set():
            return False
        heard.dropped, seen.latest = True, time.monotonic()
        timers.append(threading.Timer(SOON, os.kill, (os.getpid(), heard.number)))
        timers[-1].start()
        return True

    sys.unraisablehook = lambda raised: None if again(raised.exc_value) else before[0](raised)
    sys.excepthook = lambda kind, error, trace: None if again(error) else before[1](kind, error, trace)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        sys.unraisablehook, sys.excepthook = before


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {
        number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)
    }  # None: set by a library
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _watch(receive: int, heard: Stop, seen: Stop) -> None:
    """Read the numbers of signals as they arrive; the main thread hears of them only when it is back in Python."""
    while True:
        deaf = seen.is_set() and not heard.is_set() and _Heard.job is None
        ready, _, _ = select.select(
            [receive], [], [], max(0.0, seen.latest + DEAF - time.monotonic()) if deaf else None
        )
        if not ready:
            if seen.number and not heard.is_set() and _Heard.job is None:
                _leave(seen.number)
            continue
        arrived = os.read(receive, 64)
        if not arrived:
            return
        for number in arrived:
            if number in SIGNALS and signal.getsignal(number) is not signal.SIG_IGN:
                first = not seen.is_set()
                if seen.take(number):
                    _leave(number)
                elif first and _Heard.job:
                    _say("stopping: what is done is saved first; once more leaves at once")


def _leave(number: int) -> None:
    """End the process now, as a signal would; files are written so that this hurts none."""
    _say("\033[?25h" * sys.stderr.isatty() + "left at once; the same command goes on from what is saved")
    os._exit(128 + number)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"diffjax: {line}\n".encode())


def _error(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
