"""From a request to a handler and back: everything that all operations have in common.

The order: who is asking, may they, names, query, body, ``Idempotency-Key``, ``If-Match``, the handler. So
whoever may not do a thing learns nothing of what is there.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web

from gateway.admin.auth import LOOPBACK, Guard, Identity
from gateway.admin.documents import parse_body, parse_query, to_json
from gateway.admin.operations import Answer, Call, Match, Operation, check_parameters
from gateway.admin.replay import Replays
from gateway.errors import (
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    PreconditionRequired,
    TooLarge,
    UnsupportedMediaType,
)
from gateway.security.keys import Role

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

MAX_BODY_BYTES = 1 << 20
"""Longest JSON body; the longest rollout has a few hundred kB."""

BODY_S = 30.0
"""Time that a JSON body, and each piece of an upload, has to arrive."""

KEY_REVISION = 1
"""Of every key: nothing of one ever changes but that it is revoked."""

OCTETS = "application/octet-stream"

_TAG = re.compile(r'"([!#-~]*)"')

_NOBODY = Identity(LOOPBACK, Role.VIEWER)


class Endpoint:
    """Serves one operation.

    Args:
        operation: which.
        plane: what it works on.
        guard: tells who is asking.
        replays: knows what was answered already.
    """

    def __init__(
        self, operation: Operation, plane: ControlPlane, guard: Guard, replays: Replays
    ) -> None:
        self._operation = operation
        self._plane = plane
        self._guard = guard
        self._replays = replays

    def add_to(self, app: web.Application) -> None:
        """Register it."""
        operation = self._operation
        app.router.add_route(
            operation.method, operation.pattern, self.serve, expect_handler=check_expect
        )

    async def serve(self, http: web.Request) -> web.StreamResponse:
        """Answer a request."""
        operation = self._operation
        identity = await self._authorize(http)
        query = self._query(http)
        if operation.is_upload and http.content_type == OCTETS:
            return respond(await self._handle(http, identity, query, None))
        raw = await read_body(http) if operation.is_change else b""
        body = parse_body(operation.body, raw)
        if not operation.replays:
            return respond(await self._handle(http, identity, query, body))

        async def act() -> Answer:
            answer = await self._handle(http, identity, query, body)
            if not isinstance(answer, Answer):
                raise TypeError("a stream cannot be repeated")
            return answer

        return respond(await self._replays.once(http, identity, raw, act))

    async def _handle(
        self, http: web.Request, identity: Identity, query: Any, body: Any
    ) -> Answer | web.StreamResponse:
        # Here, so that a repeated POST gets its answer although the first has changed the revision.
        revision = self._revision(http)
        return await self._operation.handler(Call(http, identity, revision, body, query))

    async def _authorize(self, http: web.Request) -> Identity:
        operation = self._operation
        identity = _NOBODY
        if operation.role is not None:
            identity = await self._guard.identify(http)
            identity.require(operation.role)
        if operation.is_global:
            identity.require_all_models()
        check_parameters(operation, http)
        if "model" in operation.parameters:
            identity.require_model(http.match_info["model"])
        return identity

    def _query(self, http: web.Request) -> Any:
        if len(http.query) != len(set(http.query)):
            raise InvalidRequest("a parameter of the query stands there twice")
        return parse_query(self._operation.query, http.query)

    def _revision(self, http: web.Request) -> int | None:
        """The revision that the operation is held against; None: whatever is there."""
        match = self._operation.match
        given = http.headers.getall(hdrs.IF_MATCH, [])
        if match is Match.NONE or (match is Match.IF_GIVEN and not given):
            return None
        try:
            current = self._current(http)
        except NotFound:
            if match is Match.IF_THERE:
                return None
            raise
        if not given:
            raise PreconditionRequired(
                f"{hdrs.IF_MATCH} is needed: send the ETag that was decided on, or *"
            )
        if given == ["*"]:
            return None
        found = _TAG.fullmatch(given[0])
        if found is None or len(given) > 1:
            raise InvalidRequest(f'{hdrs.IF_MATCH} must be one ETag such as "7", or *')
        if found[1] != str(current):
            raise PreconditionFailed(
                f"there is revision {current} now: read it again and decide again"
            )
        return current

    def _current(self, http: web.Request) -> int:
        """The revision of what is there. NotFound: nothing is."""
        if "model" in self._operation.parameters:
            return self._plane.registry.model(http.match_info["model"]).revision
        keys = self._plane.keys()
        if all(key.id != http.match_info["id"] for key in keys):
            raise NotFound("there is no key with this id: list the keys")
        return KEY_REVISION


async def check_expect(http: web.Request) -> None:
    """Aiohttp would say "100 Continue" before it is known who asks; `go_on` says it later."""
    if http.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        raise web.HTTPExpectationFailed


async def go_on(http: web.Request) -> None:
    """Tell a client that waits for it to send its body."""
    writer = http.writer
    if hdrs.EXPECT in http.headers:
        await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        writer.output_size = 0  # the answer has not begun


async def read_body(http: web.Request) -> bytes:
    """A JSON body, or none.

    Raises:
        UnsupportedMediaType: it says that it is something else.
        TooLarge: over `MAX_BODY_BYTES`.
        InvalidRequest: it ends too early.
        web.HTTPRequestTimeout: it took too long.
    """
    if not http.body_exists:
        return b""
    if hdrs.CONTENT_ENCODING in http.headers:
        raise UnsupportedMediaType("send the body as it is, without Content-Encoding")
    if http.content_type != "application/json":
        raise UnsupportedMediaType("Content-Type must be application/json")
    if (http.content_length or 0) > MAX_BODY_BYTES:
        raise _too_large()
    await go_on(http)
    try:
        async with asyncio.timeout(BODY_S):
            return await http.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large() from None
    except web.RequestPayloadError:
        raise InvalidRequest("the body could not be read to its end") from None
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


def _too_large() -> TooLarge:
    return TooLarge(f"the body is longer than {MAX_BODY_BYTES} bytes")


def respond(answer: Answer | web.StreamResponse) -> web.StreamResponse:
    """An answer in HTTP's form."""
    if isinstance(answer, web.StreamResponse):
        return answer
    if answer.document is None:
        response = web.Response(status=answer.status)
    else:
        response = web.Response(
            body=to_json(answer.document), status=answer.status, content_type="application/json"
        )
    if answer.revision is not None:
        response.headers[hdrs.ETAG] = f'"{answer.revision}"'
    response.headers.update(answer.headers)
    return response
