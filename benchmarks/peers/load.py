"""Load on one server, and what it did and used meanwhile.

wrk makes the load, with one thread and the same bytes over and over. Where few large batches are
answered, `loader.py` does, which counts whole batches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import busy_s

from peers.processes import cpu_ns, cpu_since, family, last_line, pss_bytes
from peers.results import Sample
from peers.workloads import Request

HERE = Path(__file__).resolve().parent
LOADER = HERE.parent / "loader.py"

TIMEOUT_S = 30
"""What wrk waits for an answer before it counts it as late."""

GRACE_S = 60.0
"""What a load may take beyond its time before it is ended."""

RAMP_S = 1.0
"""How long `loader.py` loads before it counts."""

EDGE_S = 0.2
"""How far inside `loader.py`'s count the CPU time is taken."""


class LoadFailed(Exception):
    """A load gave no figures; its text says why."""


@dataclass(frozen=True)
class Target:
    """A server to load: where it listens, its first process, what it is asked."""

    port: int
    root: int
    request: Request


@dataclass(frozen=True)
class Count:
    """What the load's client saw: answers that were good, the seconds they took, the rest."""

    good: float
    seconds: float
    errors: int
    p50_ms: float
    p99_ms: float


def wrk_count(output: str) -> Count:
    """Of what ``post.lua`` printed. LoadFailed when it printed nothing, or nothing went well."""
    line = next((x for x in output.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise LoadFailed("wrk gave no result: " + last_line(output))
    seen = json.loads(line.removeprefix("RESULT "))
    good = seen["requests"] - seen["status"]
    errors = seen["status"] + seen["broken"] + seen["late"]
    if good <= 0:
        raise LoadFailed(f"no request was answered well, {errors} were errors")
    return Count(
        good, seen["duration_us"] / 1e6, errors, seen["p50_us"] / 1e3, seen["p99_us"] / 1e3
    )


def loader_count(output: str) -> Count:
    """Of what ``loader.py`` printed; it ends at the first error, so there are none."""
    seen = json.loads(output)
    return Count(seen["answers"], seen["answers"] / seen["rate"], 0, seen["p50_ms"], seen["p99_ms"])


class Meter:
    """What a server, and everybody else on the machine, use from its making on."""

    def __init__(self, root: int, load: int | None = None) -> None:
        self._root, self._load = root, load
        self._before = cpu_ns(family(root))
        self._began, self._busy, self._own = time.monotonic(), busy_s(), self._own_s()

    def _own_s(self) -> float:
        """CPU seconds of this process, of its children that have ended, and of the load that runs."""
        living = cpu_ns([self._load]) if self._load else {}
        return sum(os.times()[:4]) + sum(living.values()) / 1e9

    def read(self) -> tuple[float, float, float]:
        """Seconds since, CPU seconds of the server, cores of all others but the load.

        A load that was started after the meter must have ended by now.
        """
        seconds = time.monotonic() - self._began
        server = cpu_since(self._before, self._root) / 1e9
        others = busy_s() - self._busy - server - (self._own_s() - self._own)
        return seconds, server, max(0.0, others / seconds)


@contextmanager
def _loading(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A load that runs, and has ended when the context is left."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _output(process: subprocess.Popen[str], seconds: float) -> str:
    """What the load printed. LoadFailed when it did not end in time, or badly."""
    try:
        output, _ = process.communicate(timeout=seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"the load did not end within {GRACE_S:g} s of its time") from None
    if process.returncode:
        raise LoadFailed(f"the load ended with status {process.returncode}: {last_line(output)}")
    return output


def load(target: Target, connections: int, seconds: int, folder: Path) -> Sample:
    """Load for so long with wrk. LoadFailed when that gives no figures."""
    request, body = target.request, folder / "body"
    body.write_bytes(request.body)
    command = [
        "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={TIMEOUT_S}s", "--latency",
        "-s", str(HERE / "post.lua"), f"http://127.0.0.1:{target.port}{request.path}", "--",
        request.method, str(body) if request.body else "",
        *(f"{name}: {value}" for name, value in request.headers),
    ]  # fmt: skip
    meter = Meter(target.root)
    with _loading(command) as process:
        count = wrk_count(_output(process, seconds))
    _, server_s, others = meter.read()
    return _sample(target, count, 1e6 * server_s / count.good, others)


def load_in_bursts(target: Target, connections: int, seconds: int, folder: Path) -> Sample:
    """The same with ``loader.py``, for servers that answer a few large batches a second."""
    file = folder / "request"
    file.write_bytes(target.request.encoded("127.0.0.1"))
    command = [
        sys.executable, str(LOADER), "127.0.0.1", str(target.port), str(file), str(connections),
        str(RAMP_S), str(seconds),
    ]  # fmt: skip
    with _loading(command) as process:
        time.sleep(RAMP_S + EDGE_S)
        meter = Meter(target.root, process.pid)
        time.sleep(seconds - 2 * EDGE_S)
        spent_s, server_s, others = meter.read()
        count = loader_count(_output(process, seconds))
    rate = count.good / count.seconds
    return _sample(target, count, 1e6 * server_s / spent_s / rate, others)


def _sample(target: Target, count: Count, cpu_us: float, others: float) -> Sample:
    return Sample(
        cpu_us=cpu_us,
        rate=count.good / count.seconds,
        p50_ms=count.p50_ms,
        p99_ms=count.p99_ms,
        errors=count.errors,
        pss_mb=pss_bytes(family(target.root)) / 1e6,
        others=others,
    )
