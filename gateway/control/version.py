"""One version of a model: its workers, from load to the last respawn."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from gateway._kernels import ring
from gateway.clock import NS_PER_MS, monotonic_ns, wall_s
from gateway.control.holders import Holders
from gateway.control.modelfile import CHANGED, ModelFile
from gateway.control.planning import Key, MemoryBudget, load_plan, worker_options
from gateway.control.process import Child
from gateway.control.repository import VersionEntry
from gateway.control.seat import Seat, describe_exit
from gateway.control.states import check_move
from gateway.errors import LoadError
from gateway.serving import memory
from gateway.serving.channel import Message, MessageTooLarge
from gateway.serving.plan import Understanding, no_memory
from gateway.serving.routes import VersionState
from gateway.settings import ModelSettings, ServerSettings
from gateway.telemetry.ledger import Ledger, board_bytes

log = logging.getLogger("gateway.supervisor")

SPAWN_AGAIN_S = 1.0
"""Pause before another attempt where the system had no process or descriptors for a worker."""

GRACE_S = 5.0
"""What a front end gets beyond its time to drain, and a worker to exit, before nobody waits for it."""


class VersionSupervision:
    """Starts a version's workers, watches them and starts them anew.

    Args:
        model: its name.
        entry: number and file.
        settings: the model's; kept for as long as it is loaded.
        server: the server's.
        budget: memory of the server.
        observer: told about every change that front ends must know.

    Raises:
        OSError: no memory or descriptor for its board.
    """

    def __init__(
        self,
        model: str,
        entry: VersionEntry,
        settings: ModelSettings,
        server: ServerSettings,
        budget: MemoryBudget,
        observer: VersionObserver,
    ) -> None:
        self.model = model
        self.number = entry.version
        self.settings = settings
        self.state = VersionState.LOADING
        self.reason = self.detail = ""
        self.signature: dict[str, object] = {}
        self.since_s = wall_s()
        """When it came into its state, by the wall clock."""
        self._file = ModelFile(entry.path)
        self._server = server
        self._budget = budget
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        instances = [spec for spec in settings.instances for _ in range(spec.count)]
        self.seats = [Seat(i, spec) for i, spec in enumerate(instances)]
        seats = len(self.seats)
        self.board_fd = memory.create("board", board_bytes(server.frontends, seats))
        self._board: mmap = memory.map_writable(self.board_fd, ring.board_bytes(seats))
        self.ledger = Ledger.mapped(self.board_fd, seats)
        self.workers_up: dict[int, bool] = {}
        """By instance, whether its worker is ready."""
        self._holders = Holders()
        self._completed = 0  # batches of workers that are gone
        self._stopping = False  # no worker is started any more
        self._loaded = asyncio.Event()
        self._exited = asyncio.Event()

    def start(self) -> None:
        """Start every worker; the version is READY once all have loaded."""
        for seat in self.seats:
            self._spawn(seat)

    def ready_seats(self) -> list[Seat]:
        """Seats whose worker has loaded and lives."""
        return [seat for seat in self.seats if seat.is_loaded and seat.child is not None]

    def reclaimed(self, incarnation: int, frontend: int) -> None:
        """A front end holds nothing of this worker any more."""
        self._holders.reclaimed(incarnation, frontend)

    def drained(self, frontend: int) -> None:
        """Where it is UNLOADING: a front end holds no request, lane or worker of it any more."""
        self._holders.drained(frontend)

    def frontend_gone(self, frontend: int) -> None:
        """With a front end went its lanes, and what was in flight there."""
        self._holders.frontend_gone(frontend)

    def convicted(self) -> None:
        """The recent deaths were the doing of a request."""
        for seat in self.seats:
            seat.deaths = 0

    def kill_overdue(self) -> None:
        """Kill workers whose run exceeds ``execution_timeout_ms``."""
        ready = self.ready_seats()
        if not ready:
            return  # nor a board, once it is unloaded
        limit_ns = self.settings.execution_timeout_ms * NS_PER_MS
        now_ns = monotonic_ns()
        states = ring.seats(self._board)
        for seat in ready:
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

    async def wait_loaded(self) -> None:
        """Until it is no longer loading, whatever it is then."""
        await self._loaded.wait()

    async def unload(self) -> None:
        """Let requests in flight finish, end the workers and give everything back.

        Takes ``drain_timeout_s`` at most, and a little more where a process does not react.

        Raises:
            RuntimeError: it is UNLOADING or UNLOADED.
        """
        self.reason = self.detail = ""
        self._move(VersionState.UNLOADING)
        await _wait(self._holders.wait_drained(), self._server.drain_timeout_s + GRACE_S)
        self.stop()
        await _wait(self._exited.wait(), GRACE_S)
        self.kill()
        await self._exited.wait()
        self._board.close()
        self.ledger = self.ledger.copy()  # its numbers are still asked for; the board goes
        os.close(self.board_fd)
        self._move(VersionState.UNLOADED)

    def stop(self) -> None:
        """Ask every worker to exit after its batch; one that still loads hears nothing and is killed."""
        self._stopping = True
        for seat in self.seats:
            if seat.child is not None and seat.is_loaded:
                seat.child.send("exit")
            elif seat.child is not None:
                seat.child.kill()
        self._check_exited()

    def kill(self) -> None:
        """End every worker now."""
        self._stopping = True
        for seat in self.seats:
            if seat.child is not None:
                seat.child.kill()
        self._check_exited()

    @property
    def path(self) -> Path:
        """Its model file."""
        return self._file.path

    def worker_starts(self) -> list[int]:
        """How often a worker was started in each seat."""
        return [worker.starts for worker in self.ledger.read().workers]

    @property
    def memory_bytes(self) -> int:
        """What its workers take together."""
        return sum(self._budget.taken_bytes(self._key(seat)) for seat in self.seats)

    @property
    def is_loading(self) -> bool:
        """Whether it has not been READY yet, and may be."""
        return self.state in (VersionState.LOADING, VersionState.WARMING)

    @property
    def is_stopped(self) -> bool:
        """Whether no process is left."""
        return all(seat.child is None for seat in self.seats)

    def _check_exited(self) -> None:
        if self._stopping and self.is_stopped:
            self._exited.set()

    # Starting

    def _spawn(self, seat: Seat) -> None:
        if self._stopping:
            return
        file_bytes = self._check_file(seat)
        if file_bytes is None:
            return
        if seat.load_timer is None:
            seat.load_timer = self._loop.call_later(
                self._server.load_timeout_s, self._on_load_timeout, seat
            )
        seat.incarnation = self._holders.next_incarnation()
        seat.is_loaded = seat.timed_out = False
        seat.started_ns = monotonic_ns()
        try:
            seat.child = Child(
                "gateway.serving.worker",
                ["--name", f"{self.model}/{self.number}#{seat.index}"],
                lambda message: self._on_message(seat, message),
                lambda status: self._on_exit(seat, status),
            )
        except OSError as error:
            log.error("cannot start a worker: %s; trying again", error)
            self._holders.worker_ended(seat.incarnation, ())
            self._loop.call_later(SPAWN_AGAIN_S, self._spawn, seat)
            return
        self._send_load(seat, seat.child, file_bytes)

    def _check_file(self, seat: Seat) -> int | None:
        """The size of the model file; None where no worker can be started for it, now or at all."""
        try:
            file_bytes = self._file.check()
        except LoadError as error:
            self.fail(error.message)
            return None
        except OSError as error:
            if self.is_loading:
                self.fail("the model file cannot be opened", str(error))
                return None
            # It was served: a repository that is away for a while is no fault of the version's.
            where = f"model '{self.model}' version {self.number}:"
            log.error("%s its file cannot be opened: %s; trying again", where, error.strerror)
            seat.misses += 1
            self._loop.call_later(seat.miss_pause_s, self._spawn, seat)
            return None
        seat.misses = 0
        return file_bytes

    def _send_load(self, seat: Seat, child: Child, file_bytes: int) -> None:
        settings, server = self.settings, self._server
        left_bytes = self._budget.take(self._key(seat), file_bytes)
        plan = load_plan(self._file.path, settings, server, seat.instance, left_bytes)
        options = worker_options(
            settings, server, seat.instance, len(self.seats), seat.index, seat.incarnation
        )
        try:
            child.send("load", (self.board_fd,), plan=plan.to_wire(), options=options.to_wire())
        except MessageTooLarge as error:
            self.fail(f"its settings are too long: {error}")

    def _key(self, seat: Seat) -> Key:
        return self.model, self.number, seat.index

    def _on_message(self, seat: Seat, message: Message) -> None:
        match message["op"]:
            case "warming" if self.state is VersionState.LOADING:
                self._move(VersionState.WARMING)
            case "loaded":
                self._on_loaded(seat, message)
            case "failed" if self.is_loading and not self._stopping:
                self.fail(message["reason"], message["detail"])
            case "failed":
                log.error("model '%s' version %d: %s", self.model, self.number, message["detail"])

    def _on_loaded(self, seat: Seat, message: Message) -> None:
        self._stop_load_timer(seat)
        if self._stopping:
            return
        signature = message["signature"]
        if self.signature and signature != self.signature:
            # Front ends know the old one, and would read its outputs as that.
            self.fail(CHANGED)
            return
        seat.is_loaded = self.workers_up[seat.index] = True
        self.signature = signature
        understanding = Understanding.from_wire(message["understanding"])
        taken_bytes = understanding.resident_bytes
        left_bytes = self._budget.take(self._key(seat), taken_bytes)
        if self.is_loading and taken_bytes > left_bytes:  # others were loading beside it
            self.fail(no_memory(taken_bytes, left_bytes))
        elif not self.is_loading:
            self._observer.on_worker(self, seat)
        elif all(other.is_loaded for other in self.seats):
            self._log_understanding(understanding)
            self._move(VersionState.READY)
            for ready in self.seats:
                self._observer.on_worker(self, ready)

    def _log_understanding(self, understanding: Understanding) -> None:
        where = f"model '{self.model}' version {self.number}:"
        log.info("%s %s; outputs %s", where, understanding.batching, understanding.outputs)
        for note in understanding.notes:
            log.warning("%s %s", where, note)

    def _on_load_timeout(self, seat: Seat) -> None:
        seat.load_timer = None
        reason = f"it did not load within load_timeout_s ({self._server.load_timeout_s:g} s)"
        if self.is_loading and not self._stopping:
            self.fail(reason)
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
        if was_loaded:
            self.workers_up[seat.index] = False
        self._budget.give_back(self._key(seat))
        self._stop_load_timer(seat)
        sat, batches, _busy_since_ns, _waiting = ring.seats(self._board)[seat.index]
        if sat == incarnation:
            self._completed += batches
        self._holders.worker_ended(incarnation, self._observer.frontends() if was_loaded else ())
        if was_loaded:
            self._observer.on_worker_exit(self, seat, incarnation, -status if status < 0 else 0)
        if self._stopping:
            self._check_exited()
            self._observer.on_stopped(self)
        elif self.is_loading:
            self.fail(f"the worker {describe_exit(status)} while loading it")
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
        seat.count_death(self._completed_batches())
        if seat.is_crash_looping:
            self.fail(f"a worker died {seat.deaths} times without completing a batch")
            return
        self._loop.call_later(seat.pause_s, self._spawn, seat)

    def _completed_batches(self) -> int:
        """Batches that all its workers, living and dead, have completed."""
        states = ring.seats(self._board)
        return self._completed + sum(states[seat.index][1] for seat in self.ready_seats())

    def fail(self, reason: str, detail: str = "") -> None:
        """FAILED: clients are told the reason, operators the detail."""
        if self.state is not VersionState.UNLOADING:  # what ends anyway only ends sooner
            self.reason = reason
            self.detail = detail or reason
            self._move(VersionState.FAILED)
        self.kill()

    def _move(self, state: VersionState) -> None:
        """The one place where the state changes. RuntimeError on an illegal move."""
        check_move(self.state, state)
        self.state, self.since_s = state, wall_s()
        if state is VersionState.UNLOADING:
            self._holders.begin_drain(self._observer.frontends())
        if not self.is_loading:
            self._loaded.set()
        self._observer.on_state(self)


@dataclass(frozen=True, slots=True)
class VersionObserver:
    """What the supervisor wants to hear of a version, and of a model's route.

    ``frontends`` gives the indexes of the front ends that live now, which are told of what ends.
    """

    frontends: Callable[[], Iterable[int]]
    on_state: Callable[[VersionSupervision], None]
    on_worker: Callable[[VersionSupervision, Seat], None]
    on_worker_exit: Callable[[VersionSupervision, Seat, int, int], None]
    on_stopped: Callable[[VersionSupervision], None]
    on_routes: Callable[[], None]
    on_forgotten: Callable[[VersionSupervision], None]


async def _wait(ended: Coroutine[Any, Any, object], at_most_s: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(ended, at_most_s)
