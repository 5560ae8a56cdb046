"""What a model's settings bound about its requests: how many may wait, for how long, and in what order."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.clock import NS_PER_US


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a dispatcher.

    Attributes:
        max_queue_size: requests waiting for a worker.
        queue_timeout_ns: default time in the queue; 0 for none.
        lane_bytes: budget of a lane, see `geometry`.
        priority_levels: how many requests may name; 0: their priority is ignored.
        default_level: of requests that name none, from 1.
        slo_ns: latency that every request aims at; 0 for none.
    """

    max_queue_size: int
    queue_timeout_ns: int
    lane_bytes: int
    priority_levels: int = 0
    default_level: int = 1
    slo_ns: int = 0

    def deadline_ns(self, timeout_us: int | None, arrived_ns: int) -> int:
        """When a request's time in the queue ends: the shorter of its own and the model's; 0: never."""
        own_ns = (timeout_us or 0) * NS_PER_US
        timeouts = [timeout for timeout in (self.queue_timeout_ns, own_ns) if timeout > 0]
        return arrived_ns + min(timeouts) if timeouts else 0

    def due_ns(self, timeout_us: int | None, arrived_ns: int) -> int:
        """By when a request's answer is wanted, which a worker may hold its batch for; 0: no such time.

        The model's own time-out is no such wish: it bounds waiting, and nobody would thank for using it up.
        """
        wanted = [ns for ns in (self.slo_ns, (timeout_us or 0) * NS_PER_US) if ns > 0]
        return arrived_ns + min(wanted) if wanted else 0

    def level(self, priority: int) -> int:
        """The queue's level of a request's priority, counted from 0, the highest."""
        if not self.priority_levels:
            return 0
        return min(priority or self.default_level, self.priority_levels) - 1
