"""A histogram of latencies with a bounded relative error, as in HdrHistogram (hdrhistogram.org).

Buckets are linear within each power of two and twice as wide in the next. So one addition records a value,
memory is bounded whatever comes, and a percentile is as exact for 100 µs as for 10 s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

_BUCKET_BITS = 7
_PER_OCTAVE = 1 << _BUCKET_BITS

RELATIVE_ERROR = 1 / _PER_OCTAVE
"""By how much a percentile may exceed the value that it stands for, as a part of it: under 1 %."""

MAX_NS = (1 << 46) - 1
"""Longest latency that is told apart, 19 hours; a longer one counts as this."""


def _bucket(value: int) -> int:
    """The bucket that a value falls into."""
    shift = max(0, value.bit_length() - _BUCKET_BITS - 1)
    return (shift << _BUCKET_BITS) + (value >> shift)


def _last_of(bucket: int) -> int:
    """The largest value of a bucket."""
    shift = max(0, (bucket >> _BUCKET_BITS) - 1)
    return ((bucket - (shift << _BUCKET_BITS) + 1) << shift) - 1


class Histogram:
    """Counts latencies in nanoseconds. ``count``, ``sum_ns``, ``min_ns`` and ``max_ns`` are exact.

    The last two are 0 as long as nothing is recorded.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sum_ns = 0
        self.min_ns = 0
        self.max_ns = 0
        self._counts = [0] * (_bucket(MAX_NS) + 1)

    def record(self, value_ns: int) -> None:
        """Count one latency, not negative."""
        if value_ns > MAX_NS:
            value_ns = MAX_NS
        self._counts[_bucket(value_ns)] += 1
        if value_ns < self.min_ns or not self.count:
            self.min_ns = value_ns
        if value_ns > self.max_ns:
            self.max_ns = value_ns
        self.count += 1
        self.sum_ns += value_ns

    @property
    def mean_ns(self) -> float:
        """The exact mean; 0 where nothing is recorded."""
        return self.sum_ns / self.count if self.count else 0.0

    def percentile_ns(self, percent: float) -> int:
        """The latency that so many percent do not exceed, never understated, `RELATIVE_ERROR` at most over.

        0 where nothing is recorded.
        """
        wanted = max(1, math.ceil(self.count * percent / 100))
        seen = 0
        for value_ns, count in self.buckets():
            seen += count
            if seen >= wanted:
                return value_ns
        return self.max_ns

    def buckets(self) -> Iterator[tuple[int, int]]:
        """The largest value of each bucket that is not empty, and its count, ascending."""
        for bucket, count in enumerate(self._counts):
            if count:
                yield min(_last_of(bucket), self.max_ns), count

    def rows(self, bounds_ns: list[int]) -> list[int]:
        """Counts between ascending bounds: up to each of them, and one more for what is above the last.

        A bucket counts where its largest value does.
        """
        counts = [0] * (len(bounds_ns) + 1)
        row = 0
        for value_ns, count in self.buckets():
            while row < len(bounds_ns) and value_ns > bounds_ns[row]:
                row += 1
            counts[row] += count
        return counts
