"""What became of the requests of a load: counts, latencies, bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gateway.client.load_histogram import Histogram
from gateway.clock import NS_PER_S


@dataclass(slots=True)
class Tally:
    """Requests that were sent while it was measured, and what was seen meanwhile.

    Every request sent is in one of ``statuses``, ``timeouts``, ``lost``, ``malformed`` and ``unfinished``.
    Latencies are those of answers of status 2xx.
    """

    latencies: Histogram = field(default_factory=Histogram)
    statuses: Counter[int] = field(default_factory=Counter)
    texts: dict[int, bytes] = field(default_factory=dict)
    """The beginning of the first body of each status other than 2xx."""

    timeouts: int = 0
    lost: int = 0
    """Requests whose connection was closed before the answer was complete."""

    malformed: int = 0
    """Requests whose answer was not HTTP/1.x."""

    connect_failures: int = 0
    """Connections that could not be made; no request was sent on them."""

    connect_problem: str = ""
    """Why the last of those could not be made."""

    reconnects: int = 0
    """Connections that ended, whoever closed them, and were replaced."""

    unfinished: int = 0
    """Requests without an answer when the load was stopped early."""

    unsent: int = 0
    """Open loop: requests that were due and had no free connection to the end."""

    sent_bytes: int = 0
    received_bytes: int = 0
    begun_ns: int = 0
    ended_ns: int = 0
    """When measuring began and ended; 0: not yet."""

    cpu_ns: int = 0
    """CPU time that this process spent between the two."""

    @property
    def succeeded(self) -> int:
        """Answers of status 2xx."""
        return self.latencies.count

    @property
    def refused(self) -> dict[int, int]:
        """Answers by status, for statuses other than 2xx."""
        return {status: n for status, n in sorted(self.statuses.items()) if not is_success(status)}

    @property
    def errors(self) -> int:
        """Everything that went wrong, failed connections included."""
        failed = self.timeouts + self.lost + self.malformed + self.connect_failures
        return sum(self.refused.values()) + failed

    @property
    def sent(self) -> int:
        """Requests that were sent."""
        answered = sum(self.statuses.values())
        return answered + self.timeouts + self.lost + self.malformed + self.unfinished

    @property
    def elapsed_s(self) -> float:
        """The time measured; 0 before its end."""
        return max(0, self.ended_ns - self.begun_ns) / NS_PER_S

    def per_second(self, count: float) -> float:
        """A count of the whole time as a rate; 0 where no time was measured."""
        return count / self.elapsed_s if self.elapsed_s else 0.0


def is_success(status: int) -> bool:
    """Whether a status is 2xx."""
    return 200 <= status < 300
