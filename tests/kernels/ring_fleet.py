"""Runs the processes of the ring's stress test: starts them, buries the killed, replaces them.

It does the supervisor's part: it alone reaps, it tells every front end of a confirmed death and waits until
they have reclaimed before a new incarnation sits down on the seat.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

SCRIPT = Path(__file__).with_name("ring_processes.py")


@dataclass(frozen=True)
class Scenario:
    """What a fleet does, and how hard it is for it."""

    seed: int
    lanes: int = 2
    workers: int = 3
    slots: int = 8
    capacity: int = 6
    rows: int = 600
    """Of each lane, at least: rows keep coming until the last planned death."""
    window: int = 24
    """Rows that may be outstanding before more are sent."""
    burst: tuple[int, int] = (1, 6)
    """How many additions, of a row or a few, at a time."""
    wake_each_chance: float = 0.5
    """How often each addition is followed by a wake-up of its own, not the burst by one."""
    cancel_chance: float = 0.2
    full_house: bool = False
    """Send only while every seat has a living worker: the new one is there when work comes."""
    deaths: Sequence[Sequence[int]] = ()
    """For each seat, after how many atomic steps its incarnations die, one after the other."""
    patience_s: float = 20.0
    """How long nothing may happen before that counts as a hang."""
    limit_s: float = 90.0


class FrontEndProcess:
    """A front end and the lines it says."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin, self.stdout = process.stdin, process.stdout
        self.pending = b""
        self.said: deque[str] = deque()


@dataclass
class WorkerProcess:
    process: subprocess.Popen[bytes]
    pidfd: int
    incarnation: int
    mortal: bool


class Fleet:
    """The processes of a scenario and the memory they share. A context manager: nothing outlives it."""

    def __init__(self, ring: ModuleType, scenario: Scenario):
        self.ring = ring
        self.scenario = scenario
        self.cleanup = ExitStack()
        self.deadline = time.monotonic() + scenario.limit_s
        self.front_ends: list[FrontEndProcess] = []
        self.workers: dict[int, WorkerProcess] = {}
        self.deaths = [deque(plan) for plan in scenario.deaths]
        self.deaths += [deque()] * (scenario.workers - len(self.deaths))
        self.incarnation = 0
        self.killed = 0

    def __enter__(self) -> Fleet:
        scenario = self.scenario
        batch_bytes = scenario.slots * scenario.capacity * 8
        runs_bytes = 8 * 2**20  # sparse: rows go on until the last death
        self.errors: IO[bytes] = self.cleanup.enter_context(tempfile.TemporaryFile())
        self.shared: dict[str, Any] = {
            "ring": self.ring.__file__,
            "board": self.memory("board", self.ring.board_bytes(scenario.workers)),
            "arrivals": self.eventfd(),
            "release": self.eventfd(os.EFD_SEMAPHORE),
            "slots": scenario.slots,
            "capacity": scenario.capacity,
            "patience_s": scenario.patience_s,
            "lanes": [
                {
                    "control": self.memory("control", self.ring.control_bytes(scenario.slots, 1)),
                    "inputs": self.memory("inputs", batch_bytes),
                    "outputs": self.memory("outputs", batch_bytes),
                    "runs": self.memory("runs", runs_bytes),
                    "bell": self.eventfd(os.EFD_NONBLOCK),
                }
                for _ in range(scenario.lanes)
            ],
        }
        return self

    def __exit__(self, *_: object) -> None:
        processes = [worker.process for worker in self.workers.values()]
        processes += [front_end.process for front_end in self.front_ends]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        for worker in self.workers.values():
            os.close(worker.pidfd)
        self.cleanup.close()

    def memory(self, name: str, size: int) -> int:
        fd = os.memfd_create(name)
        self.cleanup.callback(os.close, fd)
        os.ftruncate(fd, size)
        return fd

    def eventfd(self, flags: int = 0) -> int:
        fd = os.eventfd(0, flags)
        self.cleanup.callback(os.close, fd)
        return fd

    # The run.

    def run(self) -> list[dict[str, int]]:
        """Serve the scenario to its end; each front end's counts."""
        for lane in range(self.scenario.lanes):
            self.start_front_end(lane)
        for front_end in self.front_ends:
            self.expect(front_end, "ready")
        for seat in range(self.scenario.workers):
            self.start_worker(seat)
        for front_end in self.front_ends:
            self.expect(front_end, "enough")
        while any(self.deaths) or any(worker.mortal for worker in self.workers.values()):
            self.attend()
        for front_end in self.front_ends:
            self.tell(front_end, "drain")
        counts = [json.loads(self.expect(front_end, "done")) for front_end in self.front_ends]
        for front_end in self.front_ends:
            self.tell(front_end, f"muster {self.scenario.workers}")
            self.expect(front_end, "mustered")
        self.stop()
        return counts

    def stop(self) -> None:
        """Workers leave when their input ends, however fast they sleep; then the front ends do."""
        processes = [worker.process for worker in self.workers.values()]
        processes += [front_end.process for front_end in self.front_ends]
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
            try:
                code = process.wait(self.remaining_s())
            except subprocess.TimeoutExpired:
                self.fail("a process did not end")
            if code != 0:
                self.fail(f"a process ended with {code}")

    def start(self, role: str, seed: int, stdout: int | None, **own: Any) -> Any:
        arguments = {
            **self.shared,
            **own,
            "role": role,
            "seed": 1 + seed + 1000 * self.scenario.seed,
        }
        fds = [self.shared[name] for name in ("board", "arrivals", "release")]
        fds += [fd for lane in self.shared["lanes"] for fd in lane.values()]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=self.errors,
            pass_fds=fds,
        )

    def start_front_end(self, lane: int) -> None:
        scenario = self.scenario
        process = self.start(
            "front end",
            lane,
            subprocess.PIPE,
            lane=lane,
            deaths=-1,
            rows=scenario.rows,
            window=scenario.window,
            burst=scenario.burst,
            wake_each_chance=scenario.wake_each_chance,
            cancel_chance=scenario.cancel_chance,
            full_house=scenario.full_house,
        )
        self.front_ends.append(FrontEndProcess(process))

    def start_worker(self, seat: int) -> None:
        self.incarnation += 1
        deaths = self.deaths[seat].popleft() if self.deaths[seat] else -1
        process = self.start(
            "worker",
            100 + self.incarnation,
            None,
            seat=seat,
            incarnation=self.incarnation,
            deaths=deaths,
        )
        pidfd = os.pidfd_open(process.pid)
        self.workers[seat] = WorkerProcess(process, pidfd, self.incarnation, deaths >= 0)

    # What happens meanwhile.

    def remaining_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def tell(self, front_end: FrontEndProcess, line: str) -> None:
        try:
            os.write(front_end.stdin.fileno(), line.encode() + b"\n")
        except BrokenPipeError:
            self.fail("a front end is gone")

    def expect(self, front_end: FrontEndProcess, verb: str) -> str:
        """The rest of the front end's next line, which begins with this verb."""
        while not front_end.said:
            self.attend()
        said, _, rest = front_end.said.popleft().partition(" ")
        if said != verb:
            self.fail(f"a front end said {said!r} instead of {verb!r}")
        return rest

    def attend(self) -> None:
        """Wait for whatever happens next: a line or a death."""
        poll = select.poll()
        for front_end in self.front_ends:
            poll.register(front_end.stdout, select.POLLIN)
        for worker in self.workers.values():
            poll.register(worker.pidfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self.remaining_s() * 1000)}
        if not ready:
            self.fail(f"not done after {self.scenario.limit_s} s")
        for front_end in self.front_ends:
            if front_end.stdout.fileno() in ready:
                self.listen(front_end)
        for seat, worker in list(self.workers.items()):
            if worker.pidfd in ready:
                self.bury(seat, worker)

    def listen(self, front_end: FrontEndProcess) -> None:
        came = os.read(front_end.stdout.fileno(), 65536)
        if not came:
            self.fail("a front end is gone")
        *lines, front_end.pending = (front_end.pending + came).split(b"\n")
        front_end.said.extend(line.decode() for line in lines)

    def bury(self, seat: int, worker: WorkerProcess) -> None:
        """Reap a worker, have the front ends reclaim what it held, and seat the next."""
        code = worker.process.wait()
        if code != -signal.SIGKILL or not worker.mortal:
            self.fail(f"worker {worker.incarnation} ended with {code}")
        self.killed += 1
        del self.workers[seat]
        os.close(worker.pidfd)
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        for front_end in self.front_ends:
            self.tell(front_end, f"dead {worker.incarnation}")
        for front_end in self.front_ends:
            while "reclaimed" not in front_end.said:
                self.listen_for(front_end)
            front_end.said.remove("reclaimed")
        self.start_worker(seat)

    def listen_for(self, front_end: FrontEndProcess) -> None:
        poll = select.poll()
        poll.register(front_end.stdout, select.POLLIN)
        if not poll.poll(self.remaining_s() * 1000):
            self.fail("a front end does not reclaim")
        self.listen(front_end)

    def fail(self, what: str) -> None:
        """Raise with all that the processes have written to their standard error."""
        self.errors.seek(0)
        errors = self.errors.read().decode(errors="replace")
        raise AssertionError(f"{what} (after {self.killed} deaths, {self.scenario})\n{errors}")
