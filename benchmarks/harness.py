"""What the benchmarks share: a gateway of their own, HTTP requests, measuring processes, rounds.

A benchmark compares things that alternate in rounds, never one after the other, and states the median
and the range of the rounds: machines drift, and this one may have other work. `Noise` measures that other
work, so that a table says what it was measured beside.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import orjson
from report import ROOT, spread

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # of this process and of those it starts

T = TypeVar("T")


TICKS_PER_S = os.sysconf("SC_CLK_TCK")

QUIET_CORES = 0.25
"""A round beside which other processes use less counts as quiet."""

IDLE_CORES = 0.05
"""What other processes may use when a round begins."""

WAIT_S = 30.0
"""How long to wait for that."""

FEWEST_ROUNDS = 3
"""Quiet rounds that are enough for a median; with fewer all rounds count."""

_SERVING = re.compile(
    r"serving (\d+) model versions on http://([^:]+):(\d+), metrics on \S+ admin on (\S+)"
)


class Gateway:
    """``gateway serve`` in processes of its own, ended with the context.

    Attributes:
        host, port: of the data port, once entered.
        admin_url: of the admin port, once entered.
        pid: the supervisor's.
        lines: what it wrote to standard error.
    """

    def __init__(self, repository: Path, *flags: str) -> None:
        self._command = [
            sys.executable, "-m", "gateway", "serve", "--model-repository", str(repository),
            "--port", "0", "--metrics-port", "0", "--admin-port", "0", *flags,
        ]  # fmt: skip
        self.lines: list[str] = []
        self.host, self.port, self.admin_url = "", 0, ""

    def __enter__(self) -> Gateway:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.pid = self._process.pid
        for line in self._process.stderr:
            self.lines.append(line.rstrip())
            if match := _SERVING.search(line):
                self.host, self.port, self.admin_url = match[2], int(match[3]), match[4]
                threading.Thread(target=self._collect, daemon=True).start()
                return self
        self._process.wait()
        raise RuntimeError("the gateway did not start:\n" + "\n".join(self.lines))

    def _collect(self) -> None:
        for line in self._process.stderr:
            self.lines.append(line.rstrip())

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def processes(self) -> dict[str, list[int]]:
        """Process ids by role: supervisor, front end, workers."""
        return processes(self.pid)

    def statistics(self, model: str) -> dict[str, int]:
        """Counters of the model's one version: rows, batches, requests, queue_ns, compute_ns."""
        with Connection(self.host, self.port) as connection:
            body = connection.exchange(http_get(f"/v2/models/{model}/stats"))
        (stats,) = orjson.loads(body)["model_stats"]
        spent = stats["inference_stats"]
        return {
            "rows": stats["inference_count"],
            "batches": stats["execution_count"],
            "requests": spent["success"]["count"],
            "queue_ns": spent["queue"]["ns"],
            "compute_ns": spent["compute_infer"]["ns"],
        }


def processes(supervisor: int) -> dict[str, list[int]]:
    """Process ids by role of the gateway whose supervisor this is."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    roles: dict[str, list[int]] = {"supervisor": [supervisor], "front end": [], "workers": []}
    for pid in map(int, children):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"gateway.serving.worker" in line:
            roles["workers"].append(pid)
        elif b"gateway.frontend.server" in line:
            roles["front end"].append(pid)
    return roles


# HTTP


class Connection:
    """One blocking keep-alive connection; costs the client as little as Python allows."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, request: bytes) -> bytes:
        """Send a request and return the answer's body. RuntimeError unless it is a 200."""
        self._socket.sendall(request)
        data = self._socket.recv(1 << 18)
        while (head := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        if not data.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(data[:200].decode(errors="replace"))
        end = head + 4 + content_length(data)
        while len(data) < end:
            data += self._more()
        return data[head + 4 :]

    def _more(self) -> bytes:
        data = self._socket.recv(1 << 18)
        if not data:
            raise RuntimeError("the server closed the connection")
        return data

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def content_length(head: bytes) -> int:
    """The value of that header, which aiohttp writes in this case."""
    at = head.index(b"\r\nContent-Length: ") + 18  # not Inference-Header-Content-Length
    return int(head[at : head.index(b"\r", at)])


def http_get(path: str) -> bytes:
    """A GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode()


def json_request(model: str, document: object) -> bytes:
    """An inference request, all JSON."""
    return _post(model, orjson.dumps(document), "Content-Type: application/json\r\n")


def binary_request(model: str, name: str, shape: Sequence[int], data: bytes) -> bytes:
    """An inference request of one FP32 tensor in the binary tensor extension, answered likewise."""
    text = orjson.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "datatype": "FP32",
                    "shape": shape,
                    "parameters": {"binary_data_size": len(data)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    headers = (
        "Content-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\n"
    )
    return _post(model, text + data, headers)


def _post(model: str, body: bytes, headers: str) -> bytes:
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: gateway\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


# ONNX Runtime without a gateway


def open_session(path: Path) -> object:
    """An ONNX Runtime session with the options of gateway/serving/session.py and one thread."""
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# Processes and the machine


@dataclass(frozen=True)
class Usage:
    """What a process has used: CPU time, and how often it slept or was put aside."""

    cpu_ns: int
    voluntary: int
    involuntary: int

    def since(self, earlier: Usage) -> Usage:
        """The difference."""
        return Usage(
            self.cpu_ns - earlier.cpu_ns,
            self.voluntary - earlier.voluntary,
            self.involuntary - earlier.involuntary,
        )


def usage(pids: Iterable[int]) -> Usage:
    """The sum over all threads of these processes, CPU time to the nanosecond (schedstat)."""
    cpu_ns = voluntary = involuntary = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            cpu_ns += int((task / "schedstat").read_text().split()[0])
            status = (task / "status").read_text()
            voluntary += int(status.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
            involuntary += int(status.rpartition("nonvoluntary_ctxt_switches:")[2].split()[0])
    return Usage(cpu_ns, voluntary, involuntary)


class Noise:
    """How many cores everybody else used while we measured, kept in ``cores``."""

    def __init__(self) -> None:
        self.cores: list[float] = []
        self._began = (0.0, 0.0)

    def begin(self, ours: Iterable[int] = ()) -> None:
        """From here; ``ours`` are the processes of the benchmark that do work."""
        self._began = time.monotonic(), busy_s() - usage(ours).cpu_ns / 1e9

    def end(self, ours: Iterable[int] = ()) -> float:
        """To here; ``ours`` may have got new members since, but none may have ended."""
        then, busy = self._began
        more = busy_s() - usage(ours).cpu_ns / 1e9 - busy
        self.cores.append(max(0.0, more / (time.monotonic() - then)))
        return self.cores[-1]


def busy_s() -> float:
    """CPU seconds that all cores have spent on anything since boot."""
    with Path("/proc/stat").open() as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / TICKS_PER_S  # but idle and waiting for a disk


def wait_for_quiet(at_most_s: float) -> None:
    """Let other work on the machine end; goes on after a while, as `Noise` shows what is left."""
    until = time.monotonic() + at_most_s
    while time.monotonic() < until:
        noise = Noise()
        noise.begin()
        time.sleep(0.5)
        if noise.end() < IDLE_CORES:
            return


@dataclass(frozen=True)
class Round(Generic[T]):
    """One turn of everything that is compared, and the most cores that others used meanwhile."""

    result: T
    others: float

    @property
    def is_quiet(self) -> bool:
        """Whether the machine was ours."""
        return self.others < QUIET_CORES


@dataclass(frozen=True)
class Rounds(Generic[T]):
    """All rounds that were taken, those that count, whether these were quiet, and a note on why."""

    taken: list[Round[T]]
    counted: list[T]
    quiet: bool
    note: str


def take_rounds(turn: Callable[[Noise], T], wanted: int) -> Rounds[T]:
    """Take turns until enough were quiet, or twice as many were taken.

    What counts is decided by the noise alone, never by the result: the quiet rounds, where there are
    `FEWEST_ROUNDS` of them, else all.
    """
    taken: list[Round[T]] = []
    while sum(r.is_quiet for r in taken) < wanted and len(taken) < 2 * wanted:
        wait_for_quiet(WAIT_S)
        noise = Noise()
        result = turn(noise)
        taken.append(Round(result, max(noise.cores)))
    quiet = [r for r in taken if r.is_quiet]
    counted = quiet if len(quiet) >= FEWEST_ROUNDS else taken
    note = (
        f"{len(quiet)} of {len(taken)} rounds were quiet (other processes used under {QUIET_CORES:g} of "
        f"{os.cpu_count()} cores), {'and these count' if counted is quiet else 'so all count'}; in those "
        f"that count others used {spread([r.others for r in counted], 2)} cores"
    )
    return Rounds(taken, [r.result for r in counted], counted is quiet, note)
