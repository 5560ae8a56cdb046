"""One version of a model: its workers, from load to the last respawn."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

from gateway._kernels import ring
from gateway.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from gateway.control.process import Child
from gateway.control.repository import VersionEntry
from gateway.serving import memory
from gateway.serving.channel import Message
from gateway.serving.routes import VersionState
from gateway.settings import Instance, ModelSettings, ServerSettings

log = logging.getLogger("gateway.supervisor")

BACKOFF_S = (0.0, 1.0, 2.0, 3.0, 5.0)
"""Pause before a worker is started anew, by deaths without a completed batch between them."""

CRASH_LOOP_DEATHS = 5
"""Deaths in one seat, without a completed batch of the version between them, that make it FAILED.

Counted by seat: many workers that die at once (the OOM killer, an operator) are not a loop."""

HEALTHY_S = 60.0
"""A worker that lived so long was no part of a crash loop, idle as it may have been."""

SPAWN_AGAIN_S = 1.0
"""Pause before another attempt where the system had no process or descriptors for a worker."""

_MOVES = {
    VersionState.LOADING: {VersionState.WARMING, VersionState.READY, VersionState.FAILED},
    VersionState.WARMING: {VersionState.READY, VersionState.FAILED},
    VersionState.READY: {VersionState.FAILED},
    VersionState.FAILED: set[VersionState](),
}


@dataclass(slots=True)
class Seat:
    """One instance: its settings, and the process that fills it at present."""

    index: int
    instance: Instance
    child: Child | None = None
    incarnation: int = 0
    is_loaded: bool = False
    starts: int = 0
    timed_out: bool = False
    deaths: int = 0  # since the version completed a batch
    completed: int = 0  # batches of the version when this seat's last worker died
    started_ns: int = 0
    load_timer: asyncio.TimerHandle | None = None


class VersionSupervision:
    """Starts a version's workers, watches them and starts them anew.

    Args:
        model: its name.
        entry: number and file.
        settings: the model's.
        server: the server's.
        observer: told about every change that front ends must know.
    """

    def __init__(
        self,
        model: str,
        entry: VersionEntry,
        settings: ModelSettings,
        server: ServerSettings,
        observer: VersionObserver,
    ) -> None:
        self.model = model
        self.number = entry.version
        self.settings = settings
        self.state = VersionState.LOADING
        self.reason = self.detail = ""
        self.signature: dict[str, object] = {}
        self._path = entry.path
        self._server = server
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        instances = [spec for spec in settings.instances for _ in range(spec.count)]
        self.seats = [Seat(i, spec) for i, spec in enumerate(instances)]
        board_bytes = ring.board_bytes(len(self.seats))
        self.board_fd = memory.create("board", board_bytes)
        self._board: mmap = memory.map_writable(self.board_fd, board_bytes)
        self._unreclaimed: set[int] = set()
        self._last_incarnation = 0
        self._completed = 0  # batches of workers that are gone
        self._stopping = False

    def start(self) -> None:
        """Start every worker; the version is READY once all have loaded."""
        for seat in self.seats:
            self._spawn(seat)

    def ready_seats(self) -> list[Seat]:
        """Seats whose worker has loaded and lives."""
        return [seat for seat in self.seats if seat.is_loaded and seat.child is not None]

    def reclaimed(self, incarnation: int) -> None:
        """The front end holds nothing of this worker any more: its number may be used again."""
        self._unreclaimed.discard(incarnation)

    def frontend_gone(self) -> None:
        """With it went its lanes: only numbers of live workers are in use."""
        self._unreclaimed = {seat.incarnation for seat in self.seats if seat.child is not None}

    def convicted(self) -> None:
        """The recent deaths were the doing of a request."""
        for seat in self.seats:
            seat.deaths = 0

    def kill_overdue(self) -> None:
        """Kill workers whose run exceeds ``execution_timeout_ms``."""
        limit_ns = self.settings.execution_timeout_ms * NS_PER_MS
        now_ns = monotonic_ns()
        states = ring.seats(self._board)
        for seat in self.ready_seats():
            incarnation, _batches, busy_since_ns, _waiting = states[seat.index]
            is_overdue = busy_since_ns and now_ns - busy_since_ns > limit_ns
            if is_overdue and incarnation == seat.incarnation and seat.child is not None:
                log.error(
                    "model '%s' version %d: a run took longer than execution_timeout_ms (%d); "
                    "its worker is killed",
                    self.model,
                    self.number,
                    self.settings.execution_timeout_ms,
                )
                seat.timed_out = True
                seat.child.kill()

    def stop(self) -> None:
        """Ask every worker to exit after its batch; one that still loads hears nothing and is killed."""
        self._stopping = True
        for seat in self.seats:
            if seat.child is not None and seat.is_loaded:
                seat.child.send("exit")
            elif seat.child is not None:
                seat.child.kill()

    def kill(self) -> None:
        """End every worker now."""
        self._stopping = True
        for seat in self.seats:
            if seat.child is not None:
                seat.child.kill()

    @property
    def is_loading(self) -> bool:
        """Whether it has not been READY yet, and may be."""
        return self.state in (VersionState.LOADING, VersionState.WARMING)

    @property
    def is_stopped(self) -> bool:
        """Whether no process is left."""
        return all(seat.child is None for seat in self.seats)

    # Starting

    def _spawn(self, seat: Seat) -> None:
        if self._stopping or self.state is VersionState.FAILED:
            return
        seat.incarnation = self._next_incarnation()
        seat.is_loaded = seat.timed_out = False
        seat.started_ns = monotonic_ns()
        try:
            seat.child = Child(
                "gateway.serving.worker",
                ["--name", f"{self.model}/{self.number}#{seat.index}"],
                lambda message, _fds: self._on_message(seat, message),
                lambda status: self._on_exit(seat, status),
            )
        except OSError as error:
            log.error("cannot start a worker: %s; trying again", error)
            self.reclaimed(seat.incarnation)
            self._loop.call_later(SPAWN_AGAIN_S, self._spawn, seat)
            return
        seat.starts += 1
        seat.load_timer = self._loop.call_later(
            self._server.load_timeout_s, self._on_load_timeout, seat
        )
        seat.child.send(
            "load",
            (self.board_fd,),
            path=os.fspath(self._path),
            device=seat.instance.device,
            threads=seat.instance.threads,
            max_batch_size=self.settings.max_batch_size,
            max_queue_delay_us=self.settings.max_queue_delay_us,
            warmup=self.settings.warmup,
            seats=len(self.seats),
            seat=seat.index,
            incarnation=seat.incarnation,
            orphan_grace_s=self._server.orphan_grace_s,
            log_level=self._server.log_level,
            log_format=self._server.log_format,
        )

    def _next_incarnation(self) -> int:
        while True:
            self._last_incarnation = self._last_incarnation % ring.MAX_INCARNATION + 1
            if self._last_incarnation not in self._unreclaimed:
                self._unreclaimed.add(self._last_incarnation)
                return self._last_incarnation

    def _on_message(self, seat: Seat, message: Message) -> None:
        match message["op"]:
            case "warming" if self.state is VersionState.LOADING:
                self._move(VersionState.WARMING)
            case "loaded":
                self._on_loaded(seat, message["signature"])
            case "failed" if self.is_loading and not self._stopping:
                self._fail(message["reason"], message["detail"])
            case "failed":
                log.error("model '%s' version %d: %s", self.model, self.number, message["detail"])

    def _on_loaded(self, seat: Seat, signature: dict[str, object]) -> None:
        self._stop_load_timer(seat)
        if self.signature and signature != self.signature:
            # Front ends know the old one, and would read its outputs as that.
            self._fail("its file changed since it was loaded: a version's content is immutable")
            return
        seat.is_loaded = True
        self.signature = signature
        if not self.is_loading:
            self._observer.on_worker(self, seat)
        elif all(other.is_loaded for other in self.seats):
            self._move(VersionState.READY)
            for ready in self.seats:
                self._observer.on_worker(self, ready)

    def _on_load_timeout(self, seat: Seat) -> None:
        reason = f"it did not load within load_timeout_s ({self._server.load_timeout_s:g} s)"
        if self.is_loading and not self._stopping:
            self._fail(reason)
        elif seat.child is not None:
            log.error("model '%s' version %d: %s", self.model, self.number, reason)
            seat.child.kill()

    def _stop_load_timer(self, seat: Seat) -> None:
        if seat.load_timer is not None:
            seat.load_timer.cancel()
            seat.load_timer = None

    # Ending

    def _on_exit(self, seat: Seat, status: int) -> None:
        incarnation, was_loaded = seat.incarnation, seat.is_loaded
        seat.child, seat.is_loaded = None, False
        self._stop_load_timer(seat)
        sat, batches, _busy_since_ns, _waiting = ring.seats(self._board)[seat.index]
        if sat == incarnation:
            self._completed += batches
        if was_loaded:
            self._observer.on_worker_exit(self, seat, incarnation, -status if status < 0 else 0)
        else:
            self.reclaimed(incarnation)
        if self._stopping or self.state is VersionState.FAILED:
            self._observer.on_stopped(self)
        elif self.is_loading:
            self._fail(f"the worker {describe_exit(status)} while loading it")
        else:
            self._replace(seat, status)

    def _replace(self, seat: Seat, status: int) -> None:
        """Start another worker in a seat whose worker died, unless it dies again and again."""
        log.warning(
            "model '%s' version %d: the worker of instance %d %s",
            self.model,
            self.number,
            seat.index,
            describe_exit(status),
        )
        completed = self._completed_batches()
        lived_s = (monotonic_ns() - seat.started_ns) / NS_PER_S
        is_loop = completed == seat.completed and lived_s < HEALTHY_S
        seat.deaths = seat.deaths + 1 if is_loop else 1
        seat.completed = completed
        if seat.deaths >= CRASH_LOOP_DEATHS:
            self._fail(f"a worker died {seat.deaths} times without completing a batch")
            return
        pause_s = BACKOFF_S[min(seat.deaths, len(BACKOFF_S)) - 1]
        self._loop.call_later(pause_s, self._spawn, seat)

    def _completed_batches(self) -> int:
        """Batches that all its workers, living and dead, have completed."""
        states = ring.seats(self._board)
        return self._completed + sum(states[seat.index][1] for seat in self.ready_seats())

    def _fail(self, reason: str, detail: str = "") -> None:
        """FAILED: clients are told the reason, operators the detail."""
        self.reason = reason
        self.detail = detail or reason
        self._move(VersionState.FAILED)
        for seat in self.seats:
            if seat.child is not None:
                seat.child.kill()

    def _move(self, state: VersionState) -> None:
        """The one place where the state changes. RuntimeError on an illegal move."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"a version cannot go from {self.state.name} to {state.name}")
        self.state = state
        self._observer.on_state(self)


@dataclass(frozen=True, slots=True)
class VersionObserver:
    """What the supervisor wants to hear of a version."""

    on_state: Callable[[VersionSupervision], None]
    on_worker: Callable[[VersionSupervision, Seat], None]
    on_worker_exit: Callable[[VersionSupervision, Seat, int, int], None]
    on_stopped: Callable[[VersionSupervision], None]


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
