"""The ledger of a version: where its counters lie in shared memory, and what they say together.

Front ends and workers write their own sections through `gateway._kernels.ledger`; whoever maps the board
reads all of them.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gateway._kernels import ledger, ring
from gateway._kernels.ledger import BatchCounters, RequestCounters
from gateway.clock import NS_PER_S

if TYPE_CHECKING:
    from typing_extensions import Buffer

DURATION_BUCKETS_S = tuple(bound_ns / NS_PER_S for bound_ns in ledger.DURATION_BOUNDS_NS)
"""Upper bounds of the duration histograms."""

BATCH_BUCKETS = ledger.ROW_BOUNDS
"""Upper bounds of the histogram of rows."""

MORE_ROWS = ledger.EXACT_ROWS + 1
"""In `BatchTotals.by_rows` this number stands for itself and all larger ones."""

SKETCH_BOUNDS_NS = ledger.SKETCH_BOUNDS_NS
"""Where each bucket of a sketch ends and the next begins, at most 3.2 % further on.

The first bucket has all shorter durations too, the last all longer ones.
"""

_MASK = (1 << 64) - 1

Numbers = tuple[int, ...]


class RequestTotals(NamedTuple):
    """What one front end counted, or all of them. ``codes`` has a cell for each of `ledger.CODES`.

    ``compared`` to ``shadow_failed`` are of copies that the version got as a shadow; they are no requests.
    """

    waiting: int
    last_inference_ms: int
    codes: Numbers
    rows: int
    success_ns: int
    fail_ns: int
    queue_ns: int
    compute_ns: int
    compared: int
    agreed: int
    shadow_dropped: int
    shadow_failed: int
    request_buckets: Numbers
    queue_buckets: Numbers

    @property
    def by_code(self) -> dict[int, int]:
        """Requests by HTTP status, of those that occurred; 0 is any other."""
        return {code: n for code, n in zip(ledger.CODES, self.codes, strict=True) if n}

    @property
    def succeeded(self) -> int:
        """Requests that were answered with their outputs."""
        return self.codes[ledger.CODES.index(200)]

    @property
    def failed(self) -> int:
        """Requests with any other status."""
        return (sum(self.codes) - self.succeeded) & _MASK


class BatchTotals(NamedTuple):
    """What one worker's seat counted, or all of them. ``by_rows``: (runs, ns) by number of rows."""

    starts: int
    rows: int
    run_ns: int
    copied_rows: int
    held_ns: int
    row_buckets: Numbers
    run_buckets: Numbers
    by_rows: dict[int, tuple[int, int]]

    @property
    def runs(self) -> int:
        """Batches that were run."""
        return sum(self.run_buckets) & _MASK


class Snapshot(NamedTuple):
    """Every section at about one moment; every number has 64 bits, sums too.

    ``frontend_slices`` are what each front end counted apart from ``frontends``.
    """

    frontends: list[RequestTotals]
    frontend_slices: list[RequestTotals]
    workers: list[BatchTotals]

    def requests(self) -> RequestTotals:
        """The sums over the front ends, slices included; of ``last_inference_ms`` the latest."""
        return _requests([*self.frontends, *self.frontend_slices])

    def slices(self) -> RequestTotals:
        """The same of the slices alone."""
        return _requests(self.frontend_slices)

    def batches(self) -> BatchTotals:
        """The sums over the workers."""
        *columns, tables = zip(*self.workers, strict=True)
        by_rows = {
            rows: _sum([table.get(rows, (0, 0)) for table in tables])
            for rows in sorted(set().union(*tables))
        }
        return BatchTotals._make([*map(_sum, columns), by_rows])


class Sketches(NamedTuple):
    """Counts by bucket (`SKETCH_BOUNDS_NS`), without those that are 0; sums over all sections.

    Attributes:
        latency: of requests that were answered with outputs.
        slice_latency: of those, the slices'.
        compute: of runs, by their `rows_class`.
    """

    latency: dict[int, int]
    slice_latency: dict[int, int]
    compute: dict[int, dict[int, int]]


class Ledger:
    """The counters of one version.

    Args:
        board: writable buffer of `board_bytes`; its size says how many front ends there are. Held for as
            long as this or one of the counters lives.
        workers: seats on the board.
    """

    def __init__(self, board: Buffer, workers: int) -> None:
        self._board = board
        self._workers = workers
        self._offset = ring.board_bytes(workers)
        a_frontend_bytes = board_bytes(2, workers) - board_bytes(1, workers)
        behind_bytes = memoryview(board).nbytes - board_bytes(1, workers)
        self._frontends = 1 + behind_bytes // a_frontend_bytes

    @classmethod
    def private(cls) -> Ledger:
        """One that no other process knows of, for one front end and no more than one worker."""
        return cls(bytearray(board_bytes(1, 1)), 1)

    @classmethod
    def mapped(cls, board_fd: int, workers: int) -> Ledger:
        """That of a board's memfd, which the caller closes."""
        return cls(mmap.mmap(board_fd, 0), workers)  # 0: all of it

    def copy(self) -> Ledger:
        """A private one with the same numbers."""
        return Ledger(bytearray(self._board), self._workers)

    def requests(self, frontend: int) -> RequestCounters:
        """Take over a front end's section, as its only writer. ValueError where it has none."""
        return self._counters(frontend, 0)

    def slice(self, frontend: int) -> RequestCounters:
        """The same of its slice's section."""
        return self._counters(frontend, self._frontends)

    def batches(self, seat: int) -> BatchCounters:
        """Take over a worker's section, as its only writer; that is counted as a start."""
        return BatchCounters(self._board, self._offset, seat)

    def read(self) -> Snapshot:
        """What has been counted so far, but for sketches."""
        requests, workers = ledger.read(self._board, self._offset, self._frontends, self._workers)
        totals = [RequestTotals(**section) for section in requests]
        return Snapshot(
            totals[: self._frontends],
            totals[self._frontends :],
            [BatchTotals(**section) for section in workers],
        )

    def sketches(self) -> Sketches:
        """The durations that have been counted so far."""
        return Sketches(*ledger.sketches(self._board, self._offset, self._frontends, self._workers))

    def _counters(self, frontend: int, first: int) -> RequestCounters:
        if not 0 <= frontend < self._frontends:
            raise ValueError(f"front end {frontend}: there are {self._frontends}, from 0")
        return RequestCounters(self._board, self._offset, self._workers, first + frontend)


def board_bytes(frontends: int, workers: int) -> int:
    """Bytes of a board: a seat for each worker, and the ledger behind them."""
    return ring.board_bytes(workers) + ledger.ledger_bytes(frontends, workers)


def rows_class(rows: int) -> int:
    """The class of rows that runs of so many rows are compared in: its most rows; 0: any number."""
    place = bisect_left(ledger.ROW_CLASSES, rows, hi=len(ledger.ROW_CLASSES) - 1)
    return ledger.ROW_CLASSES[place]


def _requests(sections: list[RequestTotals]) -> RequestTotals:
    latest_ms = max(section.last_inference_ms for section in sections)
    columns = zip(*sections, strict=True)
    return RequestTotals(*map(_sum, columns))._replace(last_inference_ms=latest_ms)


def _sum(column: Sequence[Any]) -> Any:
    """The sum of numbers, or cell by cell of tuples. It wraps, as every counter does."""
    if isinstance(column[0], tuple):
        return tuple(sum(cells) & _MASK for cells in zip(*column, strict=True))
    return sum(column) & _MASK
