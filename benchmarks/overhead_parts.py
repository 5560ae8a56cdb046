"""The parts that a request is made of, each measured by itself on the real code, in one process.

    python overhead_parts.py MODEL ROWS

Batches of so many one-row requests of `mlp16` go round by hand: real connections of the fast lane on real
sockets, a real dispatcher and its ring, the worker's own consumer, runner and session. Only the transport
is made up, and nobody runs an event loop but where that is what is measured. Prints one JSON object: µs by
part, medians.

A step takes as long as the clock says, less what reading the clock takes; what one step calls from Python
the server calls from uvloop, which costs about the same.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import uvloop
from aiohttp import web
from harness import binary_request, usage

from gateway._kernels import heads, ring, skeleton
from gateway._kernels.fastlane import Connection
from gateway.frontend.frontdoor import FrontDoor
from gateway.serving import loader, memory
from gateway.serving.attached import AttachedLane
from gateway.serving.channel import Channel
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.geometry import LaneSpec
from gateway.serving.limits import Limits
from gateway.serving.options import FrontendOptions
from gateway.serving.plan import LoadPlan
from gateway.serving.routes import RouteTable, Version, VersionState
from gateway.serving.running import Runner
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.metrics import Metrics

ROUNDS = 400
"""Batches that go round, and the samples of each part that is measured apart."""

WARM_UP = 50
CALLS = 200
"""Calls of a part that is too short to be timed alone."""

NAP_S = 0.0002
"""How long a process sleeps before it is woken."""

RUN_NS = 5000
"""What is counted as a run's time."""

WORK = ("take", "run", "count", "publish", "observe")
"""A worker's steps, each also measured after a sleep: NAME and NAME "after sleep"."""

LANE_BYTES = 64 << 20
KEY_BYTES = 1 << 13
SEATS = 2  # one for the batches, one for who sleeps

REQUEST = binary_request("mlp16", "x", (1, 16), np.ones((1, 16), np.float32).tobytes())

SLEEPER = """
import mmap, os, select, sys
from gateway._kernels import ring
mode, fd = sys.argv[1], int(sys.argv[2])
if mode == "futex":
    consumer = ring.Consumer(mmap.mmap(fd, 0), 1, 2)
    print(flush=True)
    while True:
        consumer.announce()
        consumer.sleep(0)
poll = select.epoll()
poll.register(fd, select.EPOLLIN)
print(flush=True)
while True:
    poll.poll()
    os.eventfd_read(fd)
"""


def step(into: list[float], times: int, do: Callable[[], object], floor_us: float = 0.0) -> object:
    """Do something, and note the µs that each of its ``times`` parts took, less ``floor_us`` together."""
    began = time.perf_counter_ns()
    done = do()
    into.append(((time.perf_counter_ns() - began) / 1e3 - floor_us) / times)
    return done


def step_floor_us() -> float:
    """What a step takes in which nothing is done."""
    costs: list[float] = []
    for _ in range(1000):
        step(costs, 1, lambda: None)
    return statistics.median(costs)


FLOOR_US = step_floor_us()


def called(function: Callable[..., object], *arguments: object) -> float:
    """µs of a call, less those of a call of nothing."""
    costs: list[float] = []
    floors: list[float] = []
    for _ in range(ROUNDS):
        step(costs, CALLS, lambda: [function(*arguments) for _ in range(CALLS)])
        step(floors, CALLS, lambda: [_nothing() for _ in range(CALLS)])
    return statistics.median(costs) - statistics.median(floors)


_nothing = [].__len__
"""As cheap as a call of a compiled function can be."""


class Transport:
    """What a connection asks of uvloop's, compiled likewise; the answers go to a socket or nowhere."""

    def __init__(self, sock: socket.socket, closed: list[bool]) -> None:
        self._socket = sock
        self.is_closing = closed.__len__  # true while there is something in the list
        self.get_write_buffer_size = [].__len__  # 0

    def get_extra_info(self, _name: str) -> socket.socket:
        """The socket."""
        return self._socket


def socket_pairs(count: int) -> list[tuple[socket.socket, socket.socket]]:
    """Connected ends over loopback, ours first."""
    pairs = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
            ours.setblocking(False)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs.append((ours, theirs))
    return pairs


async def _unused(_request: web.BaseRequest) -> web.Response:
    """No request gets here."""
    return web.Response(status=500)


OPTIONS = FrontendOptions(
    index=0, frontends=1, strict_readiness=False, model_control=False,
    orphan_grace_s=30.0, drain_pause_s=0.0, drain_timeout_s=30.0, keepalive_timeout_s=75.0,
    max_request_bytes=LANE_BYTES, max_header_bytes=16 << 10, lane_bytes=LANE_BYTES,
    fast_lane=True, log_level="error", log_format="text",
)  # fmt: skip


class Bench:
    """A front end's lane and a worker's runner, with a ring between them. Made in a running loop."""

    def __init__(self, model: Path, rows: int, board: mmap.mmap) -> None:
        loaded = loader.load(LoadPlan(str(model), max_batch_size=64), lambda: None)
        self.session, metrics = loaded.session, Metrics().version("mlp16", 1)
        routes = RouteTable()
        self.data = FrontDoor(routes, web.Server(_unused), {}, OPTIONS)
        limits = Limits(1000, 0, LANE_BYTES)
        self.dispatcher = Dispatcher(
            loaded.signature, limits, board, metrics, asyncio.get_running_loop(),
            lambda lane: None, lambda: None, self.data.burst.wake,
        )  # fmt: skip
        version = Version("mlp16", 1, metrics, VersionState.READY, "", loaded.signature)
        version.dispatcher = self.dispatcher
        routes.models["mlp16"], routes.routes["mlp16"] = {1: version}, 1
        self.consumer = ring.Consumer(board, 0, 1)
        ours, theirs = Channel.pair()
        self.dispatcher.worker_up(1, theirs)
        self.closed: list[bool] = []
        self.pairs = socket_pairs(rows)
        self.connections = [Connection(self.data) for _ in self.pairs]
        for connection, (sock, _) in zip(self.connections, self.pairs, strict=True):
            connection.connection_made(Transport(sock, self.closed))
        self.lanes: dict[tuple[int, int], AttachedLane] = {}
        self.runner = Runner(loaded, self.consumer, self.lanes, {}, 1 << 20)
        self.counters = Ledger.private().batches(0)
        self.steps: dict[str, list[float]] = {}
        self._submit(0)  # which makes the lane
        self.lane = self.dispatcher.lanes[0]
        message, fds = ours.receive()
        attached = AttachedLane(LaneSpec.from_wire(message["spec"]), fds)
        spec, self.key = attached.spec, (0, message["lane"])
        self.lanes[self.key] = attached
        self.consumer.attach(
            self.key, attached.control, spec.slot_count, spec.dims_per_slot, attached.bell
        )
        self._answer_one()

    def _submit(self, index: int) -> None:
        connection = self.connections[index]
        connection.get_buffer(-1)[: len(REQUEST)] = REQUEST
        connection.buffer_updated(len(REQUEST))

    def _answer_one(self) -> None:
        """Once with the general parsers, once more to learn the skeleton, and the worker the shape."""
        for _ in range(2):
            self._submit(0)
            self.data.burst.end()
            (key, slot, word, rows, capacity, _, shape, *_), _ = self.consumer.take(1, False)
            known = self.runner.known(key, shape) or self.runner.learn(key, slot, shape, capacity)
            self.runner.run(key, slot, rows, shape, known)
            self.consumer.publish(key, slot, word, True, 1, 2)
            self.dispatcher.on_bell(self.lane)
            self._drain(self.pairs[:1])

    def _drain(self, pairs: Sequence[tuple[socket.socket, socket.socket]]) -> None:
        for _, theirs in pairs:
            if not theirs.recv(1 << 16).startswith(b"HTTP/1.1 200"):
                raise RuntimeError("a request of the benchmark was refused")

    def go_round(self, *, sends: bool, naps: bool) -> None:
        """One batch, from the bytes of its requests to those of its answers.

        Args:
            sends: send the answers; otherwise connections take their clients to be gone.
            naps: sleep before the worker's part, as a worker does that has nothing to do.
        """
        rows, nbytes = len(self.connections), len(REQUEST)
        self.connections[0].get_buffer(-1)[:nbytes] = REQUEST  # one buffer for all
        received = [connection.buffer_updated for connection in self.connections]
        self._step("receive", rows, lambda: [updated(nbytes) for updated in received])
        self._step("burst", 1, self.data.burst.end)
        when = " after sleep" if naps else ""
        if naps:
            time.sleep(NAP_S)
        self._work(when)
        self._step("look in vain", 1, self._look_in_vain)
        self.closed[:] = () if sends else (True,)
        name = "answer and send" if sends else "answer"
        self._step(f"{name}{when}", rows, lambda: self.dispatcher.on_bell(self.lane))
        if sends:
            self._drain(self.pairs)

    def _work(self, when: str) -> None:
        """The worker's part."""
        rows, consumer, runner = len(self.connections), self.consumer, self.runner
        taken = self._step(f"take{when}", 1, lambda: consumer.take(time.monotonic_ns(), False))
        (key, slot, word, count, _, _, shape, *_), is_sealed = taken
        if count != rows or not is_sealed:
            raise RuntimeError("the requests are not in one batch")
        known = runner.known(key, shape)
        self._step(f"run{when}", 1, lambda: runner.run(key, slot, rows, shape, known))
        self._step(f"count{when}", 1, lambda: self.counters.batch(rows, RUN_NS, 0, 0))
        began, publish = time.monotonic_ns(), consumer.publish
        self._step(f"publish{when}", 1, lambda: publish(key, slot, word, True, began, began + 1))
        self._step(f"observe{when}", 1, lambda: known.cost.observe(rows, RUN_NS))

    def _look_in_vain(self) -> None:
        """What a worker does before it sleeps."""
        self.consumer.take(1, False)
        self.consumer.announce()
        self.consumer.offers()
        self.consumer.retract()

    def _step(self, name: str, times: int, do: Callable[[], object]) -> object:
        return step(self.steps.setdefault(name, []), times, do, FLOOR_US)

    def bound_run(self) -> float:
        """µs of ONNX Runtime's run with a cached binding."""
        lane = self.lanes[self.key]
        shape = next(iter(self.dispatcher.lanes[0].slots)).key.shape
        binding = self.session.bind(shape, len(self.connections), lane.inputs_at, lane.outputs_at)
        return called(self.session.run, binding)

    def ring_bell(self) -> float:
        """µs of an eventfd write when nobody sleeps on it."""
        return called(os.eventfd_write, self.lane.bell, 1)


def asleep(mode: str, fd: int, wake: Callable[[], object]) -> tuple[float, float]:
    """A process that sleeps: µs of waking it for the waker, and of sleep and wake-up for itself."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, mode, str(fd)], stdout=subprocess.PIPE, pass_fds=[fd]
    )
    costs: list[float] = []
    try:
        process.stdout.readline()
        time.sleep(NAP_S)
        before = usage([process.pid])
        for _ in range(ROUNDS):
            step(costs, 1, wake, FLOOR_US)
            time.sleep(NAP_S)
        used = usage([process.pid]).since(before)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return statistics.median(costs), used.cpu_ns / max(1, used.voluntary) / 1e3


class Quiet(asyncio.BufferedProtocol):
    """Takes what comes."""

    buffer = memoryview(bytearray(1 << 18))

    def get_buffer(self, _size: int) -> memoryview:
        """Where the next bytes go."""
        return self.buffer

    def buffer_updated(self, _nbytes: int) -> None:
        """They are there."""


def event_loop(rows: int) -> tuple[float, float]:
    """µs of uvloop for a socket that became readable, its read included, and for a turn of the loop."""
    loop, pairs = uvloop.new_event_loop(), socket_pairs(rows)
    for ours, _ in pairs:
        loop.run_until_complete(loop.connect_accepted_socket(Quiet, ours))
    busy: list[float] = []
    idle: list[float] = []
    turns: list[float] = []

    def turn() -> None:
        loop.call_soon(loop.stop)
        loop.run_forever()

    def turn_often(left: int) -> None:
        if left:
            loop.call_soon(turn_often, left - 1)
        else:
            loop.stop()

    for _ in range(ROUNDS):
        for _, theirs in pairs:
            theirs.send(REQUEST)
        step(busy, 1, turn)
        step(idle, 1, turn)
        loop.call_soon(turn_often, CALLS)
        step(turns, CALLS, loop.run_forever)
    for ours, theirs in pairs:
        theirs.close()
        ours.detach()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    return (
        (statistics.median(busy) - statistics.median(idle)) / rows,
        statistics.median(turns),
    )


async def measure(model: Path, rows: int) -> dict[str, float]:
    """All parts but the event loop's."""
    board_fd = memory.create("board", ring.board_bytes(SEATS))
    board = memory.map_writable(board_fd, ring.board_bytes(SEATS))
    bench = Bench(model, rows, board)
    for i in range(WARM_UP + 3 * ROUNDS):
        if i == WARM_UP:
            bench.steps.clear()
        bench.go_round(sends=i % 3 == 0, naps=i % 3 == 1)
        await asyncio.sleep(0)  # what was put off to the next turn
    parts = {name: statistics.median(costs) for name, costs in bench.steps.items()}
    parts["run alone"] = bench.bound_run()
    parts["bell"] = bench.ring_bell()
    head, _, body = REQUEST.partition(b"\r\n\r\n")
    # Cut short by a byte: all is read, and no object of Python's is made of it.
    parts["head"] = called(heads.parse, head + b"\r\n\r")
    text = body[: body.rindex(b"}")]
    parts["split"] = called(skeleton.json_parts, text, KEY_BYTES)
    counters = bench.dispatcher.metrics.counters
    parts["count answer"] = called(counters.answered, 1, 400_000, 100_000, 5_000)
    bell = os.eventfd(0, os.EFD_CLOEXEC)
    parts["wake epoll"], parts["sleep in epoll"] = asleep(
        "bell", bell, lambda: os.eventfd_write(bell, 1)
    )
    wake = bench.lane.producer.wake
    parts["wake futex"], parts["sleep on futex"] = asleep("futex", board_fd, wake)
    return parts


def main(arguments: Sequence[str]) -> int:
    """Measure; the command line names the model's file and the rows of a batch."""
    model, rows = Path(arguments[0]), int(arguments[1])
    parts = asyncio.run(measure(model, rows))
    parts["read"], parts["turn"] = event_loop(rows)
    print(json.dumps(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
