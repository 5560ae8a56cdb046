"""When a worker seals the batch it sees: pure, so that it can be tried with plain values.

A worker that holds a batch back is idle, so holding is only ever right when a setting asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offer:
    """A slot that an idle worker could seal.

    Attributes:
        oldest_ns: monotonic arrival of its first row.
        is_complete: nothing more will join it: it is full, the next request did not fit, or its
            former worker died.
    """

    oldest_ns: int
    is_complete: bool


def hold_until(offer: Offer, now_ns: int, max_queue_delay_ns: int) -> int | None:
    """Until which monotonic time to hold the slot back; None: seal it now.

    A complete slot goes at once; another waits until its oldest row is `max_queue_delay_ns` old.
    """
    due_ns = offer.oldest_ns + max_queue_delay_ns
    return None if offer.is_complete or due_ns <= now_ns else due_ns


RISE_NS = 1_000_000_000
"""Time in the queue after which a request counts as one level higher: low levels do not starve."""


def next_level(heads_ns: Sequence[int | None], now_ns: int) -> int:
    """Whose turn it is among the oldest requests of each level.

    Args:
        heads_ns: by level, the highest first: monotonic arrival of its oldest request; None: it has
            none. Not all of them are None.
        now_ns: monotonic.

    Returns:
        The level; of those that waiting has made equal, the one whose request is older.
    """
    ranks = [
        (level - (now_ns - arrived_ns) // RISE_NS, arrived_ns, level)
        for level, arrived_ns in enumerate(heads_ns)
        if arrived_ns is not None
    ]
    return min(ranks)[2]
