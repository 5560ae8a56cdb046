"""Time, in one place so that policies and queues can be tested with a clock that stands still.

Intervals and deadlines are monotonic nanoseconds (``CLOCK_MONOTONIC``, the same in every process of
the machine, which is what lets a worker judge the age of a row that a front end stamped). The wall
clock is only for what people read: it jumps when somebody sets it. Durations that outlive a process are
measured by `steady_s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

monotonic_ns: Callable[[], int] = time.monotonic_ns

_BOOTED_S = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_s() -> float:
    """Seconds since the epoch, for what people read or what outlives a boot."""
    return time.time()


def steady_s() -> float:
    """Seconds since the epoch, by the wall clock as it was when the process began and the time since.

    For moments that are kept in the store and whose distance counts: it does not jump while the process
    lives, and the next process goes on by the wall clock. Time that the machine sleeps is counted.
    """
    return _BOOTED_S + time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_ms() -> int:
    """Milliseconds since the epoch, for statistics that people read."""
    return time.time_ns() // NS_PER_MS
