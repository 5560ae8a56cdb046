"""When a worker seals the batch it sees: pure, so that it can be tried with plain values.

A worker that holds a batch back is idle, so holding is only ever right when a setting asks for it.
"""

from __future__ import annotations

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
