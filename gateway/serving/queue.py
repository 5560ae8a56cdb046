"""Requests that no slot has room for yet, in the order in which they get one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from gateway.clock import monotonic_ns
from gateway.serving import policy
from gateway.serving.request import State, Submission

SPARSE_QUEUE = 64
"""Ended requests that may lie in the queue before it is swept, beyond as many as still wait."""


class RequestQueue:
    """First in, first out, by level: a higher one overtakes, and who waits long enough rises.

    Requests that end while they are QUEUED are not searched for: they are told (`ended`), counted, and
    passed over when it is their turn.

    Args:
        levels: how many there are, at least 1.
    """

    def __init__(self, levels: int) -> None:
        self._again: deque[Submission] = deque()  # of failed batches: before every other
        self._levels: list[deque[Submission]] = [deque() for _ in range(levels)]
        self._waiting = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._waiting

    def put(self, request: Submission) -> None:
        """Queue a request behind those of its level."""
        request.move(State.QUEUED)
        self._levels[request.level].append(request)
        self._waiting += 1

    def put_first(self, requests: Iterable[Submission]) -> None:
        """Queue requests, in this order, before all others."""
        for request in reversed(list(requests)):
            request.move(State.QUEUED)
            self._again.appendleft(request)
            self._waiting += 1

    def next(self) -> Submission | None:
        """The request whose turn it is, which stays queued; None when nobody waits."""
        if not self._waiting:
            for queue in self._queues():
                queue.clear()
            return None
        for queue in self._queues():
            while queue and queue[0].state is not State.QUEUED:
                queue.popleft()
        if self._again:
            return self._again[0]
        heads = [queue[0].arrived_ns if queue else None for queue in self._levels]
        return self._levels[policy.next_level(heads, monotonic_ns())][0]

    def remove_next(self, request: Submission) -> None:
        """Take out what `next` returned; it has left the state QUEUED."""
        is_again = self._again and self._again[0] is request
        queue = self._again if is_again else self._levels[request.level]
        queue.popleft()
        self._waiting -= 1

    def ended(self, request: Submission) -> None:
        """A request that was QUEUED has ended: its data go now, its place when it is its turn."""
        request.drop_data()
        self._waiting -= 1
        if sum(map(len, self._queues())) > 2 * self._waiting + SPARSE_QUEUE:
            for queue in self._queues():
                alive = [r for r in queue if r.state is State.QUEUED]
                queue.clear()
                queue.extend(alive)

    def __iter__(self) -> Iterator[Submission]:
        """Those that wait, in no order that matters."""
        return (r for queue in self._queues() for r in queue if r.state is State.QUEUED)

    def _queues(self) -> Iterator[deque[Submission]]:
        yield self._again
        yield from self._levels
