"""What a batch of so many rows costs, and how soon another row comes: learned from the batches that ran.

A run of n rows takes about a + b·n. The line is fitted by least squares in which older runs count less and
less (recursive least squares with forgetting, kept as its five sums). Where the truth bends - a cache that
overflows, a kernel that changes - a median for each number of rows says more than any line: it is believed
where there is one, and the line tells what lies beyond. Rejected: AIMD on the batch size (Clipper, NSDI '17),
which has to miss a target to find it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence, ValuesView
from typing import Generic, TypeVar

FORGET = 0.98
"""What a run's weight in the line shrinks to with each later one: the last 50 or so count."""

WINDOW = 9
"""Runs that a median is taken of; an odd number."""

ENOUGH = 3
"""Runs of a number of rows after which its median is believed."""

EVERY = 8
"""Once a number of rows has `WARM` runs, only one in so many is looked at: learning costs time as well."""

WARM = 16

MAX_SIZES = 64
"""Numbers of rows that have a median, of one shape; the one that ran longest ago makes room."""

STALE_RUNS = 512
"""Runs after which a median of a size that did not run any more is dropped: it is tried again."""

WORSE = 0.75
"""A size counts as worse than others where it runs at less than this part of the most rows a second."""

OUTLIER = 3.0
"""A run that took so many times the median of its size moves the line no further than that."""

MIXED = 0.5
"""Part of the cost taken as fixed while all runs had the same number of rows, which tells nothing of it."""

UNSURE = 1.25
"""By how much a cost that was only guessed may be exceeded."""

MAX_SHAPES = 256
"""Shapes whose costs are remembered; clients choose shapes. The one that was met longest ago makes room."""

K = TypeVar("K")
V = TypeVar("V")


class Line:
    """A fit of y = a + b·x that forgets; a and b are never negative."""

    __slots__ = ("a", "b", "w", "wx", "wxx", "wxy", "wy")

    def __init__(self) -> None:
        self.w = self.wx = self.wy = self.wxx = self.wxy = 0.0
        self.a = self.b = 0.0

    def add(self, x: float, y: float) -> None:
        """Take a point into account."""
        self.w = self.w * FORGET + 1.0
        self.wx = self.wx * FORGET + x
        self.wy = self.wy * FORGET + y
        self.wxx = self.wxx * FORGET + x * x
        self.wxy = self.wxy * FORGET + x * y
        mean_x, mean_y = self.wx / self.w, self.wy / self.w
        varies = self.wxx / self.w - mean_x * mean_x
        if varies > 1e-3 * mean_x * mean_x:
            slope = (self.wxy / self.w - mean_x * mean_y) / varies
        else:
            slope = (1 - MIXED) * mean_y / mean_x
        self.b = min(max(slope, 0.0), mean_y / mean_x)
        self.a = mean_y - self.b * mean_x

    def at(self, x: float) -> float:
        """The fitted value at x."""
        return self.a + self.b * x


class _Size:
    """The runs of one number of rows."""

    __slots__ = ("last", "median", "recent", "runs", "slowest")

    def __init__(self) -> None:
        self.recent: deque[int] = deque(maxlen=WINDOW)
        self.runs = 0
        self.last = 0  # of the shape's runs
        self.median = self.slowest = 0

    def add(self, duration_ns: int) -> None:
        self.recent.append(duration_ns)
        ordered = sorted(self.recent)
        self.median, self.slowest = ordered[len(ordered) // 2], ordered[-1]


class Cost:
    """The cost of runs of one shape on one device.

    Attributes:
        best_rows: the largest number of rows that runs at about the most rows a second, where larger
            ones were found to run at clearly fewer; 0: none were.
        saves_ns: what one run less saves, as far as known: the fixed part of a run.

    Args:
        sizes: what batches are padded to, ascending; the cost of n rows is that of the size they get.
    """

    __slots__ = ("_known", "_line", "_runs", "_sizes", "_table", "best_rows", "saves_ns")

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self._sizes = tuple(sizes)
        self._table: dict[int, _Size] = {}
        self._known: list[int] = []  # of the table, those that are believed; ascending
        self._line = Line()
        self._runs = 0
        self.best_rows = 0
        self.saves_ns = 0.0

    def forget(self) -> None:
        """Know nothing any more, which takes next to no memory."""
        self._table.clear()
        self._known.clear()
        self._line = Line()
        self.best_rows = 0
        self.saves_ns = 0.0

    def padded(self, rows: int) -> int:
        """The size at which so many rows run."""
        sizes = self._sizes
        if not sizes:
            return rows
        at = bisect_left(sizes, rows)
        return sizes[at] if at < len(sizes) else rows

    def observe(self, rows: int, duration_ns: int) -> bool:
        """A run of so many rows, those made up for padding included, took so long.

        Returns:
            Whether `best_rows` is another one now.
        """
        self._runs += 1
        size = self._table.get(rows)
        if size is None:
            size = self._make(rows)
        size.runs += 1
        size.last = self._runs
        if size.runs > WARM and size.runs % EVERY:
            return False
        shown_ns = duration_ns
        if size.runs == ENOUGH:
            insort(self._known, rows)
        elif size.runs > ENOUGH:
            shown_ns = min(duration_ns, int(size.median * OUTLIER))
        size.add(duration_ns)
        self._line.add(rows, shown_ns)
        self.saves_ns = self._line.a
        former = self.best_rows
        if size.runs >= WINDOW:
            self._find_best()
        return self.best_rows != former

    def expected_ns(self, rows: int) -> float | None:
        """What a batch of so many rows will take; None while nothing is known."""
        rows = self.padded(rows)
        size = self._table.get(rows)
        if size is not None and size.runs >= ENOUGH:
            return float(size.median)
        return self._guess(rows)

    def at_worst_ns(self, rows: int) -> float | None:
        """What it takes when it is as slow as it was lately; None while nothing is known."""
        rows = self.padded(rows)
        size = self._table.get(rows)
        if size is not None and size.runs >= ENOUGH:
            return float(size.slowest)
        guess = self._guess(rows)
        return None if guess is None else guess * UNSURE

    def _guess(self, rows: int) -> float | None:
        """From the medians of the sizes around it; beyond them along the line."""
        known = self._known
        if not known:
            return self._line.at(rows) if self._line.w else None
        at = bisect_left(known, rows)
        if 0 < at < len(known):
            low, high = known[at - 1], known[at]
            low_ns, high_ns = self._table[low].median, self._table[high].median
            return low_ns + (high_ns - low_ns) * (rows - low) / (high - low)
        nearest = known[0] if at == 0 else known[-1]
        nearest_ns = self._table[nearest].median
        slope = min(self._line.b, nearest_ns / nearest)
        return nearest_ns + slope * (rows - nearest)

    def _make(self, rows: int) -> _Size:
        if len(self._table) >= MAX_SIZES:
            self._drop(min(self._table, key=lambda n: self._table[n].last))
        size = self._table[rows] = _Size()
        return size

    def _drop(self, rows: int) -> None:
        del self._table[rows]
        if rows in self._known:
            self._known.remove(rows)

    def _find_best(self) -> None:
        for rows in [n for n, s in self._table.items() if self._runs - s.last > STALE_RUNS]:
            self._drop(rows)
        rates = [
            (n / max(1, self._table[n].median), n)
            for n in self._known
            if self._table[n].runs >= WINDOW
        ]
        enough = max(rates)[0] * WORSE
        best = max(n for rate, n in rates if rate >= enough)
        self.best_rows = best if best < rates[-1][1] else 0


class Arrivals:
    """How long it is between two rows of one shape, by the batches that one worker took.

    A worker beside others sees only some of the batches, and thinks that rows are rarer than they are.
    """

    __slots__ = ("_oldest_ns", "_rows", "gap_ns")

    SLOW = 32
    """Rows over which the mean runs."""

    JUMP = 8.0
    """A gap counts as so many times the mean at most: a pause is not the pace after it."""

    def __init__(self) -> None:
        self.gap_ns = math.inf
        self._oldest_ns = 0
        self._rows = 0

    def took(self, rows: int, oldest_ns: int) -> None:
        """A batch of so many rows was taken, whose first one came then."""
        if self._rows and oldest_ns > self._oldest_ns:
            gap_ns = (oldest_ns - self._oldest_ns) / self._rows
            if self.gap_ns == math.inf:
                self.gap_ns = gap_ns
            else:
                weight = min(1.0, self._rows / self.SLOW)
                self.gap_ns += weight * (min(gap_ns, self.gap_ns * self.JUMP) - self.gap_ns)
        self._oldest_ns, self._rows = oldest_ns, rows


class Recent(Generic[K, V]):
    """A map that holds so many entries; the one that was asked for longest ago makes room.

    Args:
        limit: entries.
        on_drop: called with the value of one that made room.
    """

    def __init__(self, limit: int, on_drop: Callable[[V], None]) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._limit = limit
        self._on_drop = on_drop

    def get(self, key: K) -> V | None:
        """The entry, which is now the youngest; None where there is none."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def values(self) -> ValuesView[V]:
        """Of all entries."""
        return self._entries.values()

    def put(self, key: K, value: V) -> V:
        """Add an entry; returns its value."""
        self._entries[key] = value
        if len(self._entries) > self._limit:
            self._on_drop(self._entries.popitem(last=False)[1])
        return value
