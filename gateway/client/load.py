"""A load: prebuilt requests sent over kept-alive connections, as fast as they are answered or at a rate.

One core should make tens of thousands of requests a second, so that the server is measured and not this
client. Hence no task, no object and no timer for a request: a connection is a protocol that, when an answer
is complete, counts it and writes the next request from the same callback.

What counts: requests sent after the warm-up and before the end. At the end those in flight are waited for,
because leaving them out would leave out the slowest. The rate is theirs over that time (a closed loop loses
at the end what was in flight from the warm-up at its beginning).
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from gateway import clock
from gateway.client.errors import BadAnswer
from gateway.client.load_http import AnswerReader
from gateway.client.load_pacing import ClosedLoop, Pacing, PoissonArrivals, Timer
from gateway.client.load_tally import Tally, is_success
from gateway.clock import NS_PER_S

CONNECT_TIMEOUT_S = 3.0
"""How long to wait for a connection before that counts as a failure."""

RECONNECT_PAUSE_S = 0.1
"""After a connection that could not be made, or was closed unanswered, so that no server is hammered."""

SWEEPS_PER_TIMEOUT = 20
"""How often a connection is looked at within a request's time-out: it may fire late by a part of so many."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is sent where, and how long.

    Attributes:
        host: name or address.
        port: of the server.
        tls: None: plain HTTP.
        requests: complete requests, sent in turn.
        connections: how many, and thereby how many requests may be in flight.
        warmup_s: time before anything counts.
        timeout_s: for each request, from its sending.
        duration_s: time that counts, unless ``limit`` is given.
        limit: number of requests that count; the load ends when they are answered, or when no connection
            could be made for ``timeout_s``.
        rate: open loop: mean arrivals a second; None: closed loop.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None
    requests: Sequence[bytes]
    connections: int
    warmup_s: float
    timeout_s: float
    duration_s: float
    limit: int | None = None
    rate: float | None = None


class Phase(IntEnum):
    """A load's phases, in their order."""

    WARMING = 0
    MEASURING = 1
    ENDING = 2
    ENDED = 3


class Load:
    """Carries out a plan, once. ``tally`` may be read all the time.

    Args:
        plan: what to do.
        on_measuring: called when the warm-up is over.
        source: of randomness for arrivals.
    """

    def __init__(
        self,
        plan: LoadPlan,
        on_measuring: Callable[[], object] = lambda: None,
        source: random.Random | None = None,
    ) -> None:
        self.plan = plan
        self.tally = Tally()
        self.phase = Phase.WARMING
        self._on_measuring = on_measuring
        self._source = source or random.Random()  # noqa: S311 (no secret)
        self._pacing: Pacing = ClosedLoop()
        self._free: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._sent = 0  # requests, warm-up included: says whose turn it is
        self._in_flight = 0  # requests that count
        self._left = plan.limit
        self._cpu_ns = 0
        self._ended = asyncio.Event()

    async def run(self) -> Tally:
        """Connect, warm up, measure, wait for what is in flight; the tally."""
        loop = self._loop = asyncio.get_running_loop()
        self._timer = Timer(loop, self._send_due)
        if self.plan.rate is not None:
            self._pacing = PoissonArrivals(self.plan.rate, clock.monotonic_ns(), self._source)
        self._next_phase = loop.call_later(self.plan.warmup_s, self._measure)
        sweeping = loop.create_task(self._sweep())
        for _ in range(self.plan.connections):
            self._connect()
        try:
            await self._ended.wait()
        finally:
            self.stop()
            self._next_phase.cancel()
            self._timer.close()
            tasks = [sweeping, *self._connecting]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for connection in tuple(self._open):
                connection.transport.abort()
        return self.tally

    def stop(self) -> None:
        """End at once; requests in flight count as unfinished."""
        if self.phase is Phase.ENDED:
            return
        self._close_window()
        self.phase = Phase.ENDED
        self.tally.unfinished += self._in_flight
        self._ended.set()

    def _measure(self) -> None:
        if self.phase is Phase.WARMING:
            self.phase = Phase.MEASURING
            self.tally.begun_ns = clock.monotonic_ns()
            self._cpu_ns = time.process_time_ns()
            if self.plan.limit is None:
                self._next_phase = self._loop.call_later(self.plan.duration_s, self._finish)
            self._on_measuring()

    def _finish(self) -> None:
        """Send no more; end when what is in flight is answered or has timed out."""
        if self.phase is not Phase.MEASURING:
            return
        if self.plan.limit is None:
            self._close_window()
        self.phase = Phase.ENDING
        if not self._in_flight:
            self.stop()

    def _close_window(self) -> None:
        """Note the end of the time that counts, once there is one."""
        tally = self.tally
        if self.phase is Phase.WARMING or tally.ended_ns:
            return
        tally.ended_ns = now_ns = clock.monotonic_ns()
        tally.cpu_ns = time.process_time_ns() - self._cpu_ns
        if self.plan.rate is not None and self.phase is Phase.MEASURING:
            while self._pacing.take(now_ns) is not None:
                tally.unsent += 1

    # Connections

    def _connect(self, *, pause_s: float = 0.0) -> None:
        if self.phase < Phase.ENDING:
            task = self._loop.create_task(self._open_connection(pause_s))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _open_connection(self, pause_s: float) -> None:
        """Connect, trying again until that works."""
        plan = self.plan
        while True:
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._loop.create_connection(
                        partial(_Connection, self), plan.host, plan.port, ssl=plan.tls
                    )
                return
            except OSError as error:  # TimeoutError and ssl.SSLError are such
                if self.phase is Phase.MEASURING:
                    self.tally.connect_failures += 1
                    self.tally.connect_problem = error.strerror or str(error) or "timed out"
                pause_s = RECONNECT_PAUSE_S

    def opened(self, connection: _Connection) -> None:
        """A connection is there."""
        self._open.add(connection)
        self._feed(connection)

    def closed(self, connection: _Connection, *, pause_s: float = 0.0) -> None:
        """A connection is gone, by the server's doing or ours; another takes its place after a pause."""
        self._open.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        if self.phase is Phase.MEASURING:
            self.tally.reconnects += 1
        self._connect(pause_s=pause_s)

    async def _sweep(self) -> None:
        """Give up requests whose time is over; one timer for all, instead of one for each.

        A limit of requests that no connection is left for is given up, too.
        """
        timeout_ns = round(self.plan.timeout_s * NS_PER_S)
        connected_ns = clock.monotonic_ns()
        while True:
            await asyncio.sleep(self.plan.timeout_s / SWEEPS_PER_TIMEOUT)
            now_ns = clock.monotonic_ns()
            for connection in tuple(self._open):
                if connection.is_waiting and connection.sent_ns <= now_ns - timeout_ns:
                    self.tally.timeouts += self.settle(connection)
                    connection.transport.abort()
            if self._open:
                connected_ns = now_ns
            elif self._left and connected_ns <= now_ns - timeout_ns:
                self._finish()

    # Requests

    def _feed(self, connection: _Connection) -> None:
        """Send the next request on a connection that is free, where one is due."""
        if self.phase >= Phase.ENDING:
            return
        now_ns = clock.monotonic_ns()
        due_ns = self._pacing.take(now_ns)
        if due_ns is not None:
            self._send(connection, due_ns, now_ns)
            return
        self._free.append(connection)
        if len(self._free) == 1:
            self._timer.arm(self._pacing.next_ns())

    def _send_due(self) -> None:
        """Send what has become due on the connections that are free, and wait for what comes next."""
        while self._free and self.phase < Phase.ENDING:
            now_ns = clock.monotonic_ns()
            due_ns = self._pacing.take(now_ns)
            if due_ns is None:
                self._timer.arm(self._pacing.next_ns())
                return
            self._send(self._free.pop(), due_ns, now_ns)

    def _send(self, connection: _Connection, due_ns: int, now_ns: int) -> None:
        requests = self.plan.requests
        request = requests[self._sent % len(requests)]
        self._sent += 1
        connection.is_waiting = True
        connection.due_ns, connection.sent_ns = due_ns, now_ns
        connection.counts = self.phase is Phase.MEASURING
        connection.transport.write(request)
        if connection.counts:
            self._in_flight += 1
            self.tally.sent_bytes += len(request)
            if self._left is not None:
                self._left -= 1
                if not self._left:
                    self._finish()

    def settle(self, connection: _Connection) -> bool:
        """A connection's request is no longer in flight; whether it counts."""
        connection.is_waiting = False
        if not connection.counts or self.phase is Phase.ENDED:
            return False
        self._in_flight -= 1
        if self.phase is Phase.ENDING and not self._in_flight:
            self._loop.call_soon(self.stop)  # after the caller has counted it
        return True

    def answered(self, connection: _Connection) -> None:
        """An answer is complete."""
        reader, tally = connection.reader, self.tally
        if self.settle(connection):
            tally.statuses[reader.status] += 1
            tally.received_bytes += reader.answer_bytes
            if is_success(reader.status):
                tally.latencies.record(clock.monotonic_ns() - connection.due_ns)
            else:
                tally.texts.setdefault(reader.status, reader.text)
        if reader.keeps_alive:
            self._feed(connection)
        else:
            connection.transport.close()


class _Connection(asyncio.Protocol):
    """One connection and the request on it, if any.

    Attributes:
        transport: set as soon as it is connected.
        is_waiting: whether a request is in flight.
        counts: whether that is to be counted.
        due_ns: when it was due.
        sent_ns: when it was sent.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self.reader = AnswerReader()
        self.transport: asyncio.Transport
        self.is_waiting = self.counts = False
        self.due_ns = self.sent_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to send."""
        self.transport = transport  # type: ignore[assignment]  # of create_connection: a Transport
        self._load.opened(self)

    def data_received(self, data: bytes) -> None:
        """Read on. What comes without a request (408 on an idle connection, say) ends the connection."""
        if not self.is_waiting:
            self.transport.abort()
            return
        try:
            is_complete = self.reader.feed(data)
        except BadAnswer:
            self._load.tally.malformed += self._load.settle(self)
            self.transport.abort()
            return
        if is_complete:
            self._load.answered(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Count what was in flight, and have the connection replaced."""
        load, pause_s = self._load, 0.0
        if self.is_waiting and error is None and self.reader.ends_here():
            load.answered(self)
        elif self.is_waiting:
            load.tally.lost += load.settle(self)
            pause_s = RECONNECT_PAUSE_S
        load.closed(self, pause_s=pause_s)
