"""The log of events, as those see it who wait for news."""

from __future__ import annotations

import asyncio

import pytest

from gateway.control.journal import Journal, event
from gateway.store.store import AsyncStore, Store

NEWS = event("version.ready", "m", "it is ready")


@pytest.fixture
async def store(tmp_path):
    store = AsyncStore(Store(f"sqlite:///{tmp_path}/state.db"))
    await store.open()
    yield store
    await store.close()


async def test_looking_wakes_nobody_without_news(store):
    journal = Journal(store)
    await journal.write(NEWS)
    await asyncio.wait_for(journal.wait(0), 10)
    waiting = asyncio.ensure_future(journal.wait(1))
    await journal.look()
    await store.call(Store.revision)  # the loop has turned
    assert not waiting.done()
    await Journal(store).write(NEWS)  # another process
    await journal.look()
    await asyncio.wait_for(waiting, 10)


async def test_what_was_before_the_start_is_known(store):
    await Journal(store).write(NEWS, NEWS)
    journal = Journal(store)
    await journal.look()
    await asyncio.wait_for(journal.wait(1), 10)
