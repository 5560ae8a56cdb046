"""The admin port: the API under ``/admin/v1``, the management calls, the dashboard, ``/metrics``."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.admin.access import AccessHandlers
from gateway.admin.auth import WINDOW_S, Guard, TooManyAttempts
from gateway.admin.documents import to_json
from gateway.admin.endpoint import MAX_BODY_BYTES, Endpoint, check_expect
from gateway.admin.live import LiveFeed
from gateway.admin.management import ManagementHandlers
from gateway.admin.models import ModelHandlers
from gateway.admin.openapi import describe
from gateway.admin.operations import PREFIX, Call, Operation
from gateway.admin.pages import Pages
from gateway.admin.replay import Replays
from gateway.admin.rollouts import RolloutHandlers
from gateway.admin.stream import Streams
from gateway.admin.upload import Uploads
from gateway.clock import steady_s
from gateway.errors import GatewayError, Unauthorized
from gateway.frontend.answers import RETRY_AFTER_S, SERVER, Handler, request_id
from gateway.security.keys import Role
from gateway.security.origin import Site, check_origin, is_loopback

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane
    from gateway.settings import ServerSettings

log = logging.getLogger("gateway.admin")

BACKLOG = 128
"""Connections that the kernel holds while the event loop is busy."""

CLOSE_S = 5.0
"""Time that requests in flight get to finish when the server stops."""

_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class AdminServer:
    """Serves the admin port, in the supervisor's event loop.

    Args:
        plane: what it shows and changes.
        settings: the server's.
    """

    def __init__(self, plane: ControlPlane, settings: ServerSettings) -> None:
        self._plane = plane
        self._settings = settings
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Serve on a listening socket, which is closed when the server stops."""
        address = sock.getsockname()
        is_local = isinstance(address, tuple) and is_loopback(address[0])
        options: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": self._settings.keepalive_timeout_s,
            "max_line_size": self._settings.max_header_bytes,
            "max_field_size": self._settings.max_header_bytes,
        }
        runner = web.AppRunner(self.application(is_local), shutdown_timeout=CLOSE_S, **options)
        await runner.setup()
        server = runner.server
        if server is None:
            raise TypeError("the runner has no server yet")
        loop = asyncio.get_running_loop()
        self._runner = runner
        self._listener = await loop.create_server(
            lambda: _Connection(server, loop=loop, **options), sock=sock, backlog=BACKLOG
        )

    async def stop(self) -> None:
        """End streams, let other requests finish, close everything."""
        self._stopping.set()
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def application(self, is_local: bool = True) -> web.Application:
        """Everything that the port serves.

        Args:
            is_local: whether only this machine reaches the listener.
        """
        site = Site(self._settings.admin_host, is_local)
        guard = Guard(self._plane, is_local)
        app = web.Application(middlewares=[_answering(site)], client_max_size=MAX_BODY_BYTES)
        app.on_response_prepare.append(_set_headers)
        replays = Replays(self._plane)
        for operation in self.operations(guard):
            Endpoint(operation, self._plane, guard, replays).add_to(app)
        Pages().add_to(app)
        _Health(self._plane, guard).add_to(app)
        return app

    def operations(self, guard: Guard) -> list[Operation]:
        """The table of the API."""
        plane = self._plane
        feed = LiveFeed(plane, time.monotonic, steady_s)
        operations = [
            *ModelHandlers(plane, Uploads(self._settings.max_artifact_bytes)).operations(),
            *RolloutHandlers(plane).operations(),
            *Streams(plane, guard, feed, self._stopping).operations(),
            *AccessHandlers(plane, guard).operations(),
            *ManagementHandlers(plane).operations(),
        ]
        document = cache(lambda: to_json(describe(operations)))  # some ms, when it is first wanted

        async def openapi(_call: Call) -> web.Response:
            return web.Response(body=document(), content_type="application/json")

        operations.append(
            Operation(
                "GET", f"{PREFIX}/openapi.json", "This document", openapi, dict[str, Any], None
            )
        )
        return operations


class _Health:
    """For load balancers and Prometheus."""

    def __init__(self, plane: ControlPlane, guard: Guard) -> None:
        self._plane = plane
        self._guard = guard

    def add_to(self, app: web.Application) -> None:
        """Register both."""
        app.router.add_get("/livez", self.live, expect_handler=check_expect)
        app.router.add_get("/metrics", self.metrics, expect_handler=check_expect)

    async def live(self, _http: web.Request) -> web.Response:
        """The event loop turns."""
        return web.Response()

    async def metrics(self, http: web.Request) -> web.Response:
        """All metrics, of all models."""
        identity = await self._guard.identify(http)
        identity.require(Role.VIEWER)
        identity.require_all_models()
        body = self._plane.render_metrics()
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})


class _Connection(web.RequestHandler):
    """A connection. What aiohttp cannot read it answers itself, in plain text that quotes the client."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The same form as every other failure; the connection ends."""
        if not isinstance(exc, HttpProcessingError):
            log.error("a request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        answer = _http_error(status)
        answer.headers.update(_SECURITY)
        answer.headers[hdrs.SERVER] = SERVER
        answer.force_close()
        return answer


def _answering(site: Site) -> Middleware:
    """Checks where a request comes from, and turns every failure into JSON."""

    @web.middleware
    async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            headers = request.headers
            site.check_host(headers.getall(hdrs.HOST, []))
            check_origin(
                request.method,
                headers.get(hdrs.HOST),
                headers.get(hdrs.ORIGIN),
                headers.get("Sec-Fetch-Site"),
                headers.get("Sec-Fetch-Mode"),
            )
            return await handler(request)
        except GatewayError as error:
            return _refusal(error)
        except web.HTTPException as error:
            answer = _http_error(error.status)
            if hdrs.ALLOW in error.headers:
                answer.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
            return answer
        except ConnectionError:
            raise
        except Exception:
            log.exception("a handler failed")
            return _refusal(GatewayError("internal error"))

    return answering


def _refusal(error: GatewayError) -> web.Response:
    answer = _error(error.status, error.message, error.code)
    if isinstance(error, Unauthorized):
        answer.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    if error.retryable:
        wait_s = WINDOW_S if isinstance(error, TooManyAttempts) else RETRY_AFTER_S
        answer.headers[hdrs.RETRY_AFTER] = str(round(wait_s))
    return answer


def _http_error(status: int) -> web.Response:
    """What aiohttp refuses, without what it says of it: that may quote the client."""
    known = HTTPStatus(status)
    return _error(status, known.phrase, known.name.lower())


def _error(status: int, text: str, code: str) -> web.Response:
    return web.Response(
        body=to_json({"error": text, "code": code}), status=status, content_type="application/json"
    )


async def _set_headers(http: web.Request, answer: web.StreamResponse) -> None:
    """Streams too: what a middleware sets comes after their head."""
    answer.headers.update(_SECURITY)
    answer.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
    answer.headers[hdrs.SERVER] = SERVER
    answer.headers["x-request-id"] = request_id(http)
