"""The supervisor: what is served, by which processes, and what happens when one ends.

It is on no request's path. Front ends and workers talk to each other over shared memory and channels of
their own; the supervisor makes those pairs, tells front ends what is ready, and starts anew what died.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from gateway.clock import NS_PER_MS
from gateway.control.frontend import Frontend, FrontendObserver
from gateway.control.holders import Outstanding
from gateway.control.models import MAX_MODELS, ModelControl, ModelSupervision
from gateway.control.plane import ControlPlane
from gateway.control.planning import MemoryBudget
from gateway.control.process import Child
from gateway.control.repository import ModelEntry
from gateway.control.seat import Seat
from gateway.control.version import VersionObserver, VersionSupervision
from gateway.control.watching import watch
from gateway.errors import ConfigurationError, GatewayError, LoadError, Unavailable
from gateway.serving.channel import Channel, Message, MessageTooLarge
from gateway.serving.routes import VersionState
from gateway.serving.routing import ModelRoute
from gateway.settings import Latest, ServerSettings, Specific
from gateway.store.store import AsyncStore

log = logging.getLogger("gateway.supervisor")

WATCH_INTERVAL_S = 1.0
"""How often workers are looked at for runs that take too long; the only timer of an idle server."""

KILL_MARGIN_S = 5.0
"""What children get beyond drain_timeout_s before they are killed."""

SYNC_S = 2.0
"""What front ends get to read what they were told of an operation, before its end is reported."""

MAX_ERROR = 4000
"""Characters of an error that a client is told of an operation; bounds the message."""


class Supervisor:
    """Runs the server until a signal, or until it cannot start.

    Args:
        settings: the server's.
        models: what to serve from the start.
        data: listening sockets of the data port, one for each front end.
        metrics: listening socket of the metrics port, which they share.
        admin: listening socket of the admin port; only its address is asked.
        store: open.
        database: its URL.
        secret: the server's own.

    Attributes:
        plane: what the admin port shows and changes.
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: Iterable[ModelEntry],
        data: Sequence[socket.socket],
        metrics: socket.socket,
        admin: socket.socket,
        store: AsyncStore,
        database: str,
        secret: bytes,
    ) -> None:
        self._settings = settings
        self._entries = list(models)
        self._sockets = (*data, metrics)
        watch = FrontendObserver(
            on_up=self._on_frontend_up,
            on_message=self._on_frontend_message,
            on_gone=self._on_frontend_gone,
            on_failed=self._fail_start,
        )
        self._frontends = [
            Frontend(index, settings, sock, metrics, watch) for index, sock in enumerate(data)
        ]
        self._told: dict[str, _Told] = {}
        self._observer = VersionObserver(
            frontends=lambda: (frontend.index for frontend in self._live_frontends()),
            on_state=self._on_state,
            on_worker=self._on_worker,
            on_worker_exit=self._on_worker_exit,
            on_stopped=self._on_stopped,
            on_routes=self._tell_routes,
            on_forgotten=self._on_forgotten,
        )
        self._models: dict[str, ModelSupervision] = {}
        self._budget = MemoryBudget(settings.memory_bytes)
        self._control = ModelControl(settings, self._models, self._budget, self._observer)
        self.plane = ControlPlane(
            settings,
            store,
            database,
            secret,
            self._models,
            self._control,
            self._publish,
            self._tell_keys,
        )
        self._beside: set[asyncio.Task[None]] = set()
        self._operations: set[asyncio.Task[None]] = set()
        self._syncs: dict[int, Outstanding] = {}
        self._sync_numbers = count(1)
        self._stopping = False
        self._stopped = asyncio.Event()
        self._started = asyncio.Event()
        self._start_error: GatewayError | None = None
        self._admin = _address(admin)

    async def prepare(self) -> None:
        """Read what was decided, and make the models; before this there are no keys and no models.

        Raises:
            ConfigurationError: too many models, or a policy names a version that is not there.
            Unavailable: the store does not answer.
        """
        if len(self._entries) > MAX_MODELS:
            raise ConfigurationError(
                f"model_repository: {len(self._entries)} models, of {MAX_MODELS} at most"
            )
        records = await self.plane.read()
        for entry in self._entries:
            model = ModelSupervision(entry.name, self._settings, self._budget, self._observer)
            self.plane.adopt(model, records.get(entry.name))
            model.prepare(entry)
            if model.versions or model.record.revision:
                self._models[entry.name] = model
        for name, record in records.items():
            if name not in self._models and record.revision:
                # Its files are gone: what was decided can be seen all the same, and ended.
                model = ModelSupervision(name, self._settings, self._budget, self._observer)
                self.plane.adopt(model, record)
                self._models[name] = model

    async def run(self) -> None:
        """Start everything, serve until SIGTERM or SIGINT, drain, and leave no process behind.

        Raises:
            LoadError: a version cannot be loaded at start and ``exit_on_error`` is set.
            GatewayError: a front end cannot be started.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        for frontend in self._frontends:
            frontend.start()
        for version in self._versions():
            version.start()
        await self.plane.start()
        self._begin_beside(self._watch())
        if self._settings.watch_repository:
            self._begin_beside(watch(self._settings.model_repository, self._control))
        self._check_started()
        await self._stopped.wait()
        for task in self._beside:
            task.cancel()
        await self.plane.close()
        if self._start_error is not None:
            raise self._start_error

    def _begin_beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Something that goes on until the server ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._beside.add(task)
        task.add_done_callback(_log_failure)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            for version in self._versions():
                version.kill_overdue()
            try:
                await self.plane.refresh()
            except GatewayError as error:
                log.error("the store cannot be read: %s", error.message)

    def _versions(self) -> Iterator[VersionSupervision]:
        for model in self._models.values():
            yield from model.versions.values()

    # Front ends

    def _live_frontends(self) -> Iterator[Frontend]:
        return (frontend for frontend in self._frontends if frontend.process is not None)

    def _on_frontend_up(self, frontend: Frontend) -> None:
        for version in self._versions():
            self._tell_version(frontend, version)
        for name, told in self._told.items():
            frontend.tell("route", model=name, **told.to_wire())
        self._tell_keys([frontend])
        frontend.tell("started", is_started=self._started.is_set())

    def _on_frontend_message(self, frontend: Frontend, message: Message) -> None:
        match message["op"]:
            case "serving":
                self._check_started()
            case "operation":
                self._begin_operation(frontend.process, message)
            case "synced":
                if sync := self._syncs.get(message["number"]):
                    sync.settle(frontend.index)
            case _:
                self._on_version_message(frontend, message)

    def _on_version_message(self, frontend: Frontend, message: Message) -> None:
        model = self._models.get(message["model"])
        version = model.versions.get(message["version"]) if model is not None else None
        if version is None:
            return  # it was unloaded meanwhile, and forgotten
        match message["op"]:
            case "reclaimed":
                version.reclaimed(message["incarnation"], frontend.index)
            case "convicted":
                version.convicted()
            case "drained":
                version.drained(frontend.index)
            case "again" if "instance" in message:
                self._introduce(frontend, version, version.seats[message["instance"]])
            case "again":
                self._tell_version(frontend, version)

    def _on_frontend_gone(self, frontend: Frontend) -> None:
        for version in self._versions():
            version.frontend_gone(frontend.index)
        for sync in self._syncs.values():
            sync.settle(frontend.index)
        if self._stopping and not any(self._live_frontends()):
            self._stop_workers()

    def _tell_version(self, frontend: Frontend, version: VersionSupervision) -> None:
        """All that there is to know about a version."""
        self._tell_state(version, [frontend])
        for seat in version.ready_seats():
            self._introduce(frontend, version, seat)

    def _tell_state(self, version: VersionSupervision, frontends: Iterable[Frontend]) -> None:
        fields: dict[str, object] = {}
        fds: tuple[int, ...] = ()
        if version.state not in (VersionState.UNLOADING, VersionState.UNLOADED):
            fds = (version.board_fd,)  # front ends count on it what they refuse, too
            fields["seats"] = len(version.seats)
        if version.state is VersionState.READY:
            settings = version.settings
            fields |= {
                "signature": version.signature,
                "max_queue_size": settings.queue.max_size,
                "queue_timeout_ns": settings.queue.timeout_ms * NS_PER_MS,
                "priority_levels": settings.queue.priority_levels,
                "default_level": settings.queue.default_level,
                "slo_ns": round((settings.slo_ms or 0) * NS_PER_MS),
                "config": {
                    "max_queue_delay_us": settings.max_queue_delay_us,
                    "instances": [(spec.device, spec.count) for spec in settings.instances],
                    "version_policy": _policy_document(settings.version_policy),
                },
            }
        try:
            for frontend in frontends:
                frontend.tell(
                    "version",
                    fds,
                    model=version.model,
                    version=version.number,
                    state=version.state.value,
                    reason=version.reason,
                    **fields,
                )
        except MessageTooLarge as error:
            version.fail(f"its signature and settings are too long: {error}")

    def _tell_routes(self) -> None:
        """Publish the routes and labels that have changed."""
        for name in [*self._told.keys() - self._models.keys(), *self._models]:
            self._tell_route(name)

    def _tell_route(self, name: str) -> None:
        """The same of one model."""
        model = self._models.get(name)
        told = _Told() if model is None else _Told(model.route, dict(model.record.labels))
        if told == self._told.get(name, _Told()):
            return
        self._told[name] = told
        if told == _Told():
            del self._told[name]
        for frontend in self._frontends:
            frontend.tell("route", model=name, **told.to_wire())

    async def _publish(self) -> bool:
        """The same; whether every front end has acknowledged it."""
        self._tell_routes()
        return await self._sync()

    def _tell_keys(self, frontends: Iterable[Frontend] | None = None) -> None:
        """Tell the keys of the data port, to all front ends unless said otherwise."""
        keys = self.plane.keyring.to_wire(required=self._settings.data_keys)
        for frontend in self._frontends if frontends is None else frontends:
            try:
                frontend.tell("keys", **keys)
            except MessageTooLarge as error:
                log.error("too many API keys for a message: %s; the data port takes none", error)
                frontend.tell("keys", **{**keys, "keys": []})

    # Operations

    def _begin_operation(self, asker: Child | None, message: Message) -> None:
        operation = asyncio.get_running_loop().create_task(self._operate(asker, message))
        self._operations.add(operation)
        operation.add_done_callback(self._operations.discard)

    async def _operate(self, asker: Child | None, message: Message) -> None:
        """Load or unload a model for a client, and tell the front end that asked what came of it."""
        error: GatewayError | None = None
        try:
            if not self._started.is_set() or self._stopping:
                raise Unavailable("the server is starting or shutting down")
            check = self.plane.registry.check_idle if message["action"] == "unload" else None
            await self._control.perform(message["action"], message["model"], check)
            await self._sync()
        except GatewayError as refused:
            error = refused
        except asyncio.CancelledError:
            error = Unavailable("the server is shutting down")
        except Exception:
            log.exception("an operation on a model failed")
            error = GatewayError("internal error")
        if asker is not None and asker.is_alive:  # its successor would take the number for its own
            code, text = (error.code, error.message) if error is not None else ("", "")
            asker.send("operated", number=message["number"], code=code, error=text[:MAX_ERROR])

    async def _sync(self) -> bool:
        """Until all front ends have done what they were told so far: then every connection agrees.

        Gives whether they have, in the time that they get.
        """
        number = next(self._sync_numbers)
        sync = self._syncs[number] = Outstanding(each.index for each in self._live_frontends())
        try:
            for frontend in self._frontends:
                frontend.tell("sync", number=number)
            async with asyncio.timeout(SYNC_S):
                await sync.wait()
            return True
        except TimeoutError:
            log.warning("a front end does not react")
            return False
        finally:
            del self._syncs[number]

    # Versions and workers

    def _on_state(self, version: VersionSupervision) -> None:
        self._tell_state(version, self._frontends)
        self._tell_route(version.model)
        self.plane.on_state(version)
        if version.state is VersionState.FAILED:
            text = f"model '{version.model}' version {version.number} cannot be served: "
            log.error("%s%s", text, version.detail)
            is_needed = self._settings.exit_on_error and self._is_awaited(version)
            if is_needed and not self._started.is_set():
                self._fail_start(LoadError(text + version.detail))
        self._check_started()

    def _on_worker(self, version: VersionSupervision, seat: Seat) -> None:
        for frontend in self._live_frontends():
            self._introduce(frontend, version, seat)

    def _introduce(self, frontend: Frontend, version: VersionSupervision, seat: Seat) -> None:
        """Connect a worker that is ready and a front end."""
        if seat.child is None or not seat.is_loaded:
            return
        if version.state is VersionState.FAILED:
            return  # nobody could be told what it takes
        ours, theirs = Channel.pair()
        seat.child.send("frontend", (theirs.fileno(),))
        frontend.tell(
            "worker_up",
            (seat.child.pidfd, ours.fileno()),
            model=version.model,
            version=version.number,
            instance=seat.index,
            incarnation=seat.incarnation,
        )
        ours.close()
        theirs.close()

    def _on_worker_exit(
        self, version: VersionSupervision, seat: Seat, incarnation: int, signal_number: int
    ) -> None:
        for frontend in self._frontends:
            frontend.tell(
                "worker_exited",
                model=version.model,
                version=version.number,
                instance=seat.index,
                incarnation=incarnation,
                signal=signal_number,
                timed_out=seat.timed_out,
            )

    def _is_awaited(self, version: VersionSupervision) -> bool:
        """Whether the server's start waits for a version: not for a rollout's canary, which may be bad."""
        model = self._models.get(version.model)
        return model is None or version.number not in model.deferred

    def _check_started(self) -> None:
        """Say once that the server is ready, and where."""
        if self._started.is_set() or self._stopping:
            return
        if not all(frontend.has_served for frontend in self._frontends):
            return
        if any(version.is_loading and self._is_awaited(version) for version in self._versions()):
            return
        self._started.set()
        for frontend in self._frontends:
            frontend.tell("started", is_started=True)
        data, metrics = _address(self._sockets[0]), _address(self._sockets[-1])
        ready = sum(v.state is VersionState.READY for v in self._versions())
        log.info(
            "serving %d model versions on %s, metrics on %s/metrics, admin on %s",
            ready,
            data,
            metrics,
            self._admin,
        )

    # The end

    def _on_signal(self) -> None:
        if self._stopping:
            log.warning("a second signal: ending now")
            self._kill()
            return
        log.info("draining")
        self._stopping = True
        self.plane.conductor.close()
        for operation in self._operations:
            operation.cancel()
        deadline_s = self._settings.drain_pause_s + self._settings.drain_timeout_s + KILL_MARGIN_S
        asyncio.get_running_loop().call_later(deadline_s, self._kill)
        for frontend in self._frontends:
            frontend.drain()
        if not any(self._live_frontends()):
            self._stop_workers()
        for sock in self._sockets:
            sock.close()  # once the front ends close their own, new connections are refused

    def _fail_start(self, error: GatewayError) -> None:
        """The start has failed: there is nothing to drain."""
        if not self._stopping:
            self._start_error = error
            self._stopping = True
            self._kill()

    def _stop_workers(self) -> None:
        for version in self._versions():
            version.stop()
        self._check_stopped()

    def _kill(self) -> None:
        for frontend in self._frontends:
            frontend.kill()
        for version in self._versions():
            version.kill()
        self._check_stopped()

    def _on_stopped(self, _version: VersionSupervision) -> None:
        self._check_stopped()

    def _on_forgotten(self, version: VersionSupervision) -> None:
        for frontend in self._frontends:
            frontend.tell("forget", model=version.model, version=version.number)

    def _check_stopped(self) -> None:
        workers_gone = all(version.is_stopped for version in self._versions())
        if self._stopping and workers_gone and not any(self._live_frontends()):
            self._stopped.set()


@dataclass(frozen=True, slots=True)
class _Told:
    """What front ends know of a model's route."""

    route: ModelRoute | None = None
    labels: dict[str, int] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """For the message."""
        return {
            "route": None if self.route is None else self.route.to_wire(),
            "labels": self.labels,
        }


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a part of the supervisor has ended", exc_info=error)


def _policy_document(policy: Latest | Specific | str) -> dict[str, object] | str:
    return policy if isinstance(policy, str) else policy.model_dump()


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
