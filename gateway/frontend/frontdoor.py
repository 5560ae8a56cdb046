"""The Python side of the fast lane: routes, the general parsers, errors, and stepping aside to aiohttp.

`kernels/fastlane.pyx` is the other side: it reads a plain request's head, looks its body up by skeleton, and
calls here for what it has not seen before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Hashable
from functools import partial
from http import HTTPStatus
from typing import Any

from aiohttp import web

from gateway._kernels import fastlane
from gateway._kernels.fastlane import Connection
from gateway._kernels.templates import Route, Split, Template
from gateway.clock import NS_PER_S, monotonic_ns
from gateway.errors import GatewayError
from gateway.frontend.answers import SERVER, error_headers
from gateway.frontend.aside import Aside
from gateway.frontend.exchanges import (
    JSON,
    MSGPACK_TYPES,
    OCTETS,
    PREDICT,
    Encode,
    Exchange,
    v2_exchange,
)
from gateway.frontend.guard import Guard
from gateway.frontend.inference import CLIENT_GONE
from gateway.frontend.learning import template_of
from gateway.frontend.mirror import Copy, Mirror
from gateway.protocols import jsontext
from gateway.protocols.call import InferCall, OutputTensor, check_call
from gateway.security.keys import Role
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.options import FrontendOptions
from gateway.serving.request import Timing
from gateway.serving.routes import Choice, RouteTable, Version

log = logging.getLogger("gateway.frontend")

MAX_TEMPLATES = 256
"""Skeletons that are remembered of one version and protocol; clients choose them. Some 10 kB each at most."""

MAX_SEEN = 4096
"""Skeletons of which it is remembered that they have come once."""

MAX_ROUTES = 4096
"""Targets that are remembered; clients choose their spelling."""

SWEEP_S = 5.0
"""Pause between two looks for connections that have been idle for too long."""

_MEDIA = (
    OCTETS,
    JSON,
    OCTETS,
    "application/msgpack",
    "application/x-msgpack",
    "application/vnd.msgpack",
)
"""Media types by their number in http_head.h."""

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_PREDICT = re.compile(r"/v1/models/([^/:]+)(?:/versions/([^/:]+)|/labels/([^/:]+))?:predict")


class FrontDoor(fastlane.Door):
    """What the connections of the data port share.

    Args:
        routes: models and versions.
        server: aiohttp's, for whatever is not plain.
        handler_options: of its handlers.
        options: bounds.
        mirror: sends the copies of requests.
        guard: knows who may ask.
    """

    def __init__(
        self,
        routes: RouteTable,
        server: web.Server,
        handler_options: dict[str, Any],
        options: FrontendOptions,
        mirror: Mirror,
        guard: Guard,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(
            self._loop,
            options.max_request_bytes,
            options.max_header_bytes,
            os.urandom(16),
            may_linger=len(os.sched_getaffinity(0)) > options.frontends,
        )
        self.is_open = options.fast_lane
        self._table = routes
        self._server = server
        self._handler_options = handler_options
        self.mirror = mirror
        self._guard = guard
        self._limit = options.max_request_bytes
        self._keepalive_ns = round(options.keepalive_timeout_s * NS_PER_S)
        self._connections: set[Connection] = set()
        self._seen: set[bytes] = set()
        self._routes: dict[Hashable, Route] = {}  # however they are spelt
        self._sweeper: asyncio.TimerHandle | None = None

    # Connections

    def connect(self) -> Connection:
        """A protocol for a new connection."""
        return Connection(self)

    def opened(self, connection: Connection) -> None:
        """A client is here."""
        self._connections.add(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def closed(self, connection: Connection) -> None:
        """It is gone."""
        self._connections.discard(connection)

    def broken(self, connection: Connection, error: Exception) -> None:
        """Something raised while a connection was served: it ends, and nothing else does."""
        log.error("a connection failed in a way of ours", exc_info=error)
        if connection.transport is not None:
            connection.transport.abort()

    def close_idle(self) -> None:
        """Close every connection that has nothing in flight; aiohttp closes its own."""
        for connection in list(self._connections):
            if not connection.is_aside and not connection.is_busy:
                connection.transport.close()

    @property
    def is_sending(self) -> bool:
        """Whether a connection that aiohttp does not have is still there: its answer is being read."""
        return any(not connection.is_aside for connection in self._connections)

    def _sweep(self) -> None:
        """Close connections that have been idle for too long. Runs while there are connections."""
        self._sweeper = None
        oldest_ns = monotonic_ns() - self._keepalive_ns
        for connection in list(self._connections):
            if connection.is_aside:
                is_idle = connection.aside.is_incomplete
            else:
                is_idle = not (connection.is_busy or connection.is_sending)
            if is_idle and connection.active_ns < oldest_ns:
                connection.transport.close()
        if self._connections:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def step_aside(self, connection: Connection) -> Aside:
        """Aiohttp takes over."""
        return Aside(connection, self._server, self._handler_options)

    # Requests

    def forget_routes(self) -> None:
        """Versions, routes or keys have changed: each target is resolved anew."""
        super().forget_routes()
        self._routes.clear()
        self.is_guarded = self._guard.is_required

    def resolve(self, target: bytes) -> Route | Fork | None:
        """The route of a target, or its fork where that differs by request; None: aiohttp is to answer."""
        text = target.decode("ascii")
        infer = _INFER.fullmatch(text)
        found = infer or _PREDICT.fullmatch(text)
        if found is None:
            return None
        model, *named = found.groups()
        if self.route_count >= MAX_ROUTES:
            self.forget_routes()
        shared = self._table.routes.get(model)
        if shared is not None and not shared.is_plain and not any(named):
            return Fork(self, self._table, model, is_v2=infer is not None)
        try:
            return self.route_to(
                Choice(self._table.resolve(model, *named)), is_v2=infer is not None
            )
        except GatewayError:
            return None

    def route_to(self, choice: Choice, *, is_v2: bool) -> Route:
        """The route to whoever was chosen, in one of the two protocols. Unavailable: it is not READY."""
        version = choice.version
        key = version.model, version.number, choice.is_slice, choice.shadow is not None, is_v2
        route = self._routes.get(key)
        if route is None:
            version.ready()
            route = self._routes[key] = Route(
                version,
                version.dispatcher,
                partial(_v2, version) if is_v2 else _predict,
                choice.counters,
                _heads(version),
                MAX_TEMPLATES,
                choice.shadow,
            )
        return route

    def may(self, connection: Connection, route: Route) -> bool:
        """Whether whoever asks has a key for it; aiohttp's lane says what is wrong where not."""
        version: Version = route.version
        try:
            self._guard.check(connection.header("authorization"), Role.INFER, version.model)
        except GatewayError:
            return False
        return True

    def serve(
        self,
        connection: Connection,
        route: Route,
        body: bytes,
        json_bytes: int,
        media: int,
        split: Split | None,
    ) -> None:
        """A request that the kernel cannot place by itself.

        Args:
            connection: that waits for the answer.
            route: of the request's target.
            body: all of it.
            json_bytes: of its text before raw tensors; -1: no such header.
            media: number of its media type.
            split: of the body, where its skeleton may be learned.
        """
        arrived_ns = connection.active_ns
        dispatcher: Dispatcher = route.dispatcher
        version: Version = route.version
        template = None
        try:
            if not dispatcher.intake.is_open:
                raise version.refusal()
            exchange = route.exchange(media, json_bytes)
            call, encode = exchange.understand(body, dispatcher.signature)
            check_call(call, dispatcher.signature, self._limit)
            if split is not None and self._is_worth_learning(split):
                template = self._learn(call, route, body, json_bytes, media, split)
            copy = self.mirror.keep(route.shadow, call)
            answer = _Answering(self, connection, route, call, encode, arrived_ns, copy)
            request = dispatcher.submit(call, arrived_ns, answer.on_answer, answer.on_error)
        except Exception as error:
            self.refuse(connection, route, error, arrived_ns)
            return
        connection.began(request)
        if split is not None and template is not None:
            route.learn(split.skeleton, template)

    def _learn(
        self,
        call: InferCall,
        route: Route,
        body: bytes,
        json_bytes: int,
        media: int,
        split: Split,
    ) -> Template | None:
        """A template of a request that is good; None where there is none, whatever the reason."""
        try:
            return template_of(
                call,
                body,
                split,
                json_bytes,
                partial(route.exchange, media),
                route.dispatcher,
                route.heads,
            )
        except GatewayError:
            return None
        except Exception:
            log.exception("a request could not be learned")
            return None

    def _is_worth_learning(self, split: Split) -> bool:
        """Whether its skeleton was seen before: what comes once is not worth a template."""
        if split.skeleton in self._seen:
            return True
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(split.skeleton)
        return False

    def refuse(
        self, connection: Connection, route: Route, error: Exception, arrived_ns: int
    ) -> None:
        """Answer with an error: the same answer that the aiohttp lane gives."""
        if not isinstance(error, GatewayError):
            log.error("a request failed in a way of ours", exc_info=error)
            error = GatewayError("internal error")
        version: Version = route.version
        head = _head(error.status, version, JSON, error_headers(error))
        connection.respond(head, jsontext.dumps({"error": error.message}))
        route.counters.failed(error.status, monotonic_ns() - arrived_ns)
        connection.finish()

    def abandoned(self, route: Route, arrived_ns: int) -> None:
        """A client went away and left a request."""
        route.counters.failed(CLIENT_GONE, monotonic_ns() - arrived_ns)


class Fork:
    """A target whose requests are shared out among versions: each is chosen for anew."""

    def __init__(self, door: FrontDoor, table: RouteTable, model: str, *, is_v2: bool) -> None:
        self._door, self._table, self._model, self._is_v2 = door, table, model, is_v2

    def choose(self, connection: Connection) -> Route | None:
        """The route of the request that the connection is reading; None where aiohttp is to answer."""
        try:
            choice = self._table.choose(self._model, None, None, connection)
            return self._door.route_to(choice, is_v2=self._is_v2)
        except GatewayError:
            return None


class _Answering:
    """Who is told how a request of the general parsers ended."""

    def __init__(
        self,
        door: FrontDoor,
        connection: Connection,
        route: Route,
        call: InferCall,
        encode: Encode,
        arrived_ns: int,
        copy: Copy | None,
    ) -> None:
        self._door, self._connection, self._route = door, connection, route
        self._call, self._encode, self._arrived_ns = call, encode, arrived_ns
        self._copy = copy

    def on_answer(self, outputs: list[OutputTensor], timing: Timing) -> None:
        """It was run."""
        encoded = self._encode(outputs)
        head = self._route.heads[encoded.media_type]
        self._connection.respond(
            head, encoded.body, -1 if encoded.json_bytes is None else encoded.json_bytes
        )
        total_ns = monotonic_ns() - self._arrived_ns
        self._route.counters.answered(self._call.rows, total_ns, timing.queue_ns, timing.compute_ns)
        self._door.mirror.answered(self._copy, outputs)
        self._connection.finish()

    def on_error(self, error: GatewayError) -> None:
        """It was not."""
        self._door.refuse(self._connection, self._route, error, self._arrived_ns)


def _v2(version: Version, media: int, json_bytes: int) -> Exchange:
    return v2_exchange(version, _MEDIA[media], None if json_bytes < 0 else str(json_bytes))


def _predict(_media: int, _json_bytes: int) -> Exchange:
    return PREDICT


def _heads(version: Version) -> dict[str, bytes]:
    """Heads of a version's answers, by media type."""
    return {
        media_type: _head(HTTPStatus.OK, version, media_type, {})
        for media_type in (JSON, OCTETS, *MSGPACK_TYPES)
    }


def _head(status: int, version: Version, media_type: str, headers: dict[str, str]) -> bytes:
    """The begin of an answer's head; `Connection.respond` writes what follows from body and moment."""
    fields = {
        "Server": SERVER,
        "Content-Type": media_type,
        **headers,
        "x-model-version": str(version.number),
    }
    lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{''.join(lines)}".encode()
