"""When a worker seals, and whose turn it is in the queue: values in, decision out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.policy import RISE_NS, Offer, hold_until, next_level


def test_without_a_delay_an_idle_worker_seals_at_once():
    assert hold_until(Offer(oldest_ns=100, is_complete=False), 100, 0) is None


def test_a_part_batch_is_held_until_its_oldest_row_is_due():
    assert hold_until(Offer(oldest_ns=100, is_complete=False), 150, 500) == 600


def test_a_complete_batch_is_never_held():
    assert hold_until(Offer(oldest_ns=100, is_complete=True), 100, 500) is None


@given(oldest=st.integers(1, 10**12), waited=st.integers(0, 10**9), delay=st.integers(0, 10**9))
def test_no_row_is_held_beyond_the_delay(oldest, waited, delay):
    until = hold_until(Offer(oldest, is_complete=False), oldest + waited, delay)
    if waited >= delay:
        assert until is None
    else:
        assert until == oldest + delay > oldest + waited


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
