"""Bounds that hold at every look at once, however often one looks and whenever one stops.

For counts, the likelihood of every rate mixed over a prior, divided by the likelihood of the true rate, is a
martingale that begins at 1. It ever reaches 1 / alpha with a probability of alpha at most (Ville), so the
rates at which it has not are a confidence sequence (Robbins 1970; Howard and Ramdas, arXiv 1906.09712;
Lindon, Sanden and Shirikian, arXiv 2205.14762). ``evidence`` below is the logarithm of that quotient.

Two versions are compared by one region: the product of two such martingales is one, hence both rates lie
where the sum of their evidences is below log(1 / alpha). The bounds of a difference or ratio are its extremes
over the region. That is narrower than the difference of two intervals (by a fifth where both versions see as
much, hardly at 5 %), and it holds on both sides together: none of them needs its own part of alpha.

Rates that change with time: within a step every request goes to the canary with the same probability, so both
versions meet the same hours, and what is bounded is their mean rates. Counts of unequal rates vary less than
those of their mean (Hoeffding 1956), and as log(1 + p (e^u - 1)) is concave in p, what the mean says against
any fixed tilt u is at most what the true rates say, at every look. The mixtures here are over rates rather
than tilts: with a rate that stays this is exact, with one that moves it is cautious in simulation. Failures
that come in one batch are not independent, and no rate but the batch's own is bounded then.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

_RATE_PRIORS = ((0.9, 1.0, 60.0), (0.1, 0.5, 0.5))
"""(weight, a, b) of beta distributions: most rates of failure are a few percent, the others can be anything.
They decide how narrow bounds are, never whether they hold."""

_RANK_PRIOR = 60.0
"""Samples that the prior of a quantile's rank is worth; bounds are narrowest at some ten times as many."""

_MOST_EVIDENCE = 60.0
"""Refutes a duration for every alpha that a double can say, whatever the other side says."""

_HALVINGS = 32
"""Of a range in which an end is sought: what remains is a part in 10^9 of it."""

_LOG_TILTS = (0.0, 60.0)
"""Logarithms of the tilts between which bounds of a difference are sought: they need one above 1 for an
alpha of a half, and less than this for 10^12 trials."""


class Bounds(NamedTuple):
    """What is not refuted, ends included."""

    low: float
    high: float


class Rate:
    """Hits among trials.

    Args:
        hits: from 0 to ``trials``.
        trials: how many there were.
    """

    def __init__(self, hits: int, trials: int) -> None:
        if not 0 <= hits <= trials:
            raise ValueError(f"expected hits from 0 to {trials}, got {hits}")
        self.hits = hits
        self.trials = trials
        terms = [
            math.log(weight) + _log_beta_ratio(hits, trials, a, b) for weight, a, b in _RATE_PRIORS
        ]
        top = max(terms)
        self._mixture = top + math.log(sum(math.exp(term - top) for term in terms))

    def evidence(self, rate: float) -> float:
        """Against this rate; ``inf`` where it is impossible."""
        return self._mixture - _log_likelihood(self.hits, self.trials, rate)

    def bounds(self, alpha: float) -> Bounds:
        """Of the rate. They contain it at every look with a probability of 1 - ``alpha`` at least."""
        if self.trials == 0:
            return Bounds(0.0, 1.0)
        room = -math.log(alpha)
        middle = self.hits / self.trials
        return Bounds(
            _edge(lambda rate: self.evidence(rate) >= room, middle, 0.0),
            _edge(lambda rate: self.evidence(rate) >= room, middle, 1.0),
        )

    def below(self, tilt: float) -> float:
        """The rate up to ``hits / trials`` where evidence falls by ``tilt`` for each unit of rate."""
        return _tilted(self.hits, self.trials, tilt)

    def above(self, tilt: float) -> float:
        """The rate from ``hits / trials`` on where evidence rises by as much."""
        return 1.0 - _tilted(self.trials - self.hits, self.trials, tilt)


def difference(first: Rate, second: Rate, alpha: float) -> Bounds:
    """Of the first rate less the second, at every look with a probability of 1 - ``alpha`` at least."""
    return Bounds(_least_difference(first, second, alpha), -_least_difference(second, first, alpha))


def _least_difference(first: Rate, second: Rate, alpha: float) -> float:
    """The least first rate less the second over the region of both.

    Evidence is convex, so there the one falls as fast as the other rises (Lagrange): one tilt leads to both.
    """
    room = -math.log(alpha)

    def is_out(log_tilt: float) -> bool:
        tilt = math.exp(log_tilt)
        return first.evidence(first.below(tilt)) + second.evidence(second.above(tilt)) >= room

    tilt = math.exp(_edge(is_out, *_LOG_TILTS))
    return first.below(tilt) - second.above(tilt)


def _tilted(hits: int, trials: int, tilt: float) -> float:
    """The lesser solution p of trials p - hits = -tilt p (1 - p), in the form that does not cancel."""
    total = trials + tilt
    root = math.sqrt(max(total * total - 4 * tilt * hits, 0.0))
    return 2 * hits / (total + root)


class _Cell(NamedTuple):
    """A range of durations in which a quantile may lie, and the least evidence against that."""

    low: float
    high: float
    evidence: float


class Quantile:
    """A quantile of durations that were counted by bucket.

    Wherever in its bucket a duration was, the bounds hold: buckets make them wider only. So do ties.

    Args:
        counts: by bucket; bucket i ends at ``edges[i]`` and begins where the one before ends, the first at 0.
            The last also has all that is longer.
        edges: in ascending order, in any unit.
        quantile: above 0 and below 1.
    """

    def __init__(self, counts: Mapping[int, int], edges: Sequence[float], quantile: float) -> None:
        self._quantile = quantile
        buckets = sorted(bucket for bucket, count in counts.items() if count)
        last = len(edges) - 1
        ranges = [
            (edges[bucket - 1] if bucket else 0.0, edges[bucket] if bucket < last else math.inf)
            for bucket in buckets
        ]
        least, most = (ranges[0][0], ranges[-1][1]) if ranges else (math.inf, math.inf)
        # Between two buckets the rank is one that both allow; before the first and behind the last it is not.
        self._ranges = [(0.0, least), *ranges, (most, math.inf)]
        self._below = [0, *accumulate((counts[bucket] for bucket in buckets), initial=0)]
        self.samples = self._below[-1]
        self._below.append(self.samples)
        self._a, self._b = _RANK_PRIOR * quantile, _RANK_PRIOR * (1 - quantile)
        self._norm = _log_beta(self._a, self._b) + math.lgamma(self.samples + _RANK_PRIOR)
        self._log_q, self._log_rest = math.log(quantile), math.log1p(-quantile)
        self._cells, self._middle = self._walk()

    def estimate(self) -> float:
        """The quantile, as if durations were spread evenly in their bucket; 0 without samples."""
        rank = self._quantile * self.samples
        for (low, high), (before, until) in zip(self._ranges, pairwise(self._below), strict=True):
            if until >= rank:
                is_open = math.isinf(high)
                return low if is_open else low + (high - low) * (rank - before) / (until - before)
        return 0.0

    def bounds(self, alpha: float) -> Bounds:
        """Of the quantile. They contain it at every look with a probability of 1 - ``alpha`` at least."""
        room = -math.log(alpha)
        left = [cell for cell in self._cells if cell.evidence < room]
        return Bounds(left[0].low, left[-1].high)

    def least_ratio(self, other: Quantile, alpha: float) -> float:
        """The least quotient of this quantile and the other one that is not refuted; 0 where any is left."""
        room = -math.log(alpha)
        least = math.inf
        j = other._middle
        for mine in self._cells[: self._middle + 1]:  # beyond it both ends only get worse
            rest = room - mine.evidence
            while j + 1 < len(other._cells) and other._cells[j + 1].evidence < rest:
                j += 1
            if other._cells[j].evidence < rest:
                least = min(least, mine.low / other._cells[j].high)
        return least

    def _walk(self) -> tuple[list[_Cell], int]:
        """The ranges that some alpha leaves, in ascending order; and the number of the one in the middle.

        Where in its bucket the quantile is, and hence its rank, is not known: of the ranks that it may have,
        the one with the least evidence counts.
        """
        likeliest = max(0, math.ceil((self.samples - 1) * self._quantile))
        middle = bisect_left(self._below, likeliest, lo=1) - 1
        cells = [self._cell(middle, likeliest)]
        for i in range(middle - 1, -1, -1):
            cells.append(self._cell(i, self._below[i + 1]))
            if cells[-1].evidence > _MOST_EVIDENCE:
                break
        cells.reverse()
        place = len(cells) - 1
        for i in range(middle + 1, len(self._ranges)):
            cells.append(self._cell(i, self._below[i]))
            if cells[-1].evidence > _MOST_EVIDENCE:
                break
        return cells, place

    def _cell(self, i: int, rank: int) -> _Cell:
        return _Cell(*self._ranges[i], self._evidence(rank))

    def _evidence(self, below: int) -> float:
        """Against a duration being the quantile when so many are not above it; as a `Rate` against one."""
        above = self.samples - below
        mixture = math.lgamma(below + self._a) + math.lgamma(above + self._b) - self._norm
        return mixture - below * self._log_q - above * self._log_rest


def ratio(first: Quantile, second: Quantile, alpha: float) -> Bounds:
    """Of the first quantile by the second, at every look with a probability of 1 - ``alpha`` at least."""
    inverse = second.least_ratio(first, alpha)
    return Bounds(first.least_ratio(second, alpha), 1 / inverse if inverse else math.inf)


def _edge(is_out: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where a range that contains ``inside`` ends towards ``outside``; rounded outwards."""
    if not is_out(outside):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if is_out(middle):
            outside = middle
        else:
            inside = middle
    return outside


def _log_likelihood(hits: int, trials: int, rate: float) -> float:
    """Of one order of hits and misses."""
    misses = trials - hits
    if (hits and rate <= 0) or (misses and rate >= 1):
        return -math.inf
    return (hits * math.log(rate) if hits else 0.0) + (
        misses * math.log1p(-rate) if misses else 0.0
    )


def _log_beta_ratio(hits: int, trials: int, a: float, b: float) -> float:
    """Logarithm of B(hits + a, misses + b) / B(a, b): the likelihood mixed over that beta distribution."""
    return _log_beta(hits + a, trials - hits + b) - _log_beta(a, b)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
