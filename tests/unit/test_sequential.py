"""Bounds that hold at every look: what they are, against brute force, and how often they are wrong."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway.rollout.sequential import Quantile, Rate, difference, ratio

ALPHAS = st.sampled_from([0.2, 0.05, 1e-3, 1e-6])
EDGES = [float(edge) for edge in range(1, 41)]


@st.composite
def rates(draw, most=3000):
    trials = draw(st.integers(0, most))
    return Rate(draw(st.integers(0, trials)), trials)


def counts(values) -> dict[int, int]:
    """By bucket of EDGES, of values that are not on an edge."""
    found: dict[int, int] = {}
    for value in values:
        bucket = min(bisect_left(EDGES, value), len(EDGES) - 1)
        found[bucket] = found.get(bucket, 0) + 1
    return found


# Rates


def exact_mixture(hits, trials):
    """The likelihood under the prior 0.9 Beta(1, 60) + 0.1 Beta(1/2, 1/2), in fractions."""

    def rising(x, n):
        result = Fraction(1)
        for i in range(n):
            result *= x + i
        return result

    def beta(a, b):
        misses = trials - hits
        return rising(a, hits) * rising(b, misses) / rising(a + b, trials)

    half = Fraction(1, 2)
    return Fraction(9, 10) * beta(1, 60) + Fraction(1, 10) * beta(half, half)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 50), (3, 50), (50, 50), (20, 41)])
@pytest.mark.parametrize("rate", [Fraction(1, 1000), Fraction(1, 7), Fraction(9, 10)])
def test_evidence_is_the_logarithm_of_the_mixed_likelihood_by_that_of_the_rate(hits, trials, rate):
    likelihood = rate**hits * (1 - rate) ** (trials - hits)
    expected = math.log(exact_mixture(hits, trials) / likelihood)
    assert Rate(hits, trials).evidence(float(rate)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.3, 0.97])
def test_the_quotient_is_a_martingale_that_begins_at_1(rate):
    assert Rate(0, 0).evidence(0.5) == pytest.approx(0, abs=1e-12)
    for trials in range(60):
        for hits in range(trials + 1):
            now = math.exp(Rate(hits, trials).evidence(rate))
            hit = math.exp(Rate(hits + 1, trials + 1).evidence(rate))
            miss = math.exp(Rate(hits, trials + 1).evidence(rate))
            assert rate * hit + (1 - rate) * miss == pytest.approx(now, rel=1e-9)


def test_the_chance_to_be_wrong_at_any_look_counted_path_by_path():
    """Every sequence of 400 trials, as a walk over (trials, hits) that ends when the rate is refuted."""
    for rate, alpha in product((0.01, 0.05, 0.5), (0.2, 0.02)):
        alive, wrong = {0: 1.0}, 0.0
        for trials in range(1, 401):
            following: dict[int, float] = {}
            for hits, chance in alive.items():
                for more, part in ((0, 1 - rate), (1, rate)):
                    following[hits + more] = following.get(hits + more, 0.0) + chance * part
            alive = {}
            for hits, chance in following.items():
                if chance < 1e-14:
                    wrong += chance  # cautious, and it keeps the walk small
                elif Rate(hits, trials).evidence(rate) >= -math.log(alpha):
                    wrong += chance
                else:
                    alive[hits] = chance
        assert wrong <= alpha


@given(rates(), ALPHAS)
def test_bounds_of_a_rate_are_where_the_evidence_suffices(rate, alpha):
    low, high = rate.bounds(alpha)
    room = -math.log(alpha)
    assert 0 <= low <= high <= 1
    for bound, further, nearer in ((low, -1, 1), (high, 1, -1)):
        inside = bound + nearer * 1e-7
        if 0 < bound < 1:
            assert rate.evidence(bound) >= room
        if low < inside < high:
            assert rate.evidence(inside) < room
        outside = bound + further * 1e-7
        if 0 < outside < 1:
            assert rate.evidence(outside) >= room


@given(st.integers(1, 10**6), ALPHAS)
def test_without_hits_or_misses_one_bound_is_the_end_and_the_other_is_known(trials, alpha):
    none, every = Rate(0, trials), Rate(trials, trials)
    mixture = none.evidence(0.5) + trials * math.log(0.5)
    expected = -math.expm1((mixture + math.log(alpha)) / trials)
    assert none.bounds(alpha).low == 0
    assert none.bounds(alpha).high == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert every.bounds(alpha).high == 1
    assert every.bounds(alpha).low < 1


def test_nothing_is_known_without_trials():
    nothing = Rate(0, 0)
    assert nothing.bounds(0.01) == (0, 1)
    assert difference(nothing, nothing, 0.01) == (-1, 1)
    low, high = difference(Rate(3, 100), nothing, 0.01)
    alone = Rate(3, 100).bounds(0.01)
    assert low == pytest.approx(alone.low - 1, abs=1e-8)
    assert high == pytest.approx(alone.high, abs=1e-8)


@pytest.mark.parametrize(("hits", "trials"), [(-1, 3), (4, 3), (0, -1)])
def test_counts_that_cannot_be_are_refused(hits, trials):
    with pytest.raises(ValueError, match="expected hits"):
        Rate(hits, trials)


def test_counts_of_a_year_do_not_lose_precision():
    billion = 10**9
    low, high = Rate(billion // 100, billion).bounds(1e-3)
    assert 0.00998 < low < 0.01 < high < 0.01002
    low, high = difference(Rate(billion // 100, billion), Rate(billion // 100, billion), 1e-3)
    assert -4e-5 < low < 0 < high < 4e-5


@given(rates(), rates(), ALPHAS)
def test_a_difference_is_antisymmetric_and_contains_the_observed_one(first, second, alpha):
    low, high = difference(first, second, alpha)
    assert -1 <= low <= high <= 1
    back = difference(second, first, alpha)
    assert back == pytest.approx((-high, -low), abs=1e-12)
    if first.trials and second.trials:
        assert low <= first.hits / first.trials - second.hits / second.trials <= high


def evidence_at(rate, points):
    """Of many rates at once."""
    misses = rate.trials - rate.hits
    likelihood = np.where(rate.hits > 0, rate.hits * np.log(np.maximum(points, 1e-300)), 0.0)
    likelihood += np.where(misses > 0, misses * np.log(np.maximum(1 - points, 1e-300)), 0.0)
    return rate.evidence(0.5) + rate.trials * math.log(0.5) - likelihood


def least_difference_by_scan(first, second, alpha):
    """For every first rate on a grid, the greatest second rate that the region still has."""
    grid = np.linspace(0, first.hits / first.trials, 4001)
    room = -math.log(alpha) - evidence_at(first, grid)
    inside = np.full_like(grid, second.hits / second.trials)
    grid = grid[evidence_at(second, inside) < room]
    room = -math.log(alpha) - evidence_at(first, grid)
    inside, outside = inside[: len(grid)], np.ones_like(grid)
    for _ in range(40):
        middle = (inside + outside) / 2
        is_in = evidence_at(second, middle) < room
        inside, outside = np.where(is_in, middle, inside), np.where(is_in, outside, middle)
    return float((grid - outside).min())


@settings(max_examples=40)
@given(rates(400), rates(400), st.sampled_from([0.2, 0.01]))
def test_a_difference_is_the_extreme_over_the_region(first, second, alpha):
    assume(first.trials and second.trials)
    low, high = difference(first, second, alpha)
    assert low == pytest.approx(least_difference_by_scan(first, second, alpha), abs=1e-3)
    assert high == pytest.approx(-least_difference_by_scan(second, first, alpha), abs=1e-3)


NEARLY = 1e-3
"""A mixture of two priors is monotone but for the turn from the one to the other."""


@given(st.integers(0, 200), st.integers(0, 200), st.integers(200, 2000), ALPHAS)
def test_more_hits_raise_both_bounds_of_a_difference(hits, others, trials, alpha):
    fewer = difference(Rate(hits, trials), Rate(others, 2000), alpha)
    more = difference(Rate(min(hits + 1, trials), trials), Rate(others, 2000), alpha)
    assert more.low >= fewer.low - NEARLY
    assert more.high >= fewer.high - NEARLY


@given(rates(), rates(), st.floats(1e-9, 0.4), st.floats(0.01, 0.9))
def test_less_alpha_makes_no_bound_narrower(first, second, alpha, part):
    for wide, narrow in (
        (first.bounds(alpha * part), first.bounds(alpha)),
        (difference(first, second, alpha * part), difference(first, second, alpha)),
    ):
        assert wide.low <= narrow.low + 1e-9
        assert wide.high >= narrow.high - 1e-9


def looks(rng, rates_by_time, weight):
    """(canary hits and trials, baseline hits and trials) at each look, of rates that both share."""
    totals = np.zeros(4, np.int64)
    for rate in rates_by_time:
        n = rng.binomial(100, weight)
        totals += (rng.binomial(n, rate), n, rng.binomial(100 - n, rate), 100 - n)
        yield totals.tolist()


@pytest.mark.parametrize("moves", [False, True], ids=["steady", "moving"])
def test_equal_rates_are_seldom_told_apart_at_any_look(moves):
    """Within alpha, and also where both rates swing from 1 % to 30 %."""
    rng = np.random.default_rng(7)
    rate = np.where(np.arange(50) // 5 % 2, 0.3, 0.01) if moves else np.full(50, 0.05)
    alpha, runs, wrong = 0.1, 80, 0
    for _ in range(runs):
        for hits, trials, others, rest in looks(rng, rate, 0.3):
            low, high = difference(Rate(hits, trials), Rate(others, rest), alpha)
            if not low <= 0 <= high:
                wrong += 1
                break
    assert wrong <= alpha * runs


# Quantiles


def brute_cells(values, quantile):
    """Evidence against each range of EDGES, and beyond them, by the definition: the least over its ranks."""
    n = len(values)
    a, b = 60 * quantile, 60 * (1 - quantile)

    def against(rank):
        def beta(x, y):
            return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

        mixture = beta(rank + a, n - rank + b) - beta(a, b)
        return mixture - rank * math.log(quantile) - (n - rank) * math.log(1 - quantile)

    cells = []
    for low, high in pairwise([0.0, *EDGES[:-1], math.inf]):
        first = sum(value <= low for value in values)
        last = sum(value <= high for value in values)
        cells.append((low, high, min(against(rank) for rank in range(first, last + 1))))
    return cells


VALUES = st.lists(st.integers(0, 60).map(lambda v: v + 0.5), max_size=60)
QUANTILES = st.sampled_from([0.1, 0.5, 0.9, 0.99])


@given(VALUES, QUANTILES, ALPHAS)
def test_bounds_of_a_quantile_by_the_definition(values, quantile, alpha):
    cells = [c for c in brute_cells(values, quantile) if c[2] < -math.log(alpha)]
    low, high = Quantile(counts(values), EDGES, quantile).bounds(alpha)
    assert low <= cells[0][0]
    assert high >= cells[-1][1]
    if values:  # what is before the first value and behind the last is one range each
        assert low == cells[0][0] or cells[0][0] < min(values)
        assert high == cells[-1][1] or cells[-1][1] > max(values)


@given(VALUES, VALUES, QUANTILES, ALPHAS)
def test_a_ratio_is_the_extreme_over_all_pairs_of_ranges(ours, theirs, quantile, alpha):
    assume(ours and theirs)
    room = -math.log(alpha)
    inside = [
        (a, b)
        for a, b in product(brute_cells(ours, quantile), brute_cells(theirs, quantile))
        if a[2] + b[2] < room
    ]
    low, high = ratio(
        Quantile(counts(ours), EDGES, quantile), Quantile(counts(theirs), EDGES, quantile), alpha
    )
    least = min(a[0] / b[1] for a, b in inside)
    most = max(a[1] / b[0] if b[0] else math.inf for a, b in inside)
    assert low <= least
    assert high >= most
    is_plain = all(min(v) < a[1] and a[0] < max(v) for a, v in ((p[0], ours) for p in inside))
    is_plain &= all(min(v) < b[1] and b[0] < max(v) for b, v in ((p[1], theirs) for p in inside))
    if is_plain:  # no range before or behind all values is left
        assert low == pytest.approx(least)
        assert high == pytest.approx(most)


def test_nothing_is_known_of_a_quantile_without_samples():
    nothing = Quantile({}, EDGES, 0.5)
    some = Quantile({7: 5000}, EDGES, 0.5)
    assert nothing.samples == 0
    assert nothing.estimate() == 0
    assert nothing.bounds(0.01) == (0, math.inf)
    assert ratio(nothing, some, 0.01) == (0, math.inf)
    assert ratio(some, nothing, 0.01) == (0, math.inf)


def test_ties_are_bounded_by_their_bucket():
    ties = Quantile({9: 1000}, EDGES, 0.5)
    assert ties.bounds(0.01) == (9, 10)
    assert ratio(ties, ties, 0.01) == pytest.approx((0.9, 10 / 9))
    assert ties.estimate() == pytest.approx(9.5)


def test_the_last_bucket_is_open():
    longest = Quantile({len(EDGES) - 1: 1000}, EDGES, 0.5)
    assert longest.bounds(0.01) == (EDGES[-2], math.inf)
    assert longest.estimate() == EDGES[-2]
    assert ratio(Quantile({0: 1000}, EDGES, 0.5), longest, 0.01).low == 0


def test_few_samples_say_little():
    low, high = Quantile({5: 1, 6: 1, 30: 1}, EDGES, 0.5).bounds(0.01)
    assert (low, high) == (0, math.inf)


@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_the_quantile_of_lognormal_durations_is_seldom_left_out_at_any_look(quantile):
    rng = np.random.default_rng(11)
    alpha, runs, wrong, decided = 0.1, 60, 0, 0
    scale = {0.5: 1.0, 0.99: math.exp(0.5 * 2.3263478740408408)}[quantile]
    truth = 10.0 * scale
    edges = [10.0 * 1.03**i for i in range(-80, 120)]
    for _ in range(runs):
        totals: dict[int, int] = {}
        for _ in range(60):
            drawn = np.searchsorted(edges, 10.0 * rng.lognormal(0, 0.5, 40))
            for bucket in drawn.tolist():
                totals[bucket] = totals.get(bucket, 0) + 1
            low, high = Quantile(totals, edges, quantile).bounds(alpha)
            if not low <= truth <= high:
                wrong += 1
                break
        decided += high < 1.5 * truth and low > 0.6 * truth
    assert wrong <= alpha * runs
    assert decided > 0.8 * runs  # it holds for another reason than being wide


@given(VALUES, st.sampled_from([0.5, 0.9]), ALPHAS)
def test_coarser_buckets_make_bounds_wider_only(values, quantile, alpha):
    fine = counts(values)
    coarse: dict[int, int] = {}
    for bucket, count in fine.items():
        coarse[bucket // 2] = coarse.get(bucket // 2, 0) + count
    exact = Quantile(fine, EDGES, quantile).bounds(alpha)
    wide = Quantile(coarse, EDGES[1::2], quantile).bounds(alpha)
    assert wide.low <= exact.low
    assert wide.high >= exact.high
