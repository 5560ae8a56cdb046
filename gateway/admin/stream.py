"""Server-sent events: what happens, as it happens, for as long as somebody listens.

A stream ends when the server does, when whoever listens may no longer, or when they do not read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web

from gateway.admin.auth import Guard, Identity
from gateway.admin.documents import to_json
from gateway.admin.live import LiveFeed
from gateway.admin.operations import PREFIX, Answer, Call, Operation
from gateway.admin.schema import EventPage, EventsQuery
from gateway.errors import InvalidRequest, Unavailable
from gateway.names import MAX_VERSION
from gateway.store.records import EventRecord

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

log = logging.getLogger("gateway.admin")

MAX_STREAMS = 64
"""Streams at the same time; each takes a connection and a look a second."""

HEARTBEAT_S = 15.0
"""Longest silence of a stream, shorter than what proxies take for the end of a connection."""

LIVE_S = 1.0
"""Pause between two documents of the live page."""

SLOW_READER_S = 10.0
"""Time that a listener may leave what was sent unread before the stream is cut."""

RETRY_MS = 2000
"""What browsers are told to wait before they connect again."""

BLOCK_EVENTS = 500
"""Events that are read from the store at a time."""

EVENT_STREAM = "text/event-stream"


class Streams:
    """The operations that stream.

    Args:
        plane: what they look at.
        guard: tells whether a listener still may listen.
        feed: documents of the live page.
        stopping: set when the server ends.
    """

    def __init__(
        self, plane: ControlPlane, guard: Guard, feed: LiveFeed, stopping: asyncio.Event
    ) -> None:
        self._plane = plane
        self._guard = guard
        self._feed = feed
        self._stopping = stopping
        self._count = 0

    def operations(self) -> list[Operation]:
        """Those of the events and of the live page."""
        return [
            Operation(
                "GET", f"{PREFIX}/events", "What happened, oldest first", self.events, EventPage,
                query=EventsQuery, is_stream=True,
            ),
            Operation(
                "GET", f"{PREFIX}/live", "What happens now, once a second, as server-sent events",
                self.live, None, is_stream=True,
            ),
        ]  # fmt: skip

    async def events(self, call: Call) -> Answer | web.StreamResponse:
        """A page, or all from a number on."""
        query, identity = call.query, call.identity
        if query.model is not None:
            identity.require_model(query.model)
        if query.stream or EVENT_STREAM in call.http.headers.get(hdrs.ACCEPT, ""):
            after = await self._begin(call.http, query)
            return await self._stream(
                call, lambda stream: self._send_events(stream, after, identity, query)
            )
        if query.last is not None:
            found = await self._plane.newest_events(query.model, query.rollout, query.last)
        else:
            found = await self._plane.events(query.after, query.model, query.rollout, query.limit)
        return Answer(
            {
                "events": [event for event in found if _may_see(identity, event)],
                "next": found[-1].id if found else query.after,
            }
        )

    async def live(self, call: Call) -> web.StreamResponse:
        """A document at once, and one more every second."""
        identity = call.identity

        async def send(stream: _Stream) -> None:
            while self._goes_on(identity):
                await stream.send(await self._feed.document(identity.may_touch))
                await self._wait(asyncio.sleep(LIVE_S))

        return await self._stream(call, send)

    async def _begin(self, http: web.Request, query: EventsQuery) -> int:
        """The number after which a stream begins: where the listener left, if it was there before."""
        if (left := _last_event_id(http)) is not None:
            return left
        if query.last is None:
            return query.after
        found = await self._plane.newest_events(query.model, query.rollout, query.last)
        return found[0].id - 1 if found else 0

    async def _send_events(
        self, stream: _Stream, after: int, identity: Identity, query: EventsQuery
    ) -> None:
        while self._goes_on(identity):
            # All of them, whatever is wanted: else those that are not would look like news for ever.
            found = await self._plane.events(after, None, None, BLOCK_EVENTS)
            for event in found:
                after = event.id
                if _may_see(identity, event) and _is_wanted(query, event):
                    await stream.send(event, event.id)
            if len(found) < BLOCK_EVENTS and not await self._wait(self._plane.wait_events(after)):
                await stream.beat()

    async def _stream(
        self, call: Call, send: Callable[[_Stream], Awaitable[None]]
    ) -> web.StreamResponse:
        if self._count >= MAX_STREAMS:
            raise Unavailable(f"{MAX_STREAMS} streams are open already")
        self._count += 1
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: EVENT_STREAM})
        try:
            await response.prepare(call.http)
            await send(_Stream(call.http, response))
            await response.write_eof()
        except TimeoutError:
            _cut(call.http)  # what it has not read would be kept for it
        except ConnectionError:
            pass  # the listener is gone
        except Exception:
            log.exception("a stream failed")
            _cut(call.http)
        finally:
            self._count -= 1
        return response

    def _goes_on(self, identity: Identity) -> bool:
        return not self._stopping.is_set() and self._guard.holds(identity)

    async def _wait(self, something: Awaitable[Any]) -> bool:
        """Until it has happened, the server stops, or `HEARTBEAT_S` are over: False then."""
        happens = asyncio.ensure_future(something)
        stops = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait(
                (happens, stops), timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED
            )
            return happens.done() or stops.done()
        finally:
            for task in (happens, stops):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


class _Stream:
    """Writes the events of one stream. TimeoutError: nobody reads them."""

    def __init__(self, http: web.Request, response: web.StreamResponse) -> None:
        self._http = http
        self._response = response
        self._begin = f"retry: {RETRY_MS}\n".encode()

    async def send(self, document: Any, number: int | None = None) -> None:
        """A document, under a number that the listener names when it comes back."""
        name = b"" if number is None else b"id: %d\n" % number
        await self._write(name + b"data: " + to_json(document) + b"\n\n")

    async def beat(self) -> None:
        """A comment, which keeps the connection."""
        await self._write(b":\n\n")

    async def _write(self, data: bytes) -> None:
        async with asyncio.timeout(SLOW_READER_S):
            await self._response.write(self._begin + data)
        self._begin = b""


def _cut(http: web.Request) -> None:
    if http.transport is not None:
        http.transport.abort()


def _may_see(identity: Identity, event: EventRecord) -> bool:
    return identity.may_touch(event.model)


def _is_wanted(query: EventsQuery, event: EventRecord) -> bool:
    return query.model in (None, event.model) and query.rollout in (None, event.rollout)


def _last_event_id(http: web.Request) -> int | None:
    """What a browser that connects again has seen already; its query is that of the first time."""
    text = http.headers.get("Last-Event-ID")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_VERSION):
        raise InvalidRequest("Last-Event-ID must be the id of an event")
    return int(text)
