"""The front end's link to its supervisor: turns messages into versions, workers and routes.

Messages in: ``version`` (model, version, state, reason; with READY also signature, config and limits;
fds: board), ``worker_up`` (fds: pidfd, channel), ``worker_exited`` (signal, timed_out), ``routes``,
``drain``. Messages out: ``serving``, ``reclaimed`` (an incarnation may be used again), ``convicted``
(a request, not the version, killed workers) and ``again`` (a message's descriptors did not fit in).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from gateway._kernels import ring
from gateway.errors import Unavailable
from gateway.serving import memory
from gateway.serving.channel import Channel, Message
from gateway.serving.dispatcher import Dispatcher, Limits
from gateway.serving.lane import Lane
from gateway.serving.routes import RouteTable, Version, VersionState
from gateway.telemetry.metrics import Metrics
from gateway.tensors import Signature

log = logging.getLogger("gateway.frontend")

ASK_AGAIN_S = 1.0
"""Pause before a message is asked for again whose descriptors this process had no room for."""


class SupervisorLink:
    """Keeps the route table true.

    Args:
        channel: to the supervisor.
        routes: kept up to date.
        metrics: told about workers.
        lane_bytes: budget of a lane.
        on_drain: called once when the supervisor asks for it.
        on_orphaned: called once when the supervisor is gone.
    """

    def __init__(
        self,
        channel: Channel,
        routes: RouteTable,
        metrics: Metrics,
        lane_bytes: int,
        on_drain: Callable[[], None],
        on_orphaned: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._routes = routes
        self._metrics = metrics
        self._lane_bytes = lane_bytes
        self._on_drain = on_drain
        self._on_orphaned = on_orphaned
        self._loop = asyncio.get_running_loop()
        self.told = asyncio.Event()
        """Set once the first routes are here: before that, every model would be unknown."""
        self._watched: dict[tuple[str, int, int], int] = {}  # pidfds by model, version, incarnation

    def start(self) -> None:
        """Begin to listen."""
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        while True:
            try:
                received = self._channel.receive()
            except BlockingIOError:
                return
            if received is None:
                self._loop.remove_reader(self._channel.fileno())
                self.told.set()
                for version in self._routes.versions():
                    if version.dispatcher is not None:
                        version.dispatcher.orphaned()
                self._on_orphaned()
                return
            message, fds = received
            self._on_message(message, fds)

    def _on_message(self, message: Message, fds: list[int]) -> None:
        match message["op"]:
            case "version":
                self._version(message, fds)
            case "worker_up":
                self._worker_up(message, fds)
            case "worker_exited":
                self._worker_exited(message)
            case "routes":
                self._routes.routes = dict(message["routes"])
                self.told.set()
            case "drain":
                self._on_drain()
            case unknown:
                log.error("the supervisor sent an unknown message: %s", unknown)

    def _version(self, message: Message, fds: list[int]) -> None:
        model, number = message["model"], message["version"]
        versions = self._routes.models.setdefault(model, {})
        version = versions.get(number)
        if version is None:
            version = versions[number] = Version(
                model, number, self._metrics.version(model, number)
            )
        version.state = VersionState(message["state"])
        version.reason = message["reason"]
        if version.state is VersionState.READY:
            if not fds:
                version.state = VersionState.WARMING
                self._ask_again(model=model, version=number)
                return
            version.signature = Signature.from_wire(message["signature"])
            version.config = message["config"]
            version.dispatcher = self._dispatcher(version, version.signature, message, fds[0])
        elif version.state is VersionState.FAILED and version.dispatcher is not None:
            dispatcher, version.dispatcher = version.dispatcher, None
            dispatcher.fail_all(Unavailable(f"model '{model}' version {number} has failed"))
            for lane in dispatcher.lanes:
                self._loop.remove_reader(lane.bell)
            dispatcher.close()

    def _ask_again(self, **what: Any) -> None:
        """Out of descriptors: what came with the last message is asked for again, when some are free."""
        log.error("out of file descriptors; asking for a message again in %g s", ASK_AGAIN_S)
        self._loop.call_later(ASK_AGAIN_S, partial(self._channel.send, "again", **what))

    def _dispatcher(
        self, version: Version, signature: Signature, message: Message, board_fd: int
    ) -> Dispatcher:
        board = memory.map_writable(board_fd, ring.board_bytes(message["seats"]))
        os.close(board_fd)

        def watch(lane: Lane) -> None:
            self._loop.add_reader(lane.bell, dispatcher.on_bell, lane)

        def convicted() -> None:
            self._channel.send("convicted", model=version.model, version=version.number)

        dispatcher = Dispatcher(
            signature,
            Limits(message["max_queue_size"], message["queue_timeout_ns"], self._lane_bytes),
            board,
            version.metrics,
            self._loop,
            watch,
            convicted,
        )
        return dispatcher

    def _worker_up(self, message: Message, fds: list[int]) -> None:
        version = self._routes.models[message["model"]][message["version"]]
        if not fds:
            self._ask_again(
                model=version.model, version=version.number, instance=message["instance"]
            )
            return
        pidfd, channel_fd = fds
        channel = Channel.from_fd(channel_fd)
        if version.dispatcher is None:
            channel.close()
            os.close(pidfd)
            return
        incarnation, instance = message["incarnation"], message["instance"]
        self._watched[(version.model, version.number, incarnation)] = pidfd
        version.dispatcher.worker_up(incarnation, channel)
        version.metrics.worker(instance, up=True, restarted=message["restarted"])
        self._loop.add_reader(pidfd, partial(self._on_death, version, incarnation, instance))

    def _on_death(self, version: Version, incarnation: int, instance: int) -> None:
        """A pidfd is readable: the worker is dead for certain."""
        pidfd = self._watched.pop((version.model, version.number, incarnation), None)
        if pidfd is None:
            return
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        version.metrics.worker(instance, up=False)
        if version.dispatcher is not None:
            version.dispatcher.worker_died(incarnation)

    def _worker_exited(self, message: Message) -> None:
        version = self._routes.models[message["model"]][message["version"]]
        incarnation = message["incarnation"]
        self._on_death(version, incarnation, message["instance"])
        if version.dispatcher is not None:
            version.dispatcher.worker_exited(incarnation, message["signal"], message["timed_out"])
        self._channel.send(
            "reclaimed", model=version.model, version=version.number, incarnation=incarnation
        )
