"""``Idempotency-Key``: a POST that is sent again gets its first answer and does nothing more.

What a refused request left is nothing, so that it may be tried again with the same key. Anything else
that goes wrong is kept: nobody knows how far it came.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from gateway.admin.auth import Identity
from gateway.admin.documents import to_json
from gateway.admin.operations import Answer
from gateway.errors import GatewayError, InvalidRequest
from gateway.store.records import ReplayRecord
from gateway.store.store import Store

if TYPE_CHECKING:
    from gateway.store.store import AsyncStore

HEADER = "Idempotency-Key"
REPLAYED = ("Idempotency-Replayed", "true")

_KEY = re.compile(r"[!-~]{1,128}")

_INTERNAL = {"document": {"error": "internal error", "code": GatewayError.code}, "revision": None}


async def once(
    store: AsyncStore,
    http: web.Request,
    identity: Identity,
    body: bytes,
    act: Callable[[], Awaitable[Answer]],
) -> Answer:
    """Act, unless the request's key says that this was done already.

    Args:
        store: where answers are kept.
        http: the request.
        identity: who sent it; keys of others are others.
        body: its body.
        act: what it asks for.

    Raises:
        InvalidRequest: the key is malformed.
        Conflict: it came with another request, or the first is still being carried out.
        GatewayError: whatever ``act`` raises.
    """
    given = http.headers.getall(HEADER, [])
    if not given:
        return await act()
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        raise InvalidRequest(f"{HEADER} must be 1 to 128 visible ASCII characters, once")
    actor, key = identity.key or identity.actor, given[0]
    first = await store.call(Store.remember, actor, key, _digest(http, body))
    if first is not None:
        return _again(first)
    # A client that goes away or a shutdown must not leave the key without its answer.
    return await asyncio.shield(asyncio.ensure_future(_keep(store, actor, key, act)))


async def _keep(
    store: AsyncStore, actor: str, key: str, act: Callable[[], Awaitable[Answer]]
) -> Answer:
    try:
        answer = await act()
    except GatewayError:
        await store.call(Store.forget, actor, key)
        raise
    except Exception:
        await store.call(Store.answered, actor, key, 500, _INTERNAL)
        raise
    shown = answer.document if answer.kept is None else answer.kept
    kept = {"document": orjson.loads(to_json(shown)), "revision": answer.revision}
    await store.call(Store.answered, actor, key, answer.status, kept)
    return answer


def _again(first: ReplayRecord) -> Answer:
    body = first.body
    return Answer(body["document"], first.status, body["revision"], headers=(REPLAYED,))


def _digest(http: web.Request, body: bytes) -> str:
    head = f"{http.method} {http.path_qs}\n".encode()
    return hashlib.sha256(head + body).hexdigest()
