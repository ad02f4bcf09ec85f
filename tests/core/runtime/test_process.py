"""SIGINT and SIGTERM are deferred until finished work is saved, and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from nayer_edge.runtime.process import Deferred


class Asked(BaseException):
    """Raised by the signal handler of these tests."""


@pytest.fixture
def handled() -> Iterator[None]:
    def handler(_number: int, _frame: object) -> None:
        raise Asked

    kept = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, former in kept.items():
        signal.signal(number, former)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_deferred_while_there_is_unsaved_work(number: int) -> None:
    done = []
    with pytest.raises(Asked), Deferred(lambda: True) as interrupt:  # noqa: PT012
        assert interrupt.asked == 0
        interrupt.act()
        send(number)
        done.append("went on")
        assert interrupt.asked == number
        interrupt.act()
        done.append("not reached")
    assert done == ["went on"]


@pytest.mark.usefixtures("handled")
def test_a_signal_acts_at_once_without_unsaved_work_and_at_the_second_time() -> None:
    with pytest.raises(Asked), Deferred(lambda: False):  # noqa: PT012
        send(signal.SIGINT)
        raise AssertionError("not reached")
    with pytest.raises(Asked), Deferred(lambda: True):  # noqa: PT012
        send(signal.SIGINT)
        send(signal.SIGTERM)
        raise AssertionError("not reached")


@pytest.mark.usefixtures("handled")
def test_a_deferred_signal_acts_at_the_end_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Asked), Deferred(lambda: True):
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyError), Deferred(lambda: True):  # noqa: PT012
        send(signal.SIGTERM)
        raise KeyError("an error of its own comes first")
    assert signal.getsignal(signal.SIGTERM) is before


def test_default_handlers_are_kept() -> None:
    """SIGTERM without a handler ends the process; an ignored SIGINT stays ignored."""
    program = """
import os, signal, sys
from nayer_edge.runtime.process import Deferred
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with Deferred(lambda: True) as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    assert not interrupt.asked
    os.kill(os.getpid(), signal.SIGTERM)
    print("saved", flush=True)
    interrupt.act()
    print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == "saved\n"


def test_outside_the_main_thread_nothing_changes() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Deferred(lambda: True) as interrupt:
            found.append((interrupt.asked, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(0, True)]
