"""What an answer costs that nothing is computed for, and the load and the meters that tell.

`overhead.py` and `scale.py` share it. The floors are nginx with a fixed answer, and a protocol of uvloop's
that answers every request with the same bytes, of the gateway's sizes. Run as a script it is that protocol:

    python floors.py REQUEST_BYTES ANSWER_FILE
"""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from harness import WAIT_S, Gateway, processes, usage
from peers.load import HERE as PEERS
from peers.load import wrk_count
from peers.processes import free_port

CONNECTIONS = 32

TRACE_S = 2
"""How long system calls are counted."""

ATTACH_S = 0.05
"""Between two looks whether strace has begun."""

NEEDED = {"wrk": "apt install wrk", "nginx": "apt install nginx-light"}

NGINX = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log stderr error;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body_temp;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 "ok"; }}
    }}
}}
"""

_CALLS = re.compile(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$", re.MULTILINE)


def missing_program() -> str | None:
    """What has to be installed first, and how; None: nothing."""
    for name, how in NEEDED.items():
        if shutil.which(name) is None:
            return f"{name} is missing; on Debian: {how}"
    return None


# Meters


@dataclass(frozen=True)
class Cpu:
    """What processes used, ns and counts.

    Attributes:
        total: run time, exact (schedstat).
        user: of it outside the kernel, by the shares that utime and stime have, which are sampled.
        sleeps: how often a thread waited for something.
    """

    total: float
    user: float
    sleeps: float

    @property
    def kernel(self) -> float:
        """The rest of the run time."""
        return self.total - self.user

    def __truediv__(self, times: float) -> Cpu:
        return Cpu(self.total / times, self.user / times, self.sleeps / times)

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.total + other.total, self.user + other.user, self.sleeps + other.sleeps)


class CpuMeter:
    """What these processes use from its making on; none may end meanwhile."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._before, self._ticks = usage(self._pids), self._modes()

    def _modes(self) -> tuple[int, int]:
        """Clock ticks in user and in kernel mode."""
        user = kernel = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user, kernel = user + int(fields[11]), kernel + int(fields[12])
        return user, kernel

    def read(self) -> Cpu:
        """So much until now."""
        used = usage(self._pids).since(self._before)
        user, kernel = (now - then for now, then in zip(self._modes(), self._ticks, strict=True))
        return Cpu(used.cpu_ns, used.cpu_ns * user / max(1, user + kernel), used.voluntary)


class Trace:
    """strace on a process that is loaded meanwhile: its system calls by name.

    ``reason`` says why there are none to see.
    """

    def __init__(self, pid: int, folder: Path) -> None:
        self._pid, self._file = pid, folder / "strace"
        self.calls: dict[str, int] = {}
        self.reason = ""

    def __enter__(self) -> Trace:
        if shutil.which("strace") is None:
            self.reason = "strace is missing; on Debian: apt install strace"
            return self
        self._process = subprocess.Popen(
            ["strace", "-c", "-f", "-p", str(self._pid), "-o", str(self._file)],
            stderr=subprocess.PIPE,
            text=True,
        )
        said = self._process.stderr.readline()
        if "attached" not in said:
            self._process.wait()
            self.reason = f"strace may not look into processes here: {said.strip()}"
        return self

    def __exit__(self, *_: object) -> None:
        if self.reason:
            return
        self._process.send_signal(signal.SIGINT)
        self._process.communicate()
        self.calls = {name: int(count) for count, name in _CALLS.findall(self._file.read_text())}
        self.calls.pop("total", None)


# Load


@dataclass(frozen=True)
class Target:
    """What to ask, and where: ``request`` is all of its bytes, sent to ``port`` of 127.0.0.1."""

    port: int
    request: bytes

    def load(self, seconds: int, folder: Path, connections: int = CONNECTIONS) -> float:
        """Load with wrk, one thread; how many requests were answered well. LoadFailed: none was."""
        head, _, body = self.request.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _version = first.split()
        headers = [x for x in lines if not x.startswith(("Host:", "Content-Length:"))]  # wrk's own
        file = folder / "body"
        file.write_bytes(body)
        done = subprocess.run(
            [
                "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency",
                "-s", str(PEERS / "post.lua"), f"http://127.0.0.1:{self.port}{path}",
                "--", method, str(file) if body else "", *headers,
            ],
            capture_output=True,
            text=True,
        )  # fmt: skip
        return wrk_count(done.stdout + done.stderr).good


# Servers


@contextmanager
def nginx(folder: Path) -> Iterator[tuple[int, list[int]]]:
    """A fixed answer of nginx: its port, and its worker's process id."""
    port, config = free_port(), folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port))
    with _server(["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)]) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until = time.monotonic() + WAIT_S
        while not (workers := children.read_text().split()):
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError("nginx did not start")
            time.sleep(ATTACH_S)
        yield port, [int(pid) for pid in workers]


@contextmanager
def echo(folder: Path, request: bytes, answer: bytes) -> Iterator[tuple[int, list[int]]]:
    """`Echo` in a process of its own; its port and process id."""
    file = folder / "answer"
    file.write_bytes(answer)
    command = [sys.executable, __file__, str(len(request)), str(file)]
    with _server(command, stdout=subprocess.PIPE) as process:
        yield int(process.stdout.readline()), [process.pid]


@contextmanager
def _server(command: list[str], stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, stdout=stdout, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()


class Echo(asyncio.BufferedProtocol):
    """Answers whatever has a request's size, and looks at nothing."""

    def __init__(self, request_bytes: int, answer: bytes) -> None:
        self._size, self._answer = request_bytes, answer
        self._got = 0
        self._buffer = memoryview(bytearray(1 << 16))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        self._write = transport.write

    def get_buffer(self, _size: int) -> memoryview:
        """Where the next bytes go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """They are there."""
        self._got += nbytes
        if self._got >= self._size:
            self._got -= self._size
            self._write(self._answer)


async def _serve(request_bytes: int, answer: bytes) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Echo(request_bytes, answer), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def gateway_roles(gateway: Gateway) -> tuple[list[int], list[int]]:
    """Process ids of its front ends, and of its workers."""
    roles = processes(gateway.pid)
    return roles["front end"], roles["workers"]


if __name__ == "__main__":
    import uvloop

    with suppress(KeyboardInterrupt):
        uvloop.run(_serve(int(sys.argv[1]), Path(sys.argv[2]).read_bytes()))
