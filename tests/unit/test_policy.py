"""When a worker seals: values in, decision out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.policy import Offer, hold_until


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
