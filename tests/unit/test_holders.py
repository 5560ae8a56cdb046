"""Who has not let go of a version's workers or of the version: whatever front ends say, in any order."""

import asyncio

import pytest

from gateway._kernels import ring
from gateway.control.holders import Holders


async def is_drained(holders: Holders) -> bool:
    waiting = asyncio.ensure_future(holders.wait_drained())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return waiting.done() or not waiting.cancel()


def numbers(holders: Holders, count: int) -> list[int]:
    return [holders.next_incarnation() for _ in range(count)]


@pytest.fixture
def holders(monkeypatch):
    """The numbers from 1 to 4; 1 was given out, and its worker is gone: front ends 0 and 1 know it."""
    monkeypatch.setattr(ring, "MAX_INCARNATION", 4)
    made = Holders()
    made.next_incarnation()
    made.worker_ended(1, [0, 1])
    return made


def test_numbers_differ_while_their_workers_live(holders):
    assert numbers(holders, 3) == [2, 3, 4]
    holders.worker_ended(3, [])
    assert numbers(holders, 1) == [3]


@pytest.mark.parametrize("last", [0, 1])
def test_a_number_comes_round_when_the_last_front_end_has_reclaimed_it(holders, last):
    numbers(holders, 3)
    holders.worker_ended(2, [])
    holders.reclaimed(1, 1 - last)
    holders.reclaimed(1, 1 - last)  # said twice, it counts once
    assert numbers(holders, 1) == [2]
    holders.reclaimed(1, last)
    assert numbers(holders, 1) == [1]


def test_a_front_end_that_is_gone_is_waited_for_no_more(holders):
    numbers(holders, 3)
    holders.reclaimed(1, 0)
    holders.frontend_gone(1)
    assert numbers(holders, 1) == [1]


def test_a_front_end_that_is_gone_frees_no_living_worker(holders):
    numbers(holders, 3)
    for frontend in (0, 1):
        holders.frontend_gone(frontend)
    holders.reclaimed(2, 0)  # nor does one that speaks of what it cannot know
    assert numbers(holders, 1) == [1]


async def test_a_version_is_drained_once_every_front_end_says_so():
    holders = Holders()
    holders.begin_drain([0, 1, 2])
    for frontend in (2, 2, 0, 7):
        holders.drained(frontend)
    assert not await is_drained(holders)
    holders.drained(1)
    assert await is_drained(holders)


async def test_a_version_is_drained_by_the_end_of_the_last_front_end():
    holders = Holders()
    holders.begin_drain([0, 1])
    holders.drained(0)
    holders.frontend_gone(1)
    assert await is_drained(holders)


async def test_what_was_said_before_it_was_asked_for_does_not_count():
    holders = Holders()
    holders.frontend_gone(0)
    holders.drained(0)  # of what had this number before
    holders.begin_drain([0])
    assert not await is_drained(holders)


async def test_where_no_front_end_lives_nothing_is_waited_for():
    holders = Holders()
    holders.begin_drain([])
    await asyncio.wait_for(holders.wait_drained(), 1)


def test_a_front_end_that_is_drained_has_reclaimed_too_and_hears_of_no_later_death(holders):
    holders.begin_drain([0, 1])
    holders.drained(0)
    holders.reclaimed(1, 1)
    assert numbers(holders, 4) == [2, 3, 4, 1]
    holders.worker_ended(2, [0, 1])  # 0 will not answer
    holders.reclaimed(2, 1)
    assert numbers(holders, 1) == [2]
