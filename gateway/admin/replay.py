"""``Idempotency-Key``: a POST that is sent again gets its first answer and does nothing more.

What a refused request left is nothing, so that it may be tried again with the same key. Anything else
that goes wrong is kept: nobody knows how far it came. Where the store gives no answer when one is to be
kept, it is kept before the key is looked at again.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from gateway.admin.auth import Identity
from gateway.admin.documents import to_json
from gateway.admin.operations import Answer
from gateway.errors import GatewayError, InvalidRequest, Unavailable
from gateway.store.records import ReplayRecord
from gateway.store.store import Store

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

HEADER = "Idempotency-Key"
REPLAYED = ("Idempotency-Replayed", "true")

_KEY = re.compile(r"[!-~]{1,128}")

_INTERNAL = {"document": {"error": "internal error", "code": GatewayError.code}, "revision": None}


class Replays:
    """The answers to requests with a key. Belongs to the event loop.

    Args:
        plane: has the store in which they are kept.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._owed: dict[tuple[str, str], Callable[[], Awaitable[None]]] = {}

    async def once(
        self,
        http: web.Request,
        identity: Identity,
        body: bytes,
        act: Callable[[], Awaitable[Answer]],
    ) -> Answer:
        """Act, unless the request's key says that this was done already.

        Args:
            http: the request.
            identity: who sent it; keys of others are others.
            body: its body.
            act: what it asks for.

        Raises:
            InvalidRequest: the key is malformed.
            Conflict: it came with another request, or the first is still being carried out.
            Unavailable: the store gives no answer.
            GatewayError: whatever ``act`` raises.
        """
        given = http.headers.getall(HEADER, [])
        if not given:
            return await act()
        if len(given) > 1 or not _KEY.fullmatch(given[0]):
            raise InvalidRequest(f"{HEADER} must be 1 to 128 visible ASCII characters, once")
        actor, key = identity.key or identity.actor, given[0]
        await self._settle(actor, key)
        first = await self._plane.store.call(Store.remember, actor, key, _digest(http, body))
        if first is not None:
            return _again(first)
        # A client that goes away or a shutdown must not leave the key without its answer.
        return await asyncio.shield(asyncio.ensure_future(self._keep(actor, key, act)))

    async def _keep(self, actor: str, key: str, act: Callable[[], Awaitable[Answer]]) -> Answer:
        store = self._plane.store
        try:
            answer = await act()
        except GatewayError:
            await self._end(actor, key, partial(store.call, Store.forget, actor, key))
            raise
        except Exception:
            write = partial(store.call, Store.answered, actor, key, 500, _INTERNAL)
            await self._end(actor, key, write)
            raise
        shown = answer.document if answer.kept is None else answer.kept
        kept = {"document": orjson.loads(to_json(shown)), "revision": answer.revision}
        write = partial(store.call, Store.answered, actor, key, answer.status, kept)
        await self._end(actor, key, write)
        return answer

    async def _end(self, actor: str, key: str, write: Callable[[], Awaitable[None]]) -> None:
        """Write what has become of a request, now or when its key comes again."""
        self._owed[actor, key] = write
        with suppress(Unavailable):
            await self._settle(actor, key)

    async def _settle(self, actor: str, key: str) -> None:
        """Write what is owed of a key. Unavailable."""
        if (write := self._owed.get((actor, key))) is not None:
            await write()
            self._owed.pop((actor, key), None)


def _again(first: ReplayRecord) -> Answer:
    body = first.body
    return Answer(body["document"], first.status, body["revision"], headers=(REPLAYED,))


def _digest(http: web.Request, body: bytes) -> str:
    head = f"{http.method} {http.path_qs}\n".encode()
    return hashlib.sha256(head + body).hexdigest()
