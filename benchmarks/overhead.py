"""Where each microsecond of server CPU goes that a small inference takes, and what any server would take.

    python benchmarks/overhead.py [--rounds 5] [--seconds 3]

`mlp16`, one row a request in the binary tensor extension, 32 connections, loaded by wrk with one thread.
What the gateway's processes use is measured from outside, and compared with the parts of a request, each
measured by itself on the real code (`overhead_parts.py`) and taken as often as the load has it: the two
sums should agree, and what is left is not explained. Beside them the floors (`floors.py`). All of it takes
turns in each round. Needs wrk and nginx, on Debian ``apt install wrk nginx-light``; strace to count
system calls.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from floors import (
    CONNECTIONS,
    TRACE_S,
    Cpu,
    CpuMeter,
    Target,
    Trace,
    echo,
    gateway_roles,
    missing_program,
    nginx,
)
from harness import Connection, Gateway, Noise, http_get, take_rounds
from models import write_repository
from overhead_parts import REQUEST, WORK
from peers.load import Meter
from report import Report, spread

ROUNDS = 5
SECONDS = 3
WARM_UP_S = 1
TARGET = 2.0
"""Times what nginx takes for a static 200."""

FEWEST_CALLS = 0.0015
"""A request: system calls that are rarer are not listed by name."""

Calls = Mapping[str, float]
"""System calls a request, by name."""


@dataclass(frozen=True)
class Load:
    """What one turn of the gateway showed, of a request each.

    Attributes:
        frontend, worker: CPU, ns.
        batches: runs.
        rate: requests a second.
    """

    frontend: Cpu
    worker: Cpu
    batches: float
    rate: float


@dataclass(frozen=True)
class Part:
    """One row of the table.

    Attributes:
        name: what it is.
        is_worker: whose it is.
        cost: µs each, of what `overhead_parts.py` measured.
        times: how often a request has it, of the load and of the calls of both processes.
    """

    name: str
    is_worker: bool
    cost: Callable[[Mapping[str, float]], float]
    times: Callable[[Load, Calls, Calls], float]


def _once(_load: Load, _front: Calls, _worker: Calls) -> float:
    return 1.0


def _batches(load: Load, _front: Calls, _worker: Calls) -> float:
    return load.batches


def _turns(load: Load, front: Calls, _worker: Calls) -> float:
    """Of the event loop; without strace, one a batch."""
    return front.get("epoll_pwait", load.batches)


def _bells(load: Load, _front: Calls, worker: Calls) -> float:
    """Without strace, one a batch."""
    return worker.get("write", load.batches)


def _waits(load: Load, _front: Calls, _worker: Calls) -> float:
    return load.worker.sleeps


def _rests(load: Load, _front: Calls, _worker: Calls) -> float:
    return load.frontend.sleeps


def _slower_after_sleep(costs: Mapping[str, float]) -> float:
    return sum(costs[f"{name} after sleep"] - costs[name] for name in WORK)


PARTS = (
    Part("uvloop finds a readable socket, reads", False, lambda p: p["read"], _once),
    Part("turn of the event loop", False, lambda p: p["turn"], _turns),
    Part("read the head", False, lambda p: p["head"], _once),
    Part("split the JSON text", False, lambda p: p["split"], _once),
    Part("look up, place", False, lambda p: p["receive"] - p["head"] - p["split"], _once),
    Part("end of a burst", False, lambda p: p["burst"], _turns),
    Part("wake a worker (futex)", False, lambda p: p["wake futex"], _waits),
    Part("answer from the slot, free it", False, lambda p: p["answer"] - p["count answer"], _once),
    Part("count in the ledger", False, lambda p: p["count answer"], _once),
    Part("send", False, lambda p: p["answer and send"] - p["answer"], _once),
    Part("sleep in epoll", False, lambda p: p["sleep in epoll"], _rests),
    Part("find the best slot, seal it", True, lambda p: p["take"], _batches),
    Part("ONNX Runtime, bound, in a tight loop", True, lambda p: p["run alone"], _batches),
    Part(
        "ditto: not in a loop, binding found", True, lambda p: p["run"] - p["run alone"], _batches
    ),
    Part("count, learn the cost", True, lambda p: p["count"] + p["observe"], _batches),
    Part("publish", True, lambda p: p["publish"] - p["bell"], _batches),
    Part("ring the bell (eventfd)", True, lambda p: p["wake epoll"], _bells),
    Part("look for more in vain", True, lambda p: p["look in vain"], _waits),
    Part("sleep on the futex", True, lambda p: p["sleep on futex"], _waits),
    Part("all of it is slower after a sleep", True, _slower_after_sleep, _waits),
)


class Bench:
    """The servers, all of them up; they take turns."""

    def __init__(self, stack: ExitStack, folder: Path, seconds: int) -> None:
        self._folder, self._seconds = folder, seconds
        write_repository(folder / "models", ["mlp16"])
        self._model = folder / "models" / "mlp16" / "1" / "model.onnx"
        self._gateway = stack.enter_context(Gateway(folder / "models"))
        with Connection(self._gateway.host, self._gateway.port) as connection:
            connection.exchange(REQUEST)
        self._target = Target(self._gateway.port, REQUEST)
        port, pids = stack.enter_context(nginx(folder))
        self._floors = {
            "nginx, GET, static 200": (Target(port, http_get("/")), pids),
            "nginx, the same POST, static 200": (Target(port, REQUEST), pids),
        }
        port, pids = stack.enter_context(echo(folder, REQUEST, self._raw_answer()))
        self._floors["uvloop, same bytes in and out"] = Target(port, REQUEST), pids
        for target in (self._target, *(target for target, _ in self._floors.values())):
            target.load(WARM_UP_S, folder, CONNECTIONS)

    def _raw_answer(self) -> bytes:
        """The gateway's own, head and all."""
        with socket.create_connection((self._gateway.host, self._gateway.port)) as sock:
            sock.sendall(REQUEST)
            return sock.recv(1 << 16)

    def turn(self, noise: Noise) -> tuple[Load, dict[str, float], dict[str, tuple[Cpu, float]]]:
        """Gateway, parts, floors: a round."""
        load = self._load(noise)
        rows = min(CONNECTIONS, max(1, round(1 / load.batches)))
        parts = self._parts(rows)
        return load, parts, {name: self._floor(name, noise) for name in self._floors}

    def _load(self, noise: Noise) -> Load:
        frontends, workers = gateway_roles(self._gateway)
        meter = Meter(self._gateway.pid)
        before = self._gateway.statistics("mlp16")["batches"]
        meters = CpuMeter(frontends), CpuMeter(workers)
        good = self._target.load(self._seconds, self._folder, CONNECTIONS)
        frontend, worker = (of.read() / good for of in meters)
        batches = self._gateway.statistics("mlp16")["batches"] - before
        seconds, _, others = meter.read()
        noise.cores.append(others)
        return Load(frontend, worker, batches / good, good / seconds)

    def _floor(self, name: str, noise: Noise) -> tuple[Cpu, float]:
        target, pids = self._floors[name]
        meter, cpu = Meter(pids[0]), CpuMeter(pids)
        good = target.load(self._seconds, self._folder, CONNECTIONS)
        used = cpu.read() / good
        seconds, _, others = meter.read()
        noise.cores.append(others)
        return used, good / seconds

    def _parts(self, rows: int) -> dict[str, float]:
        script = Path(__file__).with_name("overhead_parts.py")
        done = subprocess.run(
            [sys.executable, str(script), str(self._model), str(rows)],
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)

    def calls(self) -> dict[str, tuple[Calls, str]]:
        """System calls a request of front end, worker and floors, or why there are none to see."""
        frontends, workers = gateway_roles(self._gateway)
        traced = {"front end": (self._target, frontends), "worker": (self._target, workers)}
        found: dict[str, tuple[Calls, str]] = {}
        for name, (target, (pid,)) in (traced | self._floors).items():
            with Trace(pid, self._folder) as trace:
                good = 1.0 if trace.reason else target.load(TRACE_S, self._folder)
            counted = {call: count / good for call, count in trace.calls.items()}
            found[name] = counted, trace.reason
        return found


def us(samples: Sequence[Cpu]) -> tuple[str, str, str]:
    """CPU in all, in user mode and in the kernel."""
    return (
        spread([cpu.total / 1e3 for cpu in samples], 2),
        spread([cpu.user / 1e3 for cpu in samples], 1),
        spread([cpu.kernel / 1e3 for cpu in samples], 1),
    )


def add_measured(report: Report, loads: Sequence[Load]) -> None:
    """What the gateway took."""
    rate = spread([load.rate for load in loads])
    both = [load.frontend + load.worker for load in loads]
    report.rows.append(("gateway", rate, "", "", *us(both)))
    report.rows.append(("- front end", "", "", "", *us([load.frontend for load in loads])))
    report.rows.append(("- worker", "", "", "", *us([load.worker for load in loads])))


def add_parts(
    report: Report,
    loads: Sequence[Load],
    costs: Sequence[Mapping[str, float]],
    calls: Sequence[Calls],
) -> None:
    """The parts, their sums and the rests, of each process."""
    for is_worker, who in ((False, "front end"), (True, "worker")):
        rows: list[Sequence[str]] = []
        sums = [0.0] * len(loads)
        for part in (part for part in PARTS if part.is_worker is is_worker):
            each = [part.cost(cost) for cost in costs]
            times = [part.times(load, *calls) for load in loads]
            spent = [a * b for a, b in zip(each, times, strict=True)]
            sums = [a + b for a, b in zip(sums, spent, strict=True)]
            often = f"{statistics.median(times):.3f}"
            rows.append((f"- {part.name}", "", spread(each, 2), often, spread(spent, 2), "", ""))
        measured = [(load.worker if is_worker else load.frontend).total / 1e3 for load in loads]
        rests = [a - b for a, b in zip(measured, sums, strict=True)]
        report.rows += [
            (f"{who}, sum of its parts", "", "", "", spread(sums, 2), "", ""),
            *rows,
            (f"{who}, measured less the parts", "", "", "", spread(rests, 2), "", ""),
        ]


def calls_note(who: str, calls: Calls, reason: str) -> str:
    """System calls by name; those of connecting are left out."""
    if reason:
        return f"system calls, {who}: not counted, {reason}"
    often = sorted(calls.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {n:.3f}" for name, n in often if n >= FEWEST_CALLS)
    return f"system calls a request, {who}: {listed}; {sum(calls.values()):.2f} in all"


def main(words: Sequence[str]) -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    parser = argparse.ArgumentParser(description="Where each microsecond goes.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each load")
    options = parser.parse_args(words)
    if missing := missing_program():
        print(f"overhead.py: {missing}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        bench = Bench(stack, Path(name), options.seconds)
        rounds = take_rounds(bench.turn, options.rounds)
        calls = bench.calls()
    loads, costs, floors = map(list, zip(*rounds.counted, strict=True))
    report = Report(
        "overhead",
        f"Server CPU of a small inference, µs a request: median (min–max) of {len(loads)} rounds",
        ("", "requests/s", "µs each", "times a request", "µs a request", "user", "kernel"),
    )
    add_measured(report, loads)
    for floor in floors[0]:
        samples, rates = zip(*(turn[floor] for turn in floors), strict=True)
        report.rows.append((f"floor: {floor}", spread(rates), "", "", *us(samples)))
    add_parts(report, loads, costs, [calls[who][0] for who in ("front end", "worker")])
    static = next(iter(floors[0]))
    ratios = [
        (load.frontend.total + load.worker.total) / turn[static][0].total
        for load, turn in zip(loads, floors, strict=True)
    ]
    median = statistics.median(ratios)
    report.target(
        f"at most {TARGET:g} times {static}", median <= TARGET, spread(ratios, 2), rounds.quiet
    )
    report.notes += [
        *(calls_note(who, *found) for who, found in calls.items()),
        "these were counted apart, by strace, which slows the process that it looks at",
        f"a batch had {spread([1 / load.batches for load in loads], 1)} rows",
        f"`mlp16`, {len(REQUEST)} bytes a request, {CONNECTIONS} connections, wrk with one thread, on "
        f"the same {os.cpu_count()} cores; {options.seconds} s a turn",
        "CPU: run time of the processes from /proc/PID/task/*/schedstat; how it divides into user and kernel "
        "is sampled by the system's clock ticks",
        "parts: medians in a process of their own, one after the other; what is measured beyond their sum is "
        "what no part stands for, and what other processes on the same cores cost",
        "times a request: of turns and bells as strace saw them; of sleeps, as many as the load's voluntary "
        "context switches, each of a worker's with one wake-up by the front end",
        rounds.note,
    ]
    report.publish()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
