"""What loading and unloading a large model does to the requests of another one.

    python benchmarks/loading.py

One model of 200 MB is loaded and unloaded through the admin port, over and over, while a small one gets
requests in open loop: each is due at its time, and its latency counts from then, whatever came before it.
In turn with that, and for as long: nothing, and a process that computes at the nice value of a load. So
what a load costs beyond the CPU that it takes would show as a difference between these two. A second
connection asks for `/v2/health/live`, which the front end answers by itself: what keeps its event loop
keeps that. The kernel says how long the front end and the small model's worker were kept from a CPU.

Then the same once more under a tracer: how long the longest turn of the front end's event loop was, and
what its thread and the small model's worker waited for at locks. Needs strace (Debian: apt install strace).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import models
import numpy as np
from harness import Connection, Gateway, binary_request, http_get
from reload import write_model
from report import Report, percentile
from tracing import Trace, can_trace, traced

ROUNDS, TRACED = 10, 4
RATE = 300.0
"""Requests a second of the small model; as many to the front end alone."""

WIDTH = 7168
"""Rows and columns of the FP32 matrix: 206 MB."""

TAIL_S = 1.0
"""After an unload: the digest of the file is made beside the loop, and belongs to the load."""

LOADING_NICE = 10
"""As `gateway.serving.niceness` has it."""

NOTHING, BURNER, LOADING = "nothing", f"a process that computes at nice {LOADING_NICE}", "loading"
MB = 1e6

Times = list[tuple[float, float]]
"""When a request was due, and what it took, in seconds."""


def ask(host: str, port: int, request: bytes, until: object, out: object) -> None:
    """Send a request at its times until told to end; runs in a process of its own."""
    times: Times = []
    with Connection(host, port) as connection:
        due = time.monotonic()
        while not until.is_set():
            time.sleep(max(0.0, due - time.monotonic()))
            connection.exchange(request)
            times.append((due, time.monotonic() - due))
            due += 1 / RATE
    out.put(times)


def burn(seconds: float) -> None:
    """Compute at a load's nice value; runs in a process of its own."""
    os.nice(LOADING_NICE)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


@dataclass
class Phase:
    """What was measured beside one thing."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    kept_s: float = 0.0
    """Time that front end and worker were runnable and had no CPU."""
    traced_from: int = 0
    """The first of the spans that a tracer saw; what it costs is in no latency."""

    def of(self, times: Times) -> list[float]:
        """Times in ms of what was due or began in its untraced time, sorted."""
        return _within(self.spans[: self.traced_from], times)

    def traced(self, times: Times) -> list[float]:
        """The same for its traced time."""
        return _within(self.spans[self.traced_from :], times)

    @property
    def seconds(self) -> float:
        """All of its untraced time."""
        return sum(end - begin for begin, end in self.spans[: self.traced_from])


def _within(spans: list[tuple[float, float]], times: Times) -> list[float]:
    return sorted(
        taken * 1e3 for at, taken in times if any(begin <= at < end for begin, end in spans)
    )


def kept_s(pids: list[int]) -> float:
    """Time that all threads of processes waited for a CPU, so far."""
    files = (t / "schedstat" for pid in pids for t in Path(f"/proc/{pid}/task").iterdir())
    return sum(int(file.read_text().split()[1]) for file in files) / 1e9


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / MB


def write_models(repository: Path) -> float:
    """Write `echo`, which answers, and `big`, which comes and goes; MB of the latter."""
    small = repository / "echo" / "1" / "model.onnx"
    small.parent.mkdir(parents=True)
    models.echo(small)
    (repository / "echo" / "config.yaml").write_text("instances: [{count: 1, threads: 1}]\n")
    return write_model(repository, WIDTH)


class Measurement:
    """Rounds on one gateway.

    Args:
        gateway: with both models.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._admin = gateway.admin_url
        roles = gateway.processes()
        self._command("unload")
        (worker,) = gateway.processes()["workers"]
        self.pids = {name: roles[name][0] for name in ("supervisor", "front end")}
        self.watched = [self.pids["front end"], worker]
        self.forget()
        self.load_averages = [os.getloadavg()[0]]

    def forget(self) -> None:
        """Begin again."""
        self.phases = {name: Phase() for name in (NOTHING, BURNER, LOADING)}
        self.loads: list[float] = []
        self.unloads: list[float] = []

    def memory_mb(self) -> dict[str, float]:
        """Resident, of supervisor and front end."""
        return {name: resident_mb(pid) for name, pid in self.pids.items()}

    def round(self) -> None:
        """Load and unload, then the others for as long."""
        begin = time.monotonic()
        self._measure(LOADING, self._cycle)
        seconds = time.monotonic() - begin
        self._measure(BURNER, lambda: self._burn(seconds))
        self._measure(NOTHING, lambda: time.sleep(seconds))

    def _measure(self, name: str, work: Callable[[], None]) -> None:
        phase = self.phases[name]
        kept, begin = kept_s(self.watched), time.monotonic()
        work()
        phase.spans.append((begin, time.monotonic()))
        if not phase.traced_from:
            phase.kept_s += kept_s(self.watched) - kept

    def _cycle(self) -> None:
        self.loads.append(self._command("load"))
        self.unloads.append(self._command("unload"))
        time.sleep(TAIL_S)

    def _burn(self, seconds: float) -> None:
        process = multiprocessing.get_context("spawn").Process(target=burn, args=(seconds,))
        process.start()
        process.join()

    def _command(self, verb: str) -> float:
        """Seconds that a verb takes."""
        url = f"{self._admin}/admin/v1/models/big:{verb}"
        begin = time.monotonic()
        try:
            with urlopen(Request(url, method="POST", headers={"If-Match": "*"})):
                return time.monotonic() - begin
        except HTTPError as error:
            raise RuntimeError(error.read().decode()) from None


def main() -> int:
    """Measure and report; the exit status is 1 where something is missing, whatever the numbers are."""
    if not can_trace():
        print("loading.py: strace is missing; on Debian: apt install strace", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        size_mb = write_models(Path(folder))
        with Gateway(Path(folder)) as gateway:
            measurement = Measurement(gateway)
            measurement.round()  # the first load reads the file and keeps its optimised graph
            measurement.forget()
            before = measurement.memory_mb()
            with asking(gateway) as out:
                time.sleep(TAIL_S)
                for _ in range(ROUNDS):
                    measurement.round()
                measurement.load_averages.append(os.getloadavg()[0])
                after = measurement.memory_mb()
                for phase in measurement.phases.values():
                    phase.traced_from = len(phase.spans)
                with traced(measurement.watched) as traces:
                    for _ in range(TRACED):
                        measurement.round()
    publish(measurement, out, traces, size_mb, (before, after))
    return 0


@contextmanager
def asking(gateway: Gateway) -> Iterator[list[Times]]:
    """Ask for the small model and the front end alone; the list has the times of both at the end."""
    row = np.zeros((1, models.ECHO_WIDTH), np.float32).tobytes()
    requests = (
        binary_request("echo", "x", [1, models.ECHO_WIDTH], row),
        http_get("/v2/health/live"),
    )
    context = multiprocessing.get_context("spawn")
    until, queues, times = context.Event(), [context.Queue() for _ in requests], []
    askers = [
        context.Process(target=ask, args=(gateway.host, gateway.port, request, until, queue))
        for request, queue in zip(requests, queues, strict=True)
    ]
    for asker in askers:
        asker.start()
    try:
        yield times
    finally:
        until.set()
        times += [queue.get() for queue in queues]
        for asker in askers:
            asker.join()


def publish(
    measurement: Measurement,
    out: list[Times],
    traces: list[Trace],
    size_mb: float,
    memory: tuple[dict[str, float], dict[str, float]],
) -> None:
    """Make the table."""
    report = Report(
        "loading",
        f"{ROUNDS} loads and unloads of a model of {size_mb:.0f} MB beside {RATE:g} requests/s of another",
        (
            "beside", "requests", "p50 ms", "p99 ms", "p99.9 ms", "longest ms",
            "front end alone: p99 ms", "longest ms", "kept from a CPU, ms/s",
            "traced: turns of the loop", "p99.9 ms", "longest ms",
            "waits for a lock: front end", "worker",
        ),
    )  # fmt: skip
    answered, alive = out
    frontend, worker = traces
    for name, phase in measurement.phases.items():
        took, loop, turns = phase.of(answered), phase.of(alive), phase.traced(frontend.turns)
        report.rows.append(
            (
                name,
                str(len(took)),
                *(f"{percentile(took, percent):.2f}" for percent in (50, 99, 99.9)),
                f"{took[-1]:.1f}",
                f"{percentile(loop, 99):.2f}",
                f"{loop[-1]:.1f}",
                f"{phase.kept_s / phase.seconds * 1e3:.1f}",
                str(len(turns)),
                f"{percentile(turns, 99.9):.2f}",
                f"{turns[-1]:.1f}",
                *(_waits(phase.traced(trace.waits)) for trace in (frontend, worker)),
            )
        )
    report.notes += [
        "open loop on one connection: latency counts from when a request was due, so that one that waits "
        "shows in all that were due meanwhile",
        f"seconds, median: load {np.median(measurement.loads):.2f}, unload "
        f"{np.median(measurement.unloads):.3f}; a cycle has {TAIL_S:g} s more, for the file's digest; the "
        "optimised graph is cached, the first load is not counted",
        *(
            f"resident memory of the {name}: {memory[0][name]:.1f} MB before, {memory[1][name]:.1f} MB after"
            for name in memory[0]
        ),
        "other work on the machine: its load average was "
        + " to ".join(f"{load:.1f}" for load in measurement.load_averages)
        + " (the benchmark's own is about 1)",
        "kept from a CPU: time that threads of the front end and of the small model's worker were runnable "
        "and not run, as the kernel counts it (schedstat)",
        f"traced: {TRACED} more rounds under strace, which are in no latency here and make each system call "
        "some 50 µs longer. A turn lasts from the front end's return from epoll_pwait to its next call; a "
        "wait for a lock is a futex wait of its thread, or of the worker's other than at its doorbell, "
        "where it waits for work",
    ]
    report.publish()


def _waits(took: list[float]) -> str:
    return f"{len(took)} ({took[-1]:.2f} ms at most)" if took else "none"


if __name__ == "__main__":
    sys.exit(main())
