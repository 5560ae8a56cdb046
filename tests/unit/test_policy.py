"""When a worker seals: values in, decision out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.policy import SEAL_NOW, Offer, decide


def test_without_a_delay_an_idle_worker_seals_at_once():
    assert decide(Offer(1, 64, oldest_ns=100, is_retry=False), 100, 0) == SEAL_NOW


def test_a_part_batch_is_held_until_its_oldest_row_is_due():
    assert decide(Offer(1, 64, oldest_ns=100, is_retry=False), 150, 500) == 600


def test_a_full_batch_and_a_retry_are_never_held():
    assert decide(Offer(64, 64, oldest_ns=100, is_retry=False), 100, 500) == SEAL_NOW
    assert decide(Offer(1, 64, oldest_ns=100, is_retry=True), 100, 500) == SEAL_NOW


@given(
    rows=st.integers(1, 64),
    oldest=st.integers(1, 10**12),
    waited=st.integers(0, 10**9),
    delay=st.integers(0, 10**9),
)
def test_no_row_is_held_beyond_the_delay(rows, oldest, waited, delay):
    until = decide(Offer(rows, 64, oldest, is_retry=False), oldest + waited, delay)
    if waited >= delay:
        assert until == SEAL_NOW
    elif until != SEAL_NOW:
        assert oldest + waited < until <= oldest + delay
