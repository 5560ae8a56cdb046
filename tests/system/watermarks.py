"""Asks several models at once with watermarked tensors, and holds every answer against its request.

    python tests/system/watermarks.py --requests 100000 --write benchmarks/results/watermarks.md

Many keep-alive connections, three encodings. Meanwhile a tenth of the clients go away, some read large
answers slowly, and workers and the front end are killed. An answer of which a single element is not its
asker's counts as wrong, and the bytes of such elements as foreign.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import heapq
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script it is in no package

from tests.conftest import ROOT, load_script
from tests.system.server import Server, command_line, wait_gone
from tests.system.watermarked import (
    ENCODINGS,
    KINDS,
    Request,
    Tally,
    request_of,
    write_repository,
)

CONNECTIONS = 48
KILL_EVERY = 2000
FRONTEND_KILL_EVERY = 20_000
"""Requests between two kills; of front ends at least one in a run."""

LEAVING = 0.1
"""Share of the clients that go away."""

SLOW = 0.3
"""Share of the large answers that are read slowly."""

SLOW_PAUSES = 6
SLOW_BYTES = 4096
PAUSE_ANSWERS = 25
"""A slow reader reads so many bytes, then waits for so many answers of others."""

NO_ANSWER_S = 60
"""A request that has no answer by then never gets one."""

ALLOWED_ERRORS = {429, 503, 504}


class Progress:
    """How many requests have ended, and who waits for more of them to."""

    def __init__(self) -> None:
        self.count = 0
        self._is_over = False
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Event]] = []

    def add(self) -> None:
        """One more."""
        self.count += 1
        while self._waiting and self._waiting[0][0] <= self.count:
            heapq.heappop(self._waiting)[2].set()

    def finish(self) -> None:
        """Nothing is to be waited for any more."""
        self._is_over = True
        for *_, event in self._waiting:
            event.set()

    async def more(self, requests: int) -> bool:
        """Wait for so many; False: there are none left."""
        if not self._is_over:
            event = asyncio.Event()
            heapq.heappush(self._waiting, (self.count + requests, next(self._order), event))
            await event.wait()
        return not self._is_over


# Clients


class Leave(enum.Enum):
    """When a client goes away."""

    IN_REQUEST = "in its request's body"
    AT_ONCE = "when all was sent"
    IN_ANSWER = "in its answer"


@dataclass(frozen=True)
class Connection:
    """One keep-alive connection.

    Attributes:
        reader, writer: its ends.
        kills: beginnings and ends of kills of front ends until it was opened: odd while one died.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    kills: int

    def close(self) -> None:
        """At once, whatever is on its way."""
        self.writer.transport.abort()


class Run:
    """All clients of one server, and the kills meanwhile.

    Args:
        server: serves `write_repository`'s models.
        requests: how many.
        seed: of everything that is drawn.
    """

    def __init__(self, server: Server, requests: int, seed: int) -> None:
        self.tally = Tally()
        self._server = server
        self._requests = requests
        self._seed = seed
        self._numbers = iter(range(requests))
        self._progress = Progress()
        self._frontend_kills = 0
        self._slow_now = 0

    async def all(self) -> Tally:
        """Ask everything."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._kill_workers())
            group.create_task(self._kill_frontends())
            clients = [group.create_task(self._client(n)) for n in range(CONNECTIONS)]
            await asyncio.wait(clients)
            self._progress.finish()
        return self.tally

    async def _client(self, number_of_client: int) -> None:
        chance = random.Random(self._seed * CONNECTIONS + number_of_client)
        connection: Connection | None = None
        for number in self._numbers:
            request = request_of(chance, number)
            leave = chance.choice(list(Leave)) if chance.random() < LEAVING else None
            is_slow = request.kind == "large" and chance.random() < SLOW and leave is None
            if is_slow and connection is not None:  # it takes one of its own
                connection.close()
                connection = None
            try:
                async with asyncio.timeout(NO_ANSWER_S):
                    connection = await self._one(request, leave, is_slow, connection)
            except TimeoutError:
                self.tally.unanswered += 1
                connection = None
            self._progress.add()
            if self._progress.count + CONNECTIONS >= self._requests:
                self._progress.finish()  # too few are left to wait for
        if connection is not None:
            connection.close()

    async def _one(
        self, request: Request, leave: Leave | None, is_slow: bool, connection: Connection | None
    ) -> Connection | None:
        """One request to its end; the connection for the next, if there is one."""
        while True:
            kills = self._frontend_kills if connection is None else connection.kills
            is_kept = False
            try:
                if connection is None:
                    connection = await self._open(is_slow)
                is_kept = await self._exchange(request, leave, is_slow, connection)
                return connection if is_kept else None
            except (ConnectionError, asyncio.IncompleteReadError):
                if kills == self._frontend_kills and kills % 2 == 0:
                    self.tally.broken += 1
                    return None
                self.tally.excused += 1
            finally:
                if connection is not None and not is_kept:
                    connection.close()
                    connection = None

    async def _open(self, is_slow: bool) -> Connection:
        kills = self._frontend_kills
        sock = socket.socket()
        sock.setblocking(False)
        if is_slow:  # so that most of the answer stays with the server
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * SLOW_BYTES)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self._server.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        return Connection(reader, writer, kills)

    async def _exchange(
        self, request: Request, leave: Leave | None, is_slow: bool, connection: Connection
    ) -> bool:
        """Send, read and check; whether the connection can be used again."""
        reader, writer = connection.reader, connection.writer
        sent = request.head + request.body
        if leave is Leave.IN_REQUEST:
            sent = sent[: len(request.head) + self._progress.count % len(request.body)]
        writer.write(sent)
        await writer.drain()
        if leave is not None:
            if leave is Leave.IN_ANSWER:
                await reader.readexactly(1)
            self.tally.left[leave.value] += 1
            return False
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head[:-4].split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        length, begin = int(headers["content-length"]), b""
        if is_slow:
            begin = await self._read_slowly(reader, length)
        body = begin + await reader.readexactly(length - len(begin))
        status = int(first.split()[1])
        if status == 200:
            self.tally.check(request, headers, body)
            self.tally.slow += is_slow
        else:
            self.tally.errors[status] += 1
        return not is_slow and headers.get("connection") != "close"

    async def _read_slowly(self, reader: asyncio.StreamReader, length: int) -> bytes:
        """The begin of a body, with pauses for others; none when there are many slow ones already."""
        begin = b""
        if self._slow_now < CONNECTIONS // 4:
            self._slow_now += 1
            try:
                for _ in range(SLOW_PAUSES):
                    begin += await reader.readexactly(min(SLOW_BYTES, length - len(begin)))
                    await self._progress.more(PAUSE_ANSWERS)
            finally:
                self._slow_now -= 1
        return begin

    # Kills

    async def _kill_workers(self) -> None:
        chance = random.Random(self._seed)
        signals = itertools.cycle((signal.SIGKILL, signal.SIGSEGV))
        while await self._progress.more(KILL_EVERY):
            workers = [pid for pid in self._server.workers() if command_line(pid)]
            if workers:
                number = next(signals)
                os.kill(chance.choice(workers), number)
                self.tally.killed[f"worker, {number.name}"] += 1

    async def _kill_frontends(self) -> None:
        every = min(FRONTEND_KILL_EVERY, self._requests // 2)
        while await self._progress.more(every):
            (pid,) = self._server.frontends()
            self._frontend_kills += 1
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(wait_gone, pid)
            self._frontend_kills += 1
            self.tally.killed["front end, SIGKILL"] += 1


def run(repository: Path, requests: int, seed: int) -> Tally:
    """Serve a repository of `write_repository`'s, ask, and stop. AssertionError: it did not stop well."""
    with Server(repository) as server:
        tally = uvloop.run(Run(server, requests, seed).all())
        assert server.stop() == 0, server.lines
    return tally


def facts(tally: Tally) -> list[tuple[str, str]]:
    """What a tally says, for people."""
    rows = [("requests", f"{tally.requests:,}")]
    for kind in KINDS:
        counts = ", ".join(f"{tally.right[kind, e]:,} {e}" for e in ENCODINGS)
        rows.append((f"right answers of `{kind}`", counts))
    rows += [
        ("right answers in all", f"{tally.right.total():,}"),
        ("elements and bytes in them", f"{tally.elements:,} and {tally.checked_bytes:,}"),
        ("**foreign bytes**", f"{tally.foreign_bytes:,}"),
        ("**wrong answers**", f"{len(tally.wrong):,}"),
        ("**requests without an answer**", f"{tally.unanswered:,}"),
        ("**connections broken without a kill**", f"{tally.broken:,}"),
        ("errors by status", _counts(tally.errors)),
        ("broken by a front end's kill, and sent again", f"{tally.excused:,}"),
        ("clients that went away", _counts(tally.left)),
        ("answers read slowly", f"{tally.slow:,}"),
        ("killed", _counts(tally.killed)),
    ]
    return rows


def _counts(counter: Counter) -> str:
    return ", ".join(f"{key}: {count:,}" for key, count in sorted(counter.items())) or "none"


def is_good(tally: Tally) -> bool:
    """Whether nothing happened that must not."""
    bad = (tally.foreign_bytes, len(tally.wrong), tally.unanswered, tally.broken)
    return not any(bad) and set(tally.errors) <= ALLOWED_ERRORS


def main() -> int:
    """Run as the command line says; 0 where nothing was wrong."""
    parser = argparse.ArgumentParser(description="Ask with watermarked tensors.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_repository(Path(folder))
        tally = run(Path(folder), arguments.requests, arguments.seed)
    rows = facts(tally)
    for row in rows:
        print(": ".join(row).replace("*", ""))
    print(*tally.wrong[:20], sep="\n")
    if arguments.write:
        report = load_script(ROOT / "benchmarks" / "report.py")
        lines = ["# Watermarked requests", ""]
        command = f"tests/system/watermarks.py --requests {arguments.requests}"
        lines += [f"Made by `python {command}`.", "", *(f"- {fact}" for fact in report.machine())]
        lines += ["", "| | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]
        arguments.write.write_text("\n".join(lines) + "\n")
    return 0 if is_good(tally) else 1


if __name__ == "__main__":
    sys.exit(main())
