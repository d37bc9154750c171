import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from diffjax import cli
from diffjax.utils import interrupt
from diffjax.utils.interrupt import stop_on_signal

EACH = pytest.mark.parametrize(
    ("number", "error", "status"),
    [
        (signal.SIGINT, KeyboardInterrupt, 130),
        (signal.SIGTERM, interrupt.Terminated, 143),
        (signal.SIGHUP, interrupt.Terminated, 129),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)


@EACH
def test_the_first_signal_waits_for_the_end_of_the_block(number, error, status):
    before, reached = [signal.getsignal(number) for number in interrupt.SIGNALS], []
    with pytest.raises(error):
        with stop_on_signal() as stop:
            assert not stop.is_set()
            signal.raise_signal(number)
            assert stop.is_set()
            reached.append(True)
    assert reached and [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_nothing_is_raised_without_a_signal():
    with stop_on_signal() as stop:
        assert not stop.is_set()


def test_signals_within_a_second_are_one_and_a_later_one_leaves_at_once(monkeypatch):
    monkeypatch.setattr(interrupt, "SAME", 0.3)
    with pytest.raises(KeyboardInterrupt):
        with stop_on_signal():
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
                time.sleep(0.2)  # from the first to the last it is longer than SAME
            reached = "all of them"
            time.sleep(0.3)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the later signal did not leave at once")
    assert reached == "all of them"


def test_an_error_of_the_block_is_not_hidden():
    with pytest.raises(OSError, match="disk"):
        with stop_on_signal():
            signal.raise_signal(signal.SIGINT)
            raise OSError("disk")


def test_what_is_ignored_from_the_start_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.command(), stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_set()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with pytest.raises(interrupt.Terminated), stop_on_signal() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_left_alone():
    def work():
        with interrupt.command(), stop_on_signal() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGINT)))

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


class Thing:
    pass


def drop_one(number):
    """What a callback raises is printed and dropped by Python."""
    thing = Thing()
    watched = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert watched() is None


@EACH
def test_an_interrupt_that_python_drops_comes_again(number, error, status, capsys):
    hooks = sys.unraisablehook, sys.excepthook
    begin = time.monotonic()
    with pytest.raises(error), interrupt.command():
        drop_one(number)
        time.sleep(30)
    assert time.monotonic() - begin < 10 and capsys.readouterr().err == ""
    assert (sys.unraisablehook, sys.excepthook) == hooks


def test_an_interrupt_that_python_drops_reaches_the_job_that_begins(monkeypatch):
    with pytest.raises(KeyboardInterrupt), interrupt.command():
        drop_one(signal.SIGINT)
        with stop_on_signal() as stop:
            while not stop.is_set():
                time.sleep(0.01)


@EACH
def test_an_interrupt_that_a_library_has_turned_into_another_error_is_one(number, error, status):
    with pytest.raises(error), interrupt.command():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as interrupted:
            raise ImportError("cannot import") from interrupted


@EACH
def test_a_command_says_how_it_ended(number, error, status, monkeypatch, capsys):
    monkeypatch.setattr(cli, "parse", lambda argv: signal.raise_signal(number))
    handlers = [signal.getsignal(number) for number in interrupt.SIGNALS]
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err.endswith("the same command goes on from what is saved\n")
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == handlers
    assert "signals" not in {thread.name for thread in threading.enumerate()}


BUSY = """
import hashlib, sys, time
from diffjax.utils import interrupt
interrupt.DEAF = 0.3
def deep():  # in a library, where no signal is heard
    print("deep", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
with interrupt.command():
    if sys.argv[1] == "compiling":
        deep()
    with interrupt.stop_on_signal():
        deep()
"""


@pytest.mark.parametrize("number", interrupt.SIGNALS[:2], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("where", ["compiling", "in a job"])
def test_a_command_leaves_at_once_from_the_depths_of_a_library(where, number):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as busy:
        assert busy.stdout.readline() == "deep\n"
        time.sleep(0.3)
        busy.send_signal(number)
        if where == "in a job":
            assert "what is done is saved first; once more leaves at once" in busy.stderr.readline()
            busy.send_signal(number)  # the same one
            time.sleep(interrupt.SAME + 0.3)
            assert busy.poll() is None
            busy.send_signal(number)
        assert busy.wait(10) == 128 + number
        assert busy.stderr.read() == "diffjax: left at once; the same command goes on from what is saved\n"
