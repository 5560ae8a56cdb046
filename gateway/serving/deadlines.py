"""When queued requests expire: one timer for all of them, since nearly every request ends before its time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Protocol

from gateway.clock import NS_PER_S, monotonic_ns
from gateway.serving.request import State, Submission

SPARSE_HEAP = 64
"""Requests that have ended and may lie in the heap before it is swept, beyond as many as still wait."""


class Timer(Protocol):
    """What an event loop's ``call_later`` returns."""

    def cancel(self) -> None:
        """Never call it."""


class Scheduler(Protocol):
    """What is needed of an event loop."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call once, after so many seconds."""

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> object:
        """Call in the next turn."""


class Deadlines:
    """Calls a function for each request that has not ended by its deadline.

    Args:
        loop: for the timer.
        expire: called once with a request, at or soon after its deadline.
    """

    def __init__(self, loop: Scheduler, expire: Callable[[Submission], None]) -> None:
        self._loop = loop
        self._expire = expire
        self._heap: list[tuple[int, int, Submission]] = []
        self._added = 0  # orders requests of equal deadlines
        self._swept = 0  # length of the heap after it was swept last
        self._timer: Timer | None = None
        self._due_ns = 0  # when the timer fires

    def add(self, request: Submission) -> None:
        """Watch a request that has a deadline."""
        if len(self._heap) > 2 * self._swept + SPARSE_HEAP:
            self._sweep()
        self._added += 1
        heapq.heappush(self._heap, (request.deadline_ns, self._added, request))
        if self._timer is None or request.deadline_ns < self._due_ns:
            self._set_timer()

    def close(self) -> None:
        """Watch none of them any more."""
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if entry[2].state is not State.ENDED]
        heapq.heapify(self._heap)
        self._swept = len(self._heap)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_ns = self._heap[0][0]
        delay_s = max(0, self._due_ns - monotonic_ns()) / NS_PER_S
        self._timer = self._loop.call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        now_ns = monotonic_ns()
        while self._heap and (self._heap[0][2].state is State.ENDED or self._heap[0][0] <= now_ns):
            _, _, request = heapq.heappop(self._heap)
            if request.state is not State.ENDED:
                self._expire(request)
        if self._heap:
            self._set_timer()
