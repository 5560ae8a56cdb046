"""When a worker seals the batch it sees: pure, so that it can be tried with plain values.

A worker that holds a batch back is idle, so holding is only ever right when a setting asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

SEAL_NOW = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """A slot that an idle worker could seal.

    Attributes:
        rows: rows in it.
        capacity: rows that fit.
        oldest_ns: monotonic arrival of its first row.
        is_retry: its former worker died; nothing will be appended any more.
    """

    rows: int
    capacity: int
    oldest_ns: int
    is_retry: bool


def decide(offer: Offer, now_ns: int, max_queue_delay_ns: int) -> int:
    """`SEAL_NOW`, or the monotonic time until which to hold the slot.

    A full slot goes at once; a part slot waits until its oldest row is `max_queue_delay_ns` old.
    """
    if offer.is_retry or offer.rows >= offer.capacity:
        return SEAL_NOW
    until_ns = offer.oldest_ns + max_queue_delay_ns
    return SEAL_NOW if until_ns <= now_ns else until_ns
