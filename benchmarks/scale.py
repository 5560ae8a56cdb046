"""What models that nobody asks for and connections that nobody uses cost those that are used.

    python benchmarks/scale.py [--models 1000] [--connections 10000] [--rounds 5] [--seconds 3]

Two gateways take turns under the same load, on the same model: one that has nothing else, and one that
has 999 more models registered and 10,000 idle keep-alive connections, each of which has had an answer. A
third gateway has the connections alone. Then all are left alone, to see what they do by themselves.

The connections are held by two client processes, from two loopback addresses: this file, run with
``--hold``. Needs wrk (Debian: ``apt install wrk``), and a limit of open files above the connections.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from floors import CpuMeter, Target, gateway_roles
from harness import Connection, Gateway, Noise, Usage, binary_request, take_rounds, usage
from models import write_repository
from peers.load import Meter
from report import Report, spread

ROUNDS = 5
SECONDS = 3
WARM_UP_S = 1
MODELS = 1000
CONNECTIONS = 10_000
IDLE_S = 20.0
SETTLE_S = 6.0
"""Before the servers are left alone: longer than the front end's pause between two sweeps."""

SPARE_FILES = 512
"""Descriptors that a front end has for other things than idle connections."""

SOURCES = ("127.0.0.2", "127.0.0.3")
KEEPALIVE_S = 3600
TARGET_RATIO = 1.15
TARGET_MB = 80.0

MODEL = "mlp16"
REQUEST = binary_request(MODEL, "x", (1, 16), np.ones((1, 16), np.float32).tobytes())


class Case:
    """A gateway, what it has to carry, and how it is loaded.

    Attributes:
        name: in the table.
        gateway: which serves `MODEL` alone at its start.
    """

    def __init__(self, name: str, gateway: Gateway) -> None:
        self.name, self.gateway = name, gateway
        with Connection(gateway.host, gateway.port) as connection:
            connection.exchange(REQUEST)

    def load(self, seconds: int, folder: Path, noise: Noise) -> tuple[float, float]:
        """µs of CPU a request, of the front end and of the worker."""
        meter = Meter(self.gateway.pid)
        meters = [CpuMeter(pids) for pids in gateway_roles(self.gateway)]
        good = Target(self.gateway.port, REQUEST).load(seconds, folder)
        frontend, worker = (of.read().total / good / 1e3 for of in meters)
        noise.cores.append(meter.read()[2])
        return frontend, worker

    def memory_mb(self) -> tuple[float, float]:
        """(PSS, RSS) of its front end."""
        (pid,), _ = gateway_roles(self.gateway)
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return tuple(
            int(re.search(rf"^{key}: +(\d+) kB", text, re.MULTILINE)[1]) * 1024 / 1e6
            for key in ("Pss", "Rss")
        )

    def used(self) -> Usage:
        """By its front end so far."""
        return usage(gateway_roles(self.gateway)[0])


# Models


def register(gateway: Gateway, count: int) -> float:
    """Register so many models more, of `MODEL`'s file; how many seconds that took."""
    began = time.monotonic()
    for i in range(count):
        url = f"{gateway.admin_url}/admin/v1/models/unused{i:04}/versions/1"
        body = json.dumps({"source": f"{MODEL}/1/model.onnx"}).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(url, body, headers, method="PUT")) as answer:
            answer.read()
    return time.monotonic() - began


def registered(gateway: Gateway) -> int:
    """Models that it has and that are not loaded."""
    found, after = 0, ""
    while after is not None:
        with urlopen(f"{gateway.admin_url}/admin/v1/models?after={after}") as answer:
            page = json.load(answer)
        versions = (version for model in page["models"] for version in model["versions"])
        found += sum(version["state"] == "REGISTERED" for version in versions)
        after = page["next"]
    return found


# Connections


@contextmanager
def held(gateway: Gateway, count: int) -> Iterator[None]:
    """So many idle connections. RuntimeError when the server closed one of them meanwhile."""
    each = count // len(SOURCES)
    commands = (
        [sys.executable, __file__, "--hold", source, str(gateway.port), str(each)]
        for source in SOURCES
    )
    holders = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for holder in holders:
            if holder.stdout.readline() != "held\n":
                raise RuntimeError("the connections could not be made")
        yield
        closed = [holder.communicate("")[0].strip() for holder in holders]
        if any(lost != "0" for lost in closed):
            raise RuntimeError(f"the server closed idle connections: {' and '.join(closed)}")
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def hold(source: str, port: int, count: int) -> None:
    """Make connections, one request on each, and hold them until standard input ends.

    Prints ``held``, and at the end how many of them the server has closed.
    """
    more_files()
    connections = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port), source_address=(source, 0))
        sock.sendall(REQUEST)
        if not sock.recv(1 << 16).startswith(b"HTTP/1.1 200"):
            raise RuntimeError("a connection's request was refused")
        connections.append(sock)
    print("held", flush=True)
    sys.stdin.read()
    with select.epoll() as epoll:
        for sock in connections:
            epoll.register(sock, select.EPOLLIN)
        print(len(epoll.poll(0, count)))


def more_files() -> int:
    """Allow this process, and those that it starts, as many open files as may be; how many that is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


# Measuring


@dataclass(frozen=True)
class Findings:
    """What was seen of each case, in the order of the cases.

    Attributes:
        costs: by round, µs of CPU a request of (front end, worker).
        memory: (PSS, RSS) in MB of the front end, after the load.
        idle: use of the front end in `IDLE_S` without requests.
        known: models that are registered and not loaded.
        registering_s: what that took.
    """

    costs: list[list[tuple[float, float]]]
    memory: list[tuple[float, float]]
    idle: list[Usage]
    known: int
    registering_s: float


def start(stack: ExitStack, folder: Path, options: argparse.Namespace) -> list[Case]:
    """The gateways: alone, with connections, and with models and connections."""
    names = (
        "one model",
        f"one model, {options.connections:,} idle connections",
        f"{options.models:,} models, {options.connections:,} idle connections",
    )
    os.environ["GATEWAY_KEEPALIVE_TIMEOUT_S"] = str(KEEPALIVE_S)
    cases = []
    for i, name in enumerate(names):
        write_repository(folder / str(i), [MODEL])
        cases.append(Case(name, stack.enter_context(Gateway(folder / str(i)))))
    return cases


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[Case], Findings, list[str]]:
    """All of it; the last are notes on how quiet the rounds were."""
    with ExitStack() as stack:
        cases = start(stack, folder, options)
        registering_s = register(cases[2].gateway, options.models - 1)
        for case in cases[1:]:
            stack.enter_context(held(case.gateway, options.connections))
        for case in cases:
            Target(case.gateway.port, REQUEST).load(WARM_UP_S, folder)

        def turn(noise: Noise) -> list[tuple[float, float]]:
            return [case.load(options.seconds, folder, noise) for case in cases]

        rounds = take_rounds(turn, options.rounds)
        memory = [case.memory_mb() for case in cases]
        time.sleep(SETTLE_S)
        before = [case.used() for case in cases]
        time.sleep(IDLE_S)
        idle = [case.used().since(then) for case, then in zip(cases, before, strict=True)]
        known = registered(cases[2].gateway)
    findings = Findings(rounds.counted, memory, idle, known, registering_s)
    return cases, findings, [rounds.note, "" if rounds.quiet else "busy"]


def publish(names: Sequence[str], found: Findings, note: str, quiet: bool) -> None:
    """Table, targets and notes."""
    report = Report(
        "scale",
        f"What unused models and connections cost: median (min–max) of {len(found.costs)} rounds",
        (
            "front end with", "front end µs", "worker µs", "together", "relative", "PSS MB", "RSS MB",
            f"wake-ups in {IDLE_S:g} s idle", "CPU ms in that",
        ),
    )  # fmt: skip
    alone = [sum(costs[0]) for costs in found.costs]
    ratios: list[float] = []
    for i, name in enumerate(names):
        frontend, worker = zip(*(costs[i] for costs in found.costs), strict=True)
        together = [sum(costs[i]) for costs in found.costs]
        ratios = [a / b for a, b in zip(together, alone, strict=True)]
        pss, rss = found.memory[i]
        report.rows.append(
            (
                name,
                *(spread(values, 2) for values in (frontend, worker, together, ratios)),
                f"{pss:.1f}",
                f"{rss:.1f}",
                str(found.idle[i].voluntary),
                f"{found.idle[i].cpu_ns / 1e6:.1f}",
            )
        )
    median = statistics.median(ratios)
    report.target(
        f"at most {TARGET_RATIO:g} times the CPU of one model and no idle connection",
        median <= TARGET_RATIO,
        spread(ratios, 2),
        quiet,
    )
    resident = found.memory[0][1]
    report.target(
        f"a front end with one small model has at most {TARGET_MB:g} MB resident",
        resident <= TARGET_MB,
        f"{resident:.1f} MB",
    )
    report.notes += [
        f"{found.known} models are registered and not loaded; registering them took "
        f"{found.registering_s:.0f} s",
        "each idle connection has had one answer; at the end all of them were still open",
        "load: `mlp16`, one row in the binary tensor extension, 32 further connections, wrk with one thread; "
        "µs: CPU time a request, the gateways taking turns",
        "memory: of the front end, after the load; PSS divides shared pages among those who share them",
        f"idle: {SETTLE_S:g} s after the last request; wake-ups are voluntary context switches",
        note,
    ]
    report.publish()


def main(words: Sequence[str]) -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    if words[:1] == ["--hold"]:
        source, port, count = words[1:]
        hold(source, int(port), int(count))
        return 0
    parser = argparse.ArgumentParser(description="What unused models and connections cost.")
    parser.add_argument("--models", type=int, default=MODELS)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each load")
    options = parser.parse_args(words)
    problem = ""
    if shutil.which("wrk") is None:
        problem = "wrk is missing; on Debian: apt install wrk"
    elif more_files() < options.connections + SPARE_FILES:
        problem = f"open files: {options.connections + SPARE_FILES} needed (ulimit -Hn)"
    if problem:
        print(f"scale.py: {problem}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        cases, found, (note, busy) = measure(Path(folder), options)
    publish([case.name for case in cases], found, note, not busy)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
