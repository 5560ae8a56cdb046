"""Whose CPU a load takes: nice values of the threads, while it loads and afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from gateway.serving import niceness
from gateway.serving.niceness import LOADING_NICE, load_nicely


def _nice(thread: int = 0) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def _may_return() -> bool:
    return niceness._in_own_thread(niceness._may_return)


class Pool:
    """A thread that stays when the load is over, as a session's pool does."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._end.wait)
        self._thread.start()
        self.id = self._thread.native_id

    def close(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.skipif(not _may_return(), reason="nice values cannot be brought back here")
def test_what_a_load_started_is_brought_back_with_it():
    usual = _nice()
    seen: list[int] = []

    def load() -> Pool:
        pool = Pool()
        seen.extend((_nice(), _nice(pool.id)))
        return pool

    pool = load_nicely(load, makes_threads=True)
    try:
        assert seen == [usual + LOADING_NICE] * 2
        assert _nice() == _nice(pool.id) == usual
    finally:
        pool.close()


@pytest.mark.skipif(not _may_return(), reason="nice values cannot be brought back here")
def test_a_load_that_fails_is_over_as_well():
    usual = _nice()
    with pytest.raises(ZeroDivisionError):
        load_nicely(lambda: 1 // 0, makes_threads=True)
    assert _nice() == usual


@pytest.fixture
def no_return(monkeypatch):
    """A process that may not lower a nice value."""
    set_to = os.setpriority

    def refuse(which: int, who: int, value: int) -> None:
        if value < os.getpriority(which, who):
            raise PermissionError
        set_to(which, who, value)

    monkeypatch.setattr(os, "setpriority", refuse)


def test_where_there_is_no_way_back_a_thread_that_ends_loads(no_return):
    usual = _nice()
    assert load_nicely(_nice, makes_threads=False) == usual + LOADING_NICE
    assert _nice() == usual
    with pytest.raises(ZeroDivisionError):
        load_nicely(lambda: 1 // 0, makes_threads=False)


def test_where_there_is_no_way_back_a_pool_is_not_made_slow(no_return):
    assert load_nicely(_nice, makes_threads=True) == _nice()


def test_the_kernel_is_asked_what_it_allows():
    program = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NICE, (0, 0))\n"
        "from gateway.serving.niceness import load_nicely\n"
        "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "nice = lambda: os.getpriority(os.PRIO_PROCESS, 0)\n"
        "usual = nice()\n"
        "print(load_nicely(nice, makes_threads=True) - usual,\n"
        "      load_nicely(nice, makes_threads=False) - usual, nice() - usual)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["0", str(LOADING_NICE), "0"], done.stderr
