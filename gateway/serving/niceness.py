"""Loading at a lower priority than serving: whoever loads takes the CPU that the others leave.

A nice value on Linux belongs to a thread, and a thread begins with that of the one that made it. So what a
session starts while it is opened, its pool above all, is as nice as whoever opens it, and is brought back
with it. Raising a value is always allowed; bringing it back is not (RLIMIT_NICE, CAP_SYS_NICE in the first
user namespace, what a sandbox thinks of it), so that is tried out, on a thread that ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

LOADING_NICE = 10
"""Added to the process's nice value while it loads: about a tenth of the CPU beside one that serves."""

_T = TypeVar("_T")


def load_nicely(load: Callable[[], _T], *, makes_threads: bool) -> _T:
    """Give what ``load`` gives, computed at a raised nice value.

    Every thread of the process has its old value when this returns or raises. Where a value cannot be
    brought back, the work is done by a thread that ends; if it makes threads that stay, it is done as it is.

    Args:
        load: the work; may raise.
        makes_threads: whether threads that it makes stay when it is done.
    """
    if _in_own_thread(_may_return):
        usual = os.getpriority(os.PRIO_PROCESS, 0)
        _raise_own()
        try:
            return load()
        finally:
            _bring_back(usual)
    if makes_threads:
        return load()

    def load_raised() -> _T:
        _raise_own()
        return load()

    return _in_own_thread(load_raised)


def _raise_own() -> None:
    """Raise the nice value of the calling thread; beyond the highest it stays there."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(OSError):  # a sandbox may refuse even that
        os.setpriority(os.PRIO_PROCESS, 0, usual + LOADING_NICE)


def _may_return() -> bool:
    """Whether the calling thread, which ends, can undo a raised value."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    _raise_own()
    try:
        os.setpriority(os.PRIO_PROCESS, 0, usual)
    except OSError:
        return False
    return True


def _bring_back(usual: int) -> None:
    """Give all threads the value ``usual``; the calling one first, so that none is born with another."""
    os.setpriority(os.PRIO_PROCESS, 0, usual)
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(task.name), usual)


def _in_own_thread(work: Callable[[], _T]) -> _T:
    with ThreadPoolExecutor(1, thread_name_prefix="loading") as thread:
        return thread.submit(work).result()
