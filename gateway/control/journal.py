"""The log of events: written with what they tell of, and watched by whoever streams them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from gateway.clock import wall_s
from gateway.errors import GatewayError
from gateway.store.changes import AddEvent, Change
from gateway.store.records import EventRecord, ModelRecord
from gateway.store.store import AsyncStore, Store

log = logging.getLogger("gateway.control")

GATEWAY = "gateway"
"""The actor of what nobody asked for."""


def event(
    kind: str,
    model: str,
    text: str,
    *,
    actor: str = GATEWAY,
    rollout: str = "",
    numbers: Mapping[str, Any] | None = None,
) -> AddEvent:
    """An event of this moment, to be written."""
    return AddEvent(EventRecord(wall_s(), kind, model, actor, text, rollout, dict(numbers or {})))


class Journal:
    """Writes to the store, and says when there are new events. Belongs to the event loop.

    Args:
        store: open.
    """

    def __init__(self, store: AsyncStore) -> None:
        self._store = store
        self._last_id = 0
        self._grown = asyncio.Event()
        self._queued: list[AddEvent] = []
        self._writer: asyncio.Task[None] | None = None

    async def write(self, *changes: Change) -> None:
        """Make changes in one transaction; durable when this returns. Whoever is cancelled stops nothing."""
        self._tell(await asyncio.shield(self._store.call(Store.write, *changes)))

    async def next_revision(self, record: ModelRecord) -> int:
        """The revision of a model's next change; its first is beyond all that a deleted model had."""
        return (record.revision or await self._store.call(Store.revision)) + 1

    def note(self, kind: str, model: str, text: str) -> None:
        """Add an event that nothing waits for, soon and in order."""
        self._queued.append(event(kind, model, text))
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_queued())

    async def _write_queued(self) -> None:
        try:
            while self._queued:
                queued, self._queued = self._queued, []
                try:
                    await self.write(*queued)
                except GatewayError as error:
                    log.error("%d events are lost: %s", len(queued), error.message)
        finally:
            self._writer = None

    async def wait(self, after: int) -> None:
        """Until there may be an event with a greater id."""
        while self._last_id <= after:
            await self._grown.wait()

    async def look(self) -> None:
        """Find out what the newest event is: it may be of before the start, or of somebody else."""
        newest = await self._store.call(Store.newest_events, None, None, 1)
        self._tell(tuple(event.id for event in newest))

    async def flush(self) -> None:
        """Until all that was noted is written."""
        if self._writer is not None:
            await self._writer

    def _tell(self, ids: tuple[int, ...]) -> None:
        if ids:
            self._last_id = max(self._last_id, *ids)
            self._grown.set()
            self._grown = asyncio.Event()
