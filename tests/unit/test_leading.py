"""One of the gateways that share a database leads."""

from __future__ import annotations

import pytest

import gateway.clock
from gateway.control.leading import RENEW_S, TTL_S, Leadership
from gateway.errors import Unavailable
from gateway.store.store import AsyncStore, Store

SHARED = "postgresql://somewhere"


@pytest.fixture
def clock(monkeypatch):
    """The machine's time, which is the database's too, and its wall clock, which somebody may set."""

    class Clock:
        now_s = wall_s = 1000.0
        CLOCK_BOOTTIME = 0

        def time(self) -> float:
            return self.wall_s

        def clock_gettime(self, _which: int) -> float:
            return self.now_s

    made = Clock()
    monkeypatch.setattr(gateway.clock, "time", made)
    return made


@pytest.fixture
async def store(tmp_path, clock):
    made = AsyncStore(Store(f"sqlite:///{tmp_path}/state.db", lambda: clock.now_s))
    await made.open()
    yield made
    await made.close()


async def test_a_file_has_one_gateway(store, clock):
    alone = Leadership(store, "sqlite:///state.db")
    await alone.renew()
    assert alone.is_held
    alone.check()


async def test_the_first_leads_until_it_gives_up(store, clock):
    first, second = Leadership(store, SHARED), Leadership(store, SHARED)
    assert not first.is_held
    await first.renew()
    await second.renew()
    assert (first.is_held, second.is_held) == (True, False)
    with pytest.raises(Unavailable, match="another gateway"):
        second.check()
    await first.give_up()
    clock.now_s += RENEW_S
    await second.renew()
    assert second.is_held


async def test_a_leader_that_is_gone_is_followed(store, clock):
    first, second = Leadership(store, SHARED), Leadership(store, SHARED)
    await first.renew()
    for _ in range(3):
        clock.now_s += RENEW_S
        await first.renew()
        await second.renew()
    assert (first.is_held, second.is_held) == (True, False)
    clock.now_s += TTL_S
    assert not first.is_held
    await second.renew()
    await first.renew()
    assert (first.is_held, second.is_held) == (False, True)


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
async def test_a_wall_clock_that_is_set_changes_nothing(store, clock, jump_s):
    first, second = Leadership(store, SHARED), Leadership(store, SHARED)
    await first.renew()
    clock.wall_s += jump_s
    await second.renew()
    assert (first.is_held, second.is_held) == (True, False)
    clock.now_s += TTL_S
    await second.renew()
    assert (first.is_held, second.is_held) == (False, True)
