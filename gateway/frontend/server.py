"""A front end: the process that clients talk to.

Started as ``python -m gateway.frontend.server --channel FD``. The first message on that channel,
``configure``, brings the options and the listening sockets (fds: data, metrics).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import socket
import sys
from contextlib import suppress
from typing import Any

import uvloop
from aiohttp import http_parser, web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.errors import Unavailable
from gateway.frontend.answers import DRAINING, answering
from gateway.frontend.frontdoor import FrontDoor
from gateway.frontend.guard import GUARD, Guard, guarding
from gateway.frontend.health import HealthHandlers
from gateway.frontend.inference import Inference
from gateway.frontend.link import DRAIN_LOOK_S, SupervisorLink
from gateway.frontend.mirror import Mirror
from gateway.frontend.operations import Operations
from gateway.frontend.tfserving import TensorFlowHandlers
from gateway.frontend.v2 import V2Handlers
from gateway.serving.channel import Channel
from gateway.serving.options import FrontendOptions
from gateway.serving.routes import RouteTable
from gateway.telemetry import logs
from gateway.telemetry.metrics import Metrics

log = logging.getLogger("gateway.frontend")

BACKLOG = 1024
"""Connections that the kernel holds while the event loop is busy."""

LAST_WORDS_S = 1.0
"""Time, after drain_timeout_s, in which what is still in flight is answered with 503."""


class Frontend:
    """Listeners, handlers, and the order in which they end."""

    def __init__(self, channel: Channel, options: FrontendOptions) -> None:
        self._channel = channel
        self._options = options
        self._stop = asyncio.Event()
        self._draining = asyncio.Event()
        self._pause_s = options.drain_pause_s
        self._guard = Guard()

    async def serve(self, data: socket.socket, metrics_socket: socket.socket) -> None:
        """Serve until drained."""
        options = self._options
        routes, metrics, operations = RouteTable(), Metrics(), Operations(self._channel)
        health = HealthHandlers(routes, metrics, options.strict_readiness)
        mirror = Mirror(options.max_request_bytes)
        inference = Inference(options.max_request_bytes, mirror)
        app = self._application()
        health.add_to(app)
        control = operations if options.model_control else None
        V2Handlers(routes, inference, control, options.max_request_bytes).add_to(app)
        TensorFlowHandlers(routes, inference).add_to(app)
        metrics_app = self._application()
        health.add_metrics_to(metrics_app)
        runner = await self._runner(app)
        door = FrontDoor(
            routes,
            _server_of(runner),
            self._handler_options(),
            options,
            mirror,
            self._guard,
        )
        link = SupervisorLink(
            self._channel,
            routes,
            metrics,
            operations,
            self._guard,
            mirror,
            options,
            self._drain,
            self._orphaned,
            door.forget_routes,
            door.burst,
        )
        link.start()
        await link.told.wait()
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(door.connect, sock=data, backlog=BACKLOG)
        metrics_runner = await self._runner(metrics_app)
        await web.SockSite(metrics_runner, metrics_socket, backlog=BACKLOG).start()
        runners = [runner, metrics_runner]
        gc.collect()
        gc.freeze()  # what importing made is there for good: no full collection needs to look at it
        self._channel.send("serving")
        await self._stop.wait()
        mirror.close()
        await self._end(routes, door, runners)

    async def _end(self, routes: RouteTable, door: FrontDoor, runners: list[web.AppRunner]) -> None:
        """Stop taking requests, and end when those in flight are answered or have had their time."""
        self._draining.set()
        door.is_open = False  # aiohttp says in its answers that the connection ends
        await asyncio.sleep(self._pause_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._options.drain_timeout_s):
                await self._finish(routes, door, runners)
                return
        for version in routes.versions():
            if version.dispatcher is not None:
                version.dispatcher.fail_all(Unavailable("the server is shutting down"))
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await _close(runners)

    async def _finish(
        self, routes: RouteTable, door: FrontDoor, runners: list[web.AppRunner]
    ) -> None:
        """Close the data port's listener, let what is in flight end, then close everything."""
        self._listener.close()
        # Waited for here, not in `cleanup`: that reads nothing more from any connection, so that a
        # request would lose the rest of its body.
        while routes.in_flight():  # noqa: ASYNC110  (a request's end should not cost a question)
            await asyncio.sleep(DRAIN_LOOK_S)
        door.close_idle()
        while door.is_sending:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_LOOK_S)
        await _close(runners)  # which waits for answers that are still read

    def _application(self) -> web.Application:
        limit = self._options.max_request_bytes
        app = web.Application(middlewares=[answering, guarding], client_max_size=limit)
        app[DRAINING], app[GUARD] = self._draining, self._guard
        return app

    def _handler_options(self) -> dict[str, Any]:
        """What aiohttp's handlers are made with."""
        options = self._options
        return {
            "access_log": None,
            "auto_decompress": False,  # `read_body` does
            "keepalive_timeout": options.keepalive_timeout_s,
            "max_line_size": options.max_header_bytes,
            "max_field_size": options.max_header_bytes,
        }

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(
            app,
            handler_cancellation=True,  # a client that goes away takes its queued rows with it
            shutdown_timeout=self._options.drain_timeout_s,
            **self._handler_options(),
        )
        await runner.setup()
        return runner

    def _drain(self) -> None:
        self._stop.set()

    def _orphaned(self) -> None:
        grace_s = self._options.orphan_grace_s
        if not self._stop.is_set():
            log.warning("the supervisor is gone; serving on for %g s", grace_s)
        self._pause_s = 0.0
        asyncio.get_running_loop().call_later(grace_s, self._stop.set)


def _server_of(runner: web.AppRunner) -> web.Server:
    """What makes requests of messages. TypeError: the runner has not been set up."""
    if runner.server is None:
        raise TypeError("the runner has no server yet")
    return runner.server


class _ClientsMistakes(logging.Filter):
    """Leaves malformed requests out of the log: aiohttp would write a traceback of each."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)


async def _close(runners: list[web.AppRunner]) -> None:
    for runner in runners:
        await runner.cleanup()


def main(argv: list[str] | None = None) -> int:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="gateway-frontend")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the channel")
    arguments = parser.parse_args(argv)
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        log.error("aiohttp's C parser is missing; its Python one is not safe to serve with")
        return 1
    channel = Channel.from_fd(arguments.channel)
    received = channel.receive()
    if received is None:
        return 0
    message, (data_fd, metrics_fd) = received
    options = FrontendOptions.from_wire(message["options"])
    logs.configure(options.log_level, options.log_format)
    logging.getLogger("aiohttp.server").addFilter(_ClientsMistakes())
    frontend_sockets = socket.socket(fileno=data_fd), socket.socket(fileno=metrics_fd)

    async def run() -> None:
        await Frontend(channel, options).serve(*frontend_sockets)

    uvloop.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
