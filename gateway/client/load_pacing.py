"""When requests are to be sent, and a timer that is exact enough to send them then.

*Closed loop*: a connection sends its next request when it has the last one's answer, so that a slow server
is sent less. *Open loop*: requests arrive at random moments of a given mean rate, whether or not earlier
ones are answered, as those of many independent users do. There a latency counts from the moment at which
the request was due, not from that at which a connection was free for it: otherwise a server that stands
still for a second would spoil one request a connection, and the hundreds that users would have sent
meanwhile would be left out ("coordinated omission").
"""

from __future__ import annotations

import ctypes
import os
import random
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Protocol

from gateway.clock import NS_PER_S


class Pacing(Protocol):
    """Hands out the moments at which requests are due, in order, each once."""

    def take(self, now_ns: int) -> int | None:
        """The next moment, where it has come; None: nothing is due yet."""
        ...

    def next_ns(self) -> int:
        """The next moment that `take` will give."""
        ...


class ClosedLoop:
    """A request is due whenever there is a connection to send it on."""

    def take(self, now_ns: int) -> int:
        """Now."""
        return now_ns

    def next_ns(self) -> int:
        """At once."""
        return 0


class PoissonArrivals:
    """Arrivals independent of each other: the times between them are exponentially distributed.

    Args:
        rate: mean arrivals a second.
        start_ns: the moment from which on they come.
        source: of randomness.
    """

    def __init__(self, rate: float, start_ns: int, source: random.Random) -> None:
        self._per_ns = rate / NS_PER_S
        self._source = source
        self._due_ns = float(start_ns)
        self._advance()

    def take(self, now_ns: int) -> int | None:
        """The next arrival's moment, where it has come."""
        due_ns = int(self._due_ns)
        if due_ns > now_ns:
            return None
        self._advance()
        return due_ns

    def next_ns(self) -> int:
        """The next arrival's moment."""
        return int(self._due_ns)

    def _advance(self) -> None:
        self._due_ns += self._source.expovariate(self._per_ns)


_TFD_TIMER_ABSTIME = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class Timer:
    """Calls back at a given moment, some 0.1 ms late at most on an idle machine; a timerfd(2).

    The timers of event loops go by whole milliseconds, which would be the larger part of a short latency.

    Args:
        loop: that calls back.
        callback: called without arguments, once for each `arm`.
    """

    def __init__(self, loop: AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        flags = os.O_NONBLOCK | os.O_CLOEXEC  # TFD_NONBLOCK and TFD_CLOEXEC are the same numbers
        self._fd = _checked(_LIBC.timerfd_create(time.CLOCK_MONOTONIC, flags))
        loop.add_reader(self._fd, self._expired)

    def arm(self, at_ns: int) -> None:
        """Call back at this moment instead of an earlier `arm`'s; one that is past is now."""
        seconds, rest_ns = divmod(max(1, at_ns), NS_PER_S)
        once = (ctypes.c_long * 4)(0, 0, seconds, rest_ns)  # struct itimerspec: interval, value
        _checked(_LIBC.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, once, None))

    def close(self) -> None:
        """Never call back again."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # armed anew meanwhile
            return
        self._callback()


def _checked(result: int) -> int:
    """The result of a call of libc. OSError: it is an error."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
