"""Closed-loop load over keep-alive connections, in a process of its own; used by the other benchmarks.

    python loader.py HOST PORT REQUEST_FILE CONNECTIONS WARM_UP_S SECONDS

Every connection sends the same prebuilt bytes, and again as soon as its answer is there. Plain blocking
sockets behind one epoll: nothing is parsed but the status and Content-Length, so that the load takes as
little as possible of the cores it shares with the server. Prints one JSON object (`Load`).
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

BUFFER = bytearray(1 << 18)


@dataclass(frozen=True)
class Load:
    """What a run of the loader saw, after its warm-up.

    Attributes:
        rate: answers a second, counted from the end of one burst of answers to the end of another, so
            that a batch is counted whole or not at all.
        answers: so many, between those ends.
        p50_ms, p99_ms: latency.
    """

    rate: float
    answers: int
    p50_ms: float
    p99_ms: float


class Client:
    """One connection and the answer it is reading."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.socket = socket.socket()
        # Room for a whole request and answer: neither side then waits for the other in the middle.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(request) + (1 << 16))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.connect((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._left = 0  # bytes of the answer yet to come; 0: it has not begun
        self.sent_ns = 0

    def send(self) -> None:
        """Send the request."""
        self.sent_ns = time.monotonic_ns()
        self.socket.sendall(self._request)

    def receive(self) -> bool:
        """Take what is there; True when the answer is complete."""
        got = self.socket.recv_into(BUFFER)
        if not self._left:
            # An answer's head comes in one segment: the server writes it with one call.
            head = BUFFER.find(b"\r\n\r\n", 0, got)
            if not BUFFER.startswith(b"HTTP/1.1 200") or head < 0:
                line = bytes(BUFFER[: min(got, 300)]).partition(b"\r\n")[0]
                raise RuntimeError(f"not answered well: {line.decode(errors='replace')}")
            fields = bytes(BUFFER[: head + 2]).lower()
            at = fields.index(b"\r\ncontent-length: ") + 18  # not inference-header-content-length
            self._left = head + 4 + int(fields[at : fields.index(b"\r", at)])
        elif not got:
            raise RuntimeError("the server closed a connection")
        self._left -= got
        return self._left == 0


def drive(
    clients: list[Client], warm_up_s: float, seconds: float
) -> tuple[list[float], list[float]]:
    """Load until the time is over; when answers were complete after the warm-up, and their latency."""
    by_fd = {client.socket.fileno(): client for client in clients}
    completed: list[int] = []
    latency: list[int] = []
    with select.epoll() as epoll:
        for client in clients:
            epoll.register(client.socket, select.EPOLLIN)
            client.send()
        begin_ns = time.monotonic_ns() + int(warm_up_s * 1e9)
        end_ns = begin_ns + int(seconds * 1e9)
        now_ns = 0
        while now_ns < end_ns:
            for fd, _event in epoll.poll():
                client = by_fd[fd]
                if client.receive():
                    now_ns = time.monotonic_ns()
                    if now_ns >= begin_ns:
                        completed.append(now_ns)
                        latency.append(now_ns - client.sent_ns)
                    client.send()
    return [ns / 1e9 for ns in completed], sorted(ns / 1e9 for ns in latency)


def burst_ends(times: list[float]) -> list[int]:
    """Indices of the last answers of bursts: a gap follows that is long for this rate."""
    pace = (times[-1] - times[0]) / len(times)
    return [i for i in range(len(times) - 1) if times[i + 1] - times[i] > 2 * pace]


def summary(times: list[float], latency: list[float]) -> Load:
    """Rates and percentiles."""
    ends = burst_ends(times)
    first, last = (ends[0], ends[-1]) if len(ends) > 1 else (0, len(times) - 1)
    return Load(
        (last - first) / (times[last] - times[first]),
        last - first,
        latency[len(latency) // 2] * 1e3,
        latency[len(latency) * 99 // 100] * 1e3,
    )


def main(arguments: list[str]) -> int:
    """Run the load that the command line describes."""
    host, port, request_file, connections, warm_up_s, seconds = arguments
    request = Path(request_file).read_bytes()
    clients = [Client(host, int(port), request) for _ in range(int(connections))]
    times, latency = drive(clients, float(warm_up_s), float(seconds))
    for client in clients:
        client.socket.close()
    print(json.dumps(asdict(summary(times, latency))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
