"""The front end's link to its supervisor: turns messages into versions, workers and routes.

Messages in: ``version`` (model, version, state, reason, seats; with READY also signature, config and
limits; fds: board, until it is unloaded), ``forget`` (an unloaded version's files are gone), ``worker_up``
(fds: pidfd, channel), ``worker_exited`` (signal, timed_out), ``route`` (a model's route, if any, and its
labels), ``keys`` (of the data port, and whether one is required), ``started`` (all of that has been said;
whether the server's start is over), ``operated`` (how an operation ended), ``sync`` (number) and ``drain``.
Messages out: ``serving``, ``reclaimed`` (an incarnation may be used again), ``convicted`` (a
request, not the version, killed workers), ``drained`` (nothing is held of a version that is unloaded),
``operation`` (load or unload), ``synced`` (all that came before the ``sync`` of this number is done) and
``again`` (a message's descriptors did not fit in).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from mmap import mmap
from typing import Any

from gateway._kernels import ring
from gateway._kernels.burst import Burst
from gateway.clock import NS_PER_S, monotonic_ns
from gateway.errors import Unavailable
from gateway.frontend.guard import Guard
from gateway.frontend.mirror import Mirror
from gateway.frontend.operations import Operations
from gateway.serving import memory
from gateway.serving.channel import Channel, Message
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.lane import Lane
from gateway.serving.limits import Limits
from gateway.serving.options import FrontendOptions
from gateway.serving.routes import RouteTable, Version, VersionState
from gateway.serving.routing import ModelRoute
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.metrics import Metrics
from gateway.tensors import Signature

log = logging.getLogger("gateway.frontend")

DRAIN_LOOK_S = 0.02
"""Pause between two looks at whether requests are still in flight, where one unloads or the server ends."""

ASK_AGAIN_S = 1.0
"""Pause before a message is asked for again whose descriptors this process had no room for."""


class SupervisorLink:
    """Keeps the route table true.

    Args:
        channel: to the supervisor.
        routes: kept up to date.
        metrics: told about workers.
        operations: told how they ended.
        guard: told which keys there are.
        mirror: told which versions are unloaded.
        options: the front end's index and bounds.
        on_drain: called once when the supervisor asks for it.
        on_orphaned: called once when the supervisor is gone.
        on_change: called after each message: what was known of versions and routes may be wrong.
        burst: wakes workers for rows that they could seal, and is told where reports come from.
    """

    def __init__(
        self,
        channel: Channel,
        routes: RouteTable,
        metrics: Metrics,
        operations: Operations,
        guard: Guard,
        mirror: Mirror,
        options: FrontendOptions,
        on_drain: Callable[[], None],
        on_orphaned: Callable[[], None],
        on_change: Callable[[], None],
        burst: Burst,
    ) -> None:
        self._channel = channel
        self._routes = routes
        self._metrics = metrics
        self._operations = operations
        self._guard = guard
        self._mirror = mirror
        self._index = options.index
        self._lane_bytes = options.lane_bytes
        self._drain_timeout_ns = round(options.drain_timeout_s * NS_PER_S)
        self._on_drain = on_drain
        self._on_orphaned = on_orphaned
        self._on_change = on_change
        self._burst = burst
        self._loop = asyncio.get_running_loop()
        self.told = asyncio.Event()
        """Set once versions, routes and keys are known: before that, every model would be unknown."""
        self._watched: dict[tuple[str, int, int], int] = {}  # pidfds by model, version, incarnation
        self._boards: dict[tuple[str, int], mmap] = {}

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
                self._operations.orphaned()
                self._on_orphaned()
                return
            message, fds = received
            self._on_message(message, fds)
            self._on_change()

    def _on_message(self, message: Message, fds: list[int]) -> None:
        match message["op"]:
            case "version":
                self._version(message, fds)
            case "worker_up":
                self._worker_up(message, fds)
            case "worker_exited":
                self._worker_exited(message)
            case "forget":
                self._routes.forget(message["model"], message["version"])
            case "operated":
                self._operations.ended(message["number"], message["code"], message["error"])
            case "route":
                wire = message["route"]
                route = None if wire is None else ModelRoute.from_wire(wire)
                self._routes.direct(message["model"], route, message["labels"])
            case "keys":
                self._guard.update(
                    required=message["required"], secret=message["secret"], keys=message["keys"]
                )
            case "started":
                self._routes.is_started = message["is_started"]
                self.told.set()
            case "sync":
                self._channel.send("synced", number=message["number"])
            case "drain":
                self._on_drain()
            case unknown:
                log.error("the supervisor sent an unknown message: %s", unknown)

    def _version(self, message: Message, fds: list[int]) -> None:
        model, number = message["model"], message["version"]
        state = VersionState(message["state"])
        versions = self._routes.models.setdefault(model, {})
        version = versions.get(number)
        if version is None or (state is VersionState.LOADING and version.state is not state):
            version = versions[number] = Version(
                model, number, self._metrics.version(model, number)
            )
        version.state, version.reason = state, message["reason"]
        if fds and not version.metrics.is_attached:
            ledger = Ledger.mapped(fds[0], message["seats"])
            version.metrics.attach(ledger, self._index)
        match state:
            case VersionState.READY:
                self._serve(version, message, fds)
            case VersionState.FAILED:
                self._close(version, Unavailable(f"model '{model}' version {number} has failed"))
            case VersionState.UNLOADING:
                self._mirror.drop(version)
                self._drain(version, monotonic_ns() + self._drain_timeout_ns)
            case VersionState.UNLOADED:
                self._let_go(version)  # held only where the supervisor has not waited for us
        for fd in fds:
            os.close(fd)

    def _serve(self, version: Version, message: Message, fds: list[int]) -> None:
        """READY: make what takes its requests."""
        if version.dispatcher is not None:
            return  # told twice: it had been asked for again
        if not fds:
            version.state = VersionState.WARMING
            self._ask_again(version)
            return
        version.signature = Signature.from_wire(message["signature"])
        version.config = message["config"]
        version.dispatcher = self._dispatcher(version, version.signature, message, fds[0])

    def _drain(self, version: Version, deadline_ns: int) -> None:
        """Let go of a version that is unloaded, once nothing of it is in flight or at the deadline."""
        if version.state is not VersionState.UNLOADING:
            return  # the supervisor has not waited for it, and its number may be another one's by now
        is_serving = version.dispatcher is not None and version.in_flight > 0
        if is_serving and monotonic_ns() < deadline_ns:
            # Looked for, not told: a request's end should not cost a question that is so rarely asked.
            self._loop.call_later(DRAIN_LOOK_S, self._drain, version, deadline_ns)
            return
        self._let_go(version)
        self._channel.send("drained", model=version.model, version=version.number)

    def _let_go(self, version: Version) -> None:
        """Give back whatever is held of a version."""
        self._close(version, version.refusal())
        for key in [key for key in self._watched if key[:2] == (version.model, version.number)]:
            self._unwatch(key)
        version.metrics.remove()

    def _close(self, version: Version, error: Unavailable) -> None:
        """End what takes a version's requests, and give back its lanes; those in flight get the error."""
        if version.dispatcher is None:
            return
        dispatcher, version.dispatcher = version.dispatcher, None
        dispatcher.fail_all(error)
        for lane in dispatcher.lanes:
            self._loop.remove_reader(lane.bell)
            self._burst.listen(lane.producer, None)
        dispatcher.close()
        with suppress(BufferError):  # a view lives on in a traceback: unmapped with it
            self._boards.pop((version.model, version.number)).close()

    def _ask_again(self, version: Version, **what: Any) -> None:
        """Out of descriptors: what came with the last message is asked for again, when some are free."""
        log.error("out of file descriptors; asking for a message again in %g s", ASK_AGAIN_S)

        def ask() -> None:
            if self._routes.models.get(version.model, {}).get(version.number) is version:
                self._channel.send("again", model=version.model, version=version.number, **what)

        self._loop.call_later(ASK_AGAIN_S, ask)

    def _dispatcher(
        self, version: Version, signature: Signature, message: Message, board_fd: int
    ) -> Dispatcher:
        board = memory.map_writable(board_fd, ring.board_bytes(message["seats"]))
        self._boards[(version.model, version.number)] = board

        def watch(lane: Lane) -> None:
            self._loop.add_reader(lane.bell, dispatcher.on_bell, lane)
            self._burst.listen(lane.producer, partial(dispatcher.on_report, lane))

        def convicted() -> None:
            self._channel.send("convicted", model=version.model, version=version.number)

        dispatcher = Dispatcher(
            signature,
            Limits(
                message["max_queue_size"],
                message["queue_timeout_ns"],
                self._lane_bytes,
                message["priority_levels"],
                message["default_level"],
                message["slo_ns"],
            ),
            board,
            version.metrics,
            self._loop,
            watch,
            convicted,
            self._burst.wake,
        )
        return dispatcher

    def _worker_up(self, message: Message, fds: list[int]) -> None:
        version = self._routes.models[message["model"]][message["version"]]
        if not fds:
            self._ask_again(version, instance=message["instance"])
            return
        pidfd, channel_fd = fds
        channel = Channel.from_fd(channel_fd)
        incarnation, instance = message["incarnation"], message["instance"]
        key = version.model, version.number, incarnation
        if version.dispatcher is None or key in self._watched:
            channel.close()
            os.close(pidfd)
            return
        self._watched[key] = pidfd
        version.dispatcher.worker_up(incarnation, channel)
        version.metrics.worker(instance, up=True)
        self._loop.add_reader(pidfd, partial(self._on_death, version, incarnation, instance))

    def _on_death(self, version: Version, incarnation: int, instance: int) -> None:
        """A pidfd is readable: the worker is dead for certain."""
        key = version.model, version.number, incarnation
        if key not in self._watched:
            return
        self._unwatch(key)
        version.metrics.worker(instance, up=False)
        if version.dispatcher is not None:
            version.dispatcher.worker_died(incarnation)

    def _unwatch(self, key: tuple[str, int, int]) -> None:
        pidfd = self._watched.pop(key)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)

    def _worker_exited(self, message: Message) -> None:
        version = self._routes.models[message["model"]][message["version"]]
        incarnation = message["incarnation"]
        self._on_death(version, incarnation, message["instance"])
        if version.dispatcher is not None:
            version.dispatcher.worker_exited(incarnation, message["signal"], message["timed_out"])
        if version.state is not VersionState.UNLOADING or version.dispatcher is not None:
            # Otherwise "drained" has said it, and the version may be another one by now.
            self._channel.send(
                "reclaimed", model=version.model, version=version.number, incarnation=incarnation
            )
