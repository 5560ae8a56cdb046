"""What batches cost and how soon rows come, as a worker learns it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.costs import (
    ENOUGH,
    MAX_SIZES,
    OUTLIER,
    STALE_RUNS,
    WARM,
    WINDOW,
    Arrivals,
    Cost,
    Line,
    Recent,
)


def learned(law, sizes, runs=WINDOW, allowed=()) -> Cost:
    """A cost that saw so many runs of each size, whose durations follow a law."""
    cost = Cost(allowed)
    for _ in range(runs):
        for n in sizes:
            cost.observe(n, law(n))
    return cost


def affine(n: int) -> int:
    return 10_000 + 500 * n


@given(a=st.integers(0, 10**9), b=st.integers(0, 10**7), xs=st.sets(st.integers(1, 32), min_size=1))
def test_a_line_through_points_of_a_line_is_that_line(a, b, xs):
    line = Line()
    for x in [*xs, 64, *xs, 64]:
        line.add(x, a + b * x)
    assert line.at(300) == pytest.approx(a + b * 300, rel=1e-3, abs=1e-3)


@given(st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 10**12)), min_size=1, max_size=60))
def test_a_line_never_falls_nor_starts_below_zero(points):
    line = Line()
    for x, y in points:
        line.add(x, y)
    assert line.a >= -1e-6 * max(y for _, y in points)
    assert line.b >= 0


def test_a_line_forgets():
    line = Line()
    for x in range(1, 100):
        line.add(x % 8 + 1, 1_000_000)
    for x in range(1, 400):
        line.add(x % 8 + 1, affine(x % 8 + 1))
    assert line.at(4) == pytest.approx(affine(4), rel=0.05)


def test_nothing_is_known_before_the_first_run():
    assert Cost().expected_ns(1) is None
    assert Cost().at_worst_ns(1) is None


def test_costs_of_sizes_that_never_ran_follow_the_line():
    cost = learned(affine, (1, 4, 8))
    assert cost.expected_ns(2) == pytest.approx(affine(2))
    assert cost.expected_ns(32) == pytest.approx(affine(32), rel=0.01)
    assert cost.saves_ns == pytest.approx(10_000, rel=0.01)


def test_where_the_truth_bends_the_runs_of_that_size_are_believed():
    def bent(n: int) -> int:
        return affine(n) * (3 if n > 8 else 1)

    cost = learned(bent, (1, 4, 8, 16, 24))
    for n in (1, 8, 16, 24):
        assert cost.expected_ns(n) == bent(n)
    assert cost.expected_ns(20) == pytest.approx((bent(16) + bent(24)) / 2)


def test_padded_rows_cost_what_their_size_costs():
    cost = learned(affine, (4, 16), allowed=(4, 16))
    assert [cost.padded(n) for n in (1, 4, 5, 16, 17)] == [4, 4, 16, 16, 17]
    assert cost.expected_ns(1) == affine(4)
    assert cost.expected_ns(5) == affine(16)


def test_one_slow_run_changes_neither_the_median_nor_the_line_by_much():
    cost = learned(affine, (2, 6), runs=10)
    cost.observe(2, 1000 * affine(2))
    assert cost.expected_ns(2) == affine(2)
    assert cost.expected_ns(4) == affine(4)
    assert cost.at_worst_ns(2) == 1000 * affine(2)
    assert cost.expected_ns(64) < OUTLIER * affine(64)


def test_the_median_follows_when_runs_get_slower_for_good():
    cost = learned(affine, (2,), runs=3 * WARM)
    for _ in range(200):
        cost.observe(2, 4 * affine(2))
    assert cost.expected_ns(2) == cost.at_worst_ns(2) == 4 * affine(2)


def test_a_guess_is_unsure():
    cost = learned(affine, (1, 8))
    assert cost.at_worst_ns(4) > cost.expected_ns(4)
    assert cost.at_worst_ns(8) == cost.expected_ns(8)


def test_few_runs_of_a_size_are_not_believed():
    cost = learned(affine, (1, 8))
    for _ in range(ENOUGH - 1):
        cost.observe(4, 10**9)
    assert cost.expected_ns(4) < 10**8
    cost.observe(4, 10**9)
    assert cost.expected_ns(4) == 10**9


def worse_beyond(best: int):
    """Rows a second rise up to a size, and are much fewer beyond."""
    return lambda n: affine(n) if n <= best else 4 * affine(n)


def test_the_best_size_is_known_once_a_larger_one_was_worse():
    cost = Cost()
    changes = []
    for _ in range(WINDOW):
        for n in (1, 8, 32):
            if cost.observe(n, worse_beyond(8)(n)):
                changes.append(cost.best_rows)
    assert changes == [8]


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (1, 8, 32)])
def test_there_is_no_best_size_while_larger_ones_are_better_or_never_ran(sizes):
    assert learned(affine, sizes).best_rows == 0


def test_a_size_that_is_hardly_worse_is_not_shunned():
    cost = learned(lambda n: 1000 * n + (n == 32) * 1000, (8, 16, 32))
    assert cost.best_rows == 0


def test_a_size_that_was_worse_long_ago_is_tried_again():
    cost = learned(worse_beyond(8), (1, 8, 32))
    assert cost.best_rows == 8
    changes = [cost.best_rows for _ in range(STALE_RUNS + 16) if cost.observe(8, affine(8))]
    assert changes == [0]


def test_the_sizes_that_are_remembered_are_bounded():
    cost = Cost()
    for n in range(1, 20 * MAX_SIZES):
        for _ in range(ENOUGH):
            cost.observe(n, affine(n))
    assert len(cost._table) == MAX_SIZES
    assert len(cost._known) <= MAX_SIZES
    assert cost.expected_ns(n) == affine(n)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 10**10)), max_size=80), st.integers(1, 99)
)
def test_what_is_expected_is_a_cost(runs, rows):
    cost = Cost()
    for n, duration_ns in runs:
        cost.observe(n, duration_ns)
    expected, worst = cost.expected_ns(rows), cost.at_worst_ns(rows)
    if runs:
        assert 0 <= expected <= worst
        assert math.isfinite(worst)
    assert cost.best_rows in {0, *(n for n, _ in runs)}


def test_the_gap_is_time_by_rows():
    arrivals = Arrivals()
    assert arrivals.gap_ns == math.inf
    arrivals.took(4, 1000)
    assert arrivals.gap_ns == math.inf
    arrivals.took(2, 1400)
    assert arrivals.gap_ns == 100
    for at in range(100):
        arrivals.took(2, 1600 + 200 * at)
    assert arrivals.gap_ns == pytest.approx(100)
    for at in range(200):
        arrivals.took(2, 30_000 + 40 * at)
    assert arrivals.gap_ns == pytest.approx(20, rel=0.05)


def test_a_pause_is_not_the_pace_after_it():
    arrivals = Arrivals()
    for at in (0, 100, 200):
        arrivals.took(1, at)
    arrivals.took(1, 10**12)
    assert arrivals.gap_ns < 2 * 100


def test_slots_that_are_taken_out_of_order_tell_nothing():
    arrivals = Arrivals()
    for at in (100, 300, 200):
        arrivals.took(1, at)
    assert arrivals.gap_ns == 200


def test_what_was_asked_for_longest_ago_makes_room():
    dropped = []
    recent = Recent(2, dropped.append)
    assert recent.put("a", 1) == 1
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]
    assert sorted(recent.values()) == [1, 3]
    assert dropped == [2]


def test_a_cost_that_was_forgotten_is_learned_anew():
    cost = learned(worse_beyond(8), (1, 8, 32))
    cost.forget()
    assert (cost.best_rows, cost.saves_ns, cost.expected_ns(8)) == (0, 0, None)
    cost.observe(8, 7)
    assert cost.expected_ns(8) == pytest.approx(7)
