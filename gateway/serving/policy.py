"""When a worker seals the batch it sees, and what it runs together.

Pure, so that it can be tried with plain values and in simulated time.

A worker that holds a batch back is idle, so holding is only ever right when a setting asks for it. With a
fixed delay it is held for that. With a due time it is held in the window in which one more row still meets
it (deferred dispatch: Symphony, 2023, seals in [d - l(b+1), d - l(b)]), and there only

- where that row would be late if it had to wait for the run: where it would not, holding wins nothing, and
  loses time that a burst needs later;
- where rows cost little beside the run: otherwise longer runs make the next ones longer;
- while waiting for it costs less than running it later by itself: the worker could have been working.

Each of the three was found missing by simulation (`benchmarks/policy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.serving.costs import Cost

SLACK_NS = 300_000
"""Between a run and the due time: what a wake-up and the front end take."""

FLAT = 0.25
"""Most of the time between two rows that one more row of a batch may cost, where batches are held back. Above
it a run that is longer by what was held makes the next one longer as well, and later rows pay for it."""

COPY_NS = 15_000
"""What it takes to copy a fragment to the memory of a packed run and its outputs back: an estimate."""

COPY_NS_PER_BYTE = 0.25
"""And for each byte of it."""


class Offer(NamedTuple):
    """A slot that an idle worker could seal.

    Attributes:
        rows: in it.
        oldest_ns: monotonic arrival of its first row.
        latest_ns: of its last row, as far as the worker saw.
        due_ns: when the first of its rows is due; 0: none is.
        is_complete: nothing more will join it: it is full, the next request did not fit, or its
            former worker died.
        capacity: rows that a slot of its shape holds.
    """

    rows: int
    oldest_ns: int
    latest_ns: int
    due_ns: int = 0
    is_complete: bool = False
    capacity: int = 1


def hold_until(
    offer: Offer,
    now_ns: int,
    max_queue_delay_ns: int = 0,
    cost: Cost | None = None,
    gap_ns: float = 0.0,
    others_wait: bool = False,
) -> int | None:
    """Until which monotonic time to hold the slot back; None: seal it now.

    Args:
        offer: the slot.
        now_ns: monotonic.
        max_queue_delay_ns: age of its oldest row to which it is held in any case.
        cost: of runs of its shape.
        gap_ns: expected time between two of its rows.
        others_wait: another worker is idle, and would run the next row at once.

    Returns:
        The time; before it the slot is to be looked at again only when a row joins it.
    """
    if offer.is_complete or (cost is not None and 0 < cost.best_rows <= offer.rows):
        return None
    until_ns = offer.oldest_ns + max_queue_delay_ns
    if offer.due_ns and cost is not None and not others_wait:
        until_ns = max(until_ns, _window_end_ns(offer, now_ns, cost, gap_ns))
    return None if until_ns <= now_ns else until_ns


def _window_end_ns(offer: Offer, now_ns: int, cost: Cost, gap_ns: float) -> int:
    """Until when to wait for one more row; 0: it is not worth it.

    To run b rows now makes b rows in l(b). To wait g for one more makes b + 1 in g + l(b+1). Waiting pays
    while that is more rows in a time, which with l(n) = a + c·n is: while b·g < a.
    """
    rows = offer.rows
    alone_ns, joined_ns = cost.expected_ns(rows), cost.expected_ns(rows + 1)
    at_worst_ns = cost.at_worst_ns(rows + 1)
    if alone_ns is None or joined_ns is None or at_worst_ns is None:
        return 0
    patience_ns = ((rows + 1) * alone_ns - rows * joined_ns) / rows
    end_ns = offer.due_ns - at_worst_ns - SLACK_NS
    gap_ns = max(gap_ns, now_ns - offer.latest_ns, 1)
    if gap_ns >= patience_ns or now_ns + gap_ns > end_ns:
        return 0
    limit = cost.best_rows or offer.capacity
    more = max(1, min(rows, limit - rows))
    if (cost.expected_ns(rows + more) or 0) - alone_ns > FLAT * gap_ns * more:
        return 0
    # The next row, if this one's run begins now: it is in the run after it, with all that come meanwhile.
    next_rows = min(limit, int(alone_ns / gap_ns) + 1)
    after_ns = cost.at_worst_ns(next_rows) or 0
    if alone_ns + after_ns + SLACK_NS <= gap_ns + offer.due_ns - offer.oldest_ns:
        return 0
    return int(min(end_ns, offer.latest_ns + patience_ns))


def together(cost: Cost, rows: Sequence[int], nbytes_per_row: int, limit: int) -> int:
    """How many of the offered fragments to run together with the first.

    Args:
        cost: of runs of their shape.
        rows: of the fragment that is run in any case, then of the others in the order of their turn.
        nbytes_per_row: of inputs and outputs, which are copied.
        limit: rows that a run may have.

    Returns:
        Of the others, how many from the first on: none where running them apart costs less.
    """
    total, apart_ns = rows[0], cost.expected_ns(rows[0])
    copy_ns = COPY_NS + COPY_NS_PER_BYTE * nbytes_per_row * total
    best, saved_ns = 0, 0.0
    for taken, more in enumerate(rows[1:], 1):
        total += more
        alone_ns, joined_ns = cost.expected_ns(more), cost.expected_ns(total)
        if total > limit or apart_ns is None or alone_ns is None or joined_ns is None:
            break
        apart_ns += alone_ns
        copy_ns += COPY_NS + COPY_NS_PER_BYTE * nbytes_per_row * more
        if apart_ns - joined_ns - copy_ns > saved_ns:
            best, saved_ns = taken, apart_ns - joined_ns - copy_ns
    return best


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
