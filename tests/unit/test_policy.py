"""When a worker seals, and whose turn it is in the queue: values in, decision out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.costs import WINDOW, Cost
from gateway.serving.policy import (
    COPY_NS,
    RISE_NS,
    SLACK_NS,
    Offer,
    hold_until,
    next_level,
    together,
)

MS = 1_000_000
FIXED, EACH = 50 * MS, MS // 100
SLO = 85 * MS
"""A row is in time where it is run at once, and late where it has to wait for a run before."""


def offer(rows: int = 1, oldest_ns: int = 100, due_ns: int = 0, is_complete: bool = False) -> Offer:
    return Offer(rows, oldest_ns, oldest_ns, due_ns, is_complete, 32)


def law(n: int) -> int:
    """What runs of n rows take, in ns."""
    return FIXED + EACH * n


def learned(law=law, sizes=(1, 2, 4, 8, 16), allowed=()) -> Cost:
    cost = Cost(allowed)
    for _ in range(WINDOW):
        for n in sizes:
            cost.observe(n, law(n))
    return cost


def test_without_a_delay_an_idle_worker_seals_at_once():
    assert hold_until(offer(), 100) is None


def test_a_part_batch_is_held_until_its_oldest_row_is_due():
    assert hold_until(offer(), 150, 500) == 600


def test_a_complete_batch_is_never_held():
    full = offer(due_ns=10**12, is_complete=True)
    assert hold_until(full, 100, 500, learned(), 1.0) is None


@given(oldest=st.integers(1, 10**12), waited=st.integers(0, 10**9), delay=st.integers(0, 10**9))
def test_no_row_is_held_beyond_the_delay(oldest, waited, delay):
    until = hold_until(offer(oldest_ns=oldest), oldest + waited, delay)
    if waited >= delay:
        assert until is None
    else:
        assert until == oldest + delay > oldest + waited


# --- With a due time ---------------------------------------------------------------------------


def test_a_batch_is_held_while_one_more_row_would_still_be_in_time():
    due_ns = 70 * MS
    end_ns = due_ns - law(2) - SLACK_NS
    assert hold_until(offer(oldest_ns=0, due_ns=due_ns), 0, 0, learned(), MS) == end_ns
    assert hold_until(offer(oldest_ns=0, due_ns=due_ns), end_ns, 0, learned(), MS) is None


def test_waiting_ends_when_it_costs_more_than_a_run_saves():
    """Ten rows in 50 ms now, or eleven in 50 ms and the wait: even when the wait is 5 ms."""
    latest_ns = 7 * MS
    held, cost = Offer(10, 0, latest_ns, SLO, capacity=32), learned(sizes=(10, 11, 32))
    until_ns = hold_until(held, latest_ns, 0, cost, MS)
    assert until_ns == latest_ns + FIXED // 10
    assert hold_until(held, until_ns, 0, cost, MS) is None


@pytest.mark.parametrize(
    ("rows", "gap_ms", "is_held"), [(4, 12, 1), (4, 13, 0), (8, 6, 1), (8, 7, 0)]
)
def test_rows_that_come_too_rarely_are_not_waited_for(rows, gap_ms, is_held):
    until = hold_until(offer(rows, 0, SLO), 0, 0, learned(), gap_ms * MS)
    assert (until is not None) == bool(is_held)


def test_a_next_row_that_is_expected_after_the_window_is_not_waited_for():
    due_ns = law(2) + SLACK_NS + 5 * MS
    assert hold_until(offer(1, 0, due_ns), 0, 0, learned(), 4 * MS) is not None
    assert hold_until(offer(1, 0, due_ns), 0, 0, learned(), 6 * MS) is None


def test_a_row_that_will_be_in_time_after_the_run_is_not_waited_for():
    """It comes 5 ms after this one, and is run with ten others when this one's run is over."""
    late_ns = law(1) + law(11) + SLACK_NS - 5 * MS
    assert hold_until(offer(1, 0, late_ns - MS), 0, 0, learned(), 5 * MS) is not None
    assert hold_until(offer(1, 0, 2 * late_ns), 0, 0, learned(), 5 * MS) is None


def test_nobody_is_waited_for_who_has_not_come_for_long():
    """The mean says 1 ms; nothing came for 20 ms, so the next is expected after as long again."""
    due_ns, now_ns = law(2) + SLACK_NS + 30 * MS, 20 * MS
    assert hold_until(Offer(1, 0, 15 * MS, due_ns, False, 32), now_ns, 0, learned(), MS)
    assert hold_until(Offer(1, 0, 0, due_ns, False, 32), now_ns, 0, learned(), MS) is None


def test_while_another_worker_is_idle_none_holds():
    assert hold_until(offer(1, 0, SLO), 0, 0, learned(), MS) is not None
    assert hold_until(offer(1, 0, SLO), 0, 0, learned(), MS, others_wait=True) is None


def test_nothing_is_held_for_a_due_time_while_costs_are_unknown():
    assert hold_until(offer(1, 0, SLO), 0, 0, Cost(), MS) is None
    assert hold_until(offer(1, 0, SLO), 0, 0, None, MS) is None


def test_a_delay_holds_longer_than_a_due_time_does():
    assert hold_until(offer(1, 0, 10**6), 0, 90 * MS, learned(), MS) == 90 * MS


def test_a_batch_of_the_best_size_is_not_held():
    cost = learned(lambda n: law(n) * (4 if n > 8 else 1))
    assert cost.best_rows == 8
    assert hold_until(offer(7, 0, SLO), 0, 0, cost, MS) is not None
    for rows in (8, 9):
        assert hold_until(offer(rows, 0, SLO), 0, 90 * MS, cost, MS) is None


def test_a_batch_is_not_held_where_its_rows_cost_as_much_as_come():
    """A row takes 0.2 ms of a run; one comes each 0.9 ms, or each 0.7 ms."""
    cost = learned(lambda n: FIXED + MS // 5 * n)
    assert hold_until(offer(2, 0, SLO), 0, 0, cost, 0.9 * MS) is not None
    assert hold_until(offer(2, 0, SLO), 0, 0, cost, 0.7 * MS) is None


@given(
    rows=st.integers(1, 40),
    age=st.integers(0, 200 * MS),
    idle=st.integers(0, 200 * MS),
    slo=st.integers(1, 400 * MS),
    gap=st.integers(0, 100 * MS),
)
def test_a_held_row_is_in_time_and_the_wait_is_worth_it(rows, age, idle, slo, gap):
    now = 10**9
    oldest = now - age
    until = hold_until(
        Offer(rows, oldest, now - min(age, idle), oldest + slo), now, 0, learned(), gap
    )
    if until is not None:
        assert now < until <= oldest + slo - law(rows + 1) - SLACK_NS + 1
        assert until - (now - min(age, idle)) <= FIXED / rows + 2


# --- Packing -----------------------------------------------------------------------------------


def test_fragments_are_run_together_where_that_saves_runs():
    assert together(learned(), [4, 4, 8], 64, 32) == 2


def test_fragments_of_a_cheap_model_are_run_apart():
    cheap = learned(lambda n: COPY_NS // 2 + 100 * n)
    assert together(cheap, [4, 4, 8], 64, 32) == 0


def test_no_more_than_fit_are_run_together():
    assert together(learned(), [4, 4, 8, 1], 64, 8) == 1
    assert together(learned(), [4, 5], 64, 8) == 0


def test_large_rows_are_not_copied_to_save_a_short_run():
    assert together(learned(), [4, 4], 200 * MS, 32) == 0


def test_fragments_are_not_packed_past_a_size_that_runs_badly():
    cost = learned(lambda n: law(n) * (4 if n > 8 else 1))
    assert together(cost, [4, 4, 8], 64, 32) == 1


def test_nothing_is_packed_while_costs_are_unknown_or_there_is_one():
    assert together(Cost(), [4, 4], 64, 32) == 0
    assert together(learned(), [4], 64, 32) == 0


# --- Levels ------------------------------------------------------------------------------------

S = RISE_NS


@pytest.mark.parametrize(
    ("heads", "now", "level"),
    [
        ([5], 5, 0),
        ([None, 5], 5, 1),
        ([None, None, 3 * S], 3 * S, 2),
        ([9 * S, 9 * S], 9 * S, 0),  # together: the higher one
        ([9 * S, 9 * S - 1], 9 * S, 0),  # older, but by too little to have risen
        ([9 * S, 8 * S], 9 * S, 1),  # has risen to the same level, and is older
        ([9 * S, 8 * S + 1], 9 * S, 0),
        ([9 * S, None, 7 * S], 9 * S, 2),  # two levels in two steps
        ([9 * S, None, 7 * S + 1], 9 * S, 0),
        ([8 * S, 7 * S], 9 * S, 1),  # both have risen: the older one
        ([8 * S, 8 * S], 9 * S, 0),
    ],
)
def test_the_higher_level_goes_first_until_a_lower_one_has_waited(heads, now, level):
    assert next_level(heads, now) == level


heads_ns = st.lists(st.none() | st.integers(0, 100 * S), min_size=1, max_size=64).filter(
    lambda heads: any(head is not None for head in heads)
)


@given(heads=heads_ns, waited=st.integers(0, 100 * S))
def test_it_is_the_turn_of_somebody(heads, waited):
    assert heads[next_level(heads, 100 * S + waited)] is not None


@given(others=st.lists(st.none() | st.integers(0, S), min_size=1, max_size=63))
def test_nobody_waits_longer_than_one_step_a_level_for_those_who_come_later(others):
    """The lowest level's request came first; every other one after its time was up."""
    waited = (len(others) + 1) * S
    heads = [None if ago is None else waited + 1 - ago for ago in others]
    assert next_level([*heads, 0], waited + 1) == len(others)
