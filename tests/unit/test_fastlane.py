"""The kernel's connections on a transport of the test's, with a real dispatcher and a worker in its hands.

What waits, expires, leaves, fails or dies does so at a moment that the test chooses.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import pytest

from gateway._kernels.fastlane import Connection
from gateway._kernels.templates import Route
from gateway.frontend.frontdoor import Fork, FrontDoor
from gateway.frontend.guard import Guard
from gateway.frontend.inference import CLIENT_GONE
from gateway.frontend.mirror import Mirror
from gateway.security.keys import key_digest, make_key
from gateway.serving.options import FrontendOptions
from gateway.serving.request import State
from gateway.serving.routes import RouteTable, Version, VersionState
from gateway.serving.routing import ModelRoute, Pin, Share
from gateway.tensors import DATATYPES, Signature, TensorSpec
from tests.twins.ledger import CODES
from tests.unit.test_dispatcher import FAR_US, KILL, Bench, Loop

FP32 = DATATYPES["FP32"]

OPTIONS = FrontendOptions(
    index=0,
    frontends=1 << 16,  # so many that nobody has a core to spare for waiting
    strict_readiness=False,
    model_control=False,
    orphan_grace_s=0,
    drain_pause_s=0,
    drain_timeout_s=0,
    max_request_bytes=1 << 20,
    max_header_bytes=1 << 14,
    keepalive_timeout_s=60,
    fast_lane=True,
    lane_bytes=1 << 20,
    log_level="info",
    log_format="text",
)

PAIR = Signature(
    tuple(TensorSpec(name, FP32, ("n", 2)) for name in ("x", "w")),
    (TensorSpec("y", FP32, ("n", 2)), TensorSpec("z", FP32, ("n", 2))),
    max_batch_size=4,
)
"""Two inputs, of which each output repeats one."""


class Handle(NamedTuple):
    """Of a call that is pending. In no cycle: what it would be called with goes when it is let go of."""

    pending: list
    entry: tuple

    def cancel(self) -> None:
        if self.entry in self.pending:
            self.pending.remove(self.entry)


class Turns(Loop):
    """What is to be called soon is called when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.soon: list[tuple[Callable, tuple]] = []

    def call_soon(self, function, *args) -> None:
        self.soon.append((function, args))

    def call_later(self, delay_s, function, *args) -> Handle:
        handle = Handle(self.pending, (delay_s, function, args))
        self.pending.append(handle.entry)
        return handle

    def turn(self) -> None:
        """The next turn of the loop."""
        soon, self.soon = self.soon, []
        for function, args in soon:
            function(*args)


class Transport:
    """The server's end of a socket pair; what the socket does not take piles up here."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.peer: tuple[str, int] | None = None
        self.rest = b""
        self.is_reading = True
        self.is_closed = False

    def get_extra_info(self, name: str) -> object:
        return self._end if name == "socket" else self.peer

    def get_write_buffer_size(self) -> int:
        return len(self.rest)

    def write(self, data: bytes) -> None:
        self.rest += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


class Client:
    """A connection: bytes in, answers out."""

    def __init__(self, front: Front) -> None:
        self.front = front
        server, self._end = socket.socketpair()
        server.setblocking(False)
        self._end.setblocking(False)
        self._ends = server, self._end
        self.transport = Transport(server)
        self.connection = Connection(front.door)
        self.connection.connection_made(self.transport)
        self._heard = b""

    def send(self, data: bytes) -> None:
        """The event loop reads this."""
        while data:
            buffer = memoryview(self.connection.get_buffer(-1))
            piece, data = data[: len(buffer)], data[len(buffer) :]
            buffer[: len(piece)] = piece
            self.connection.buffer_updated(len(piece))

    def leave(self) -> None:
        """The event loop sees that the client is gone."""
        self.transport.close()
        self.connection.connection_lost(None)

    def fill_socket(self) -> int:
        """Fill the socket, so that it takes no answer; how many bytes that took."""
        filled = 0
        while True:
            try:
                filled += self._ends[0].send(bytes(1 << 16))
            except BlockingIOError:
                return filled

    def empty_socket(self, filled: int) -> None:
        """Read what it was filled with."""
        while filled:
            filled -= len(self._end.recv(filled))

    def answers(self) -> list[tuple[int, dict[str, str], bytes]]:
        """Whole answers that came since the last call: status, headers and body."""
        try:
            while data := self._end.recv(1 << 20):
                self._heard += data
        except BlockingIOError:
            pass
        self._heard, self.transport.rest = self._heard + self.transport.rest, b""
        found = []
        while b"\r\n\r\n" in self._heard:
            head, _, rest = self._heard.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            nbytes = int(headers["content-length"])
            found.append((int(first.split()[1]), headers, rest[:nbytes]))
            self._heard = rest[nbytes:]
        return found

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The one answer there is."""
        (one,) = self.answers()
        return one

    def rows(self) -> list[float]:
        """The first output of the one answer."""
        status, _, body = self.answer()
        assert status == 200, body
        return json.loads(body)["outputs"][0]["data"]

    def error(self, status: int) -> str:
        """The text of the one answer, which is an error."""
        found, _, body = self.answer()
        assert found == status, body
        return json.loads(body)["error"]

    def close(self) -> None:
        for end in self._ends:
            end.close()


class CountingDoor(FrontDoor):
    """Counts what the kernel could not place by itself."""

    served = 0

    def serve(self, *args) -> None:
        self.served += 1
        super().serve(*args)


class Front:
    """A lane over a bench whose version is called m, and its clients."""

    def __init__(self, bench: Bench, stack: ExitStack, loop: Turns) -> None:
        self.bench, self.loop, self._stack = bench, loop, stack
        self.table = RouteTable()
        self.version = Version(
            "m", 1, bench.metrics, VersionState.READY, "", bench.signature, bench.dispatcher
        )
        self.table.models, self.table.routes = {"m": {1: self.version}}, {"m": ModelRoute.to(1)}
        self.guard = Guard()
        self.mirror = Mirror(OPTIONS.max_request_bytes)
        # Nothing is for aiohttp here.
        self.door = CountingDoor(self.table, None, {}, OPTIONS, self.mirror, self.guard)

    def add(self, **options) -> Bench:
        """Another version of the model, numbered on; its bench."""
        bench = Bench(**options)
        self._stack.callback(bench.close)
        number = len(self.table.models["m"]) + 1
        self.table.models["m"][number] = Version(
            "m", number, bench.metrics, VersionState.READY, "", bench.signature, bench.dispatcher
        )
        return bench

    def direct(self, route: ModelRoute) -> None:
        """The supervisor gives the model another route."""
        self.table.direct("m", route, {})
        self.door.forget_routes()

    def connect(self) -> Client:
        client = Client(self)
        self._stack.callback(client.close)
        return client

    def run(self, **how) -> list[int]:
        """Let the first worker run all there is; the rows of each batch."""
        self.loop.turn()
        sizes = self.bench.run_all(self.bench.workers[0], **how)
        self.loop.turn()
        return sizes

    def learn(self, *requests: bytes) -> None:
        """Have the kernel know requests like these by their skeleton."""
        client = self.connect()
        for request in requests:
            for _ in range(2):
                client.send(request)
                self.run()
                assert client.answer()[0] == 200
            served = self.door.served
            client.send(request)
            self.run()
            assert client.answer()[0] == 200
            assert self.door.served == served
        client.leave()

    def in_flight(self) -> int:
        return self.bench.dispatcher.intake.in_flight

    def counted(self) -> dict[str, int]:
        """How many requests ended in which way."""
        totals = self.bench.metrics.ledger.read().requests()
        return {"answered": totals.succeeded, "failed": totals.failed}

    def counted_as(self, code: int) -> int:
        """How many requests ended with this status."""
        return self.bench.metrics.ledger.read().requests().codes[CODES.index(code)]


@pytest.fixture
def make_front(monkeypatch):
    """Makes fronts with a bench each, of the given options."""
    loop = Turns()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    with ExitStack() as stack:

        def make(**options) -> Front:
            bench = Bench(**options)
            stack.callback(bench.close)
            return Front(bench, stack, loop)

        yield make


def post(body: bytes, path: str = "/v2/models/m/infer", **headers: str) -> bytes:
    """A plain request."""
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ask(*values: float, text: str = "", **fields: object) -> bytes:
    """A request in JSON, a row for each value; ``text`` stands for the numbers where it is given."""
    data = [v for value in values for v in (value, value + 0.5)]
    entry = {"name": "x", "datatype": "FP32", "shape": [len(values), 2], "data": data}
    body = json.dumps({"inputs": [entry], **fields})
    return post(body.replace(json.dumps(data), text or json.dumps(data)).encode())


def ask_raw(*values: float) -> bytes:
    """The same as a raw tensor, with an answer in JSON."""
    data = np.float32([v for value in values for v in (value, value + 0.5)])
    entry = {
        "name": "x",
        "datatype": "FP32",
        "shape": [len(values), 2],
        "parameters": {"binary_data_size": data.nbytes},
    }
    text = json.dumps({"inputs": [entry]}).encode()
    return post(text + data.tobytes(), inference_header_content_length=str(len(text)))


def doubled(*values: float) -> list[float]:
    return [v for value in values for v in (2 * value, 2 * value + 1)]


REQUESTS = [ask, ask_raw]


# Answers


@pytest.mark.parametrize("request_of", REQUESTS)
def test_requests_of_several_connections_share_a_batch(make_front, request_of):
    front = make_front()
    front.learn(request_of(1), request_of(1, 2))
    clients = [front.connect() for _ in range(3)]
    for number, client in enumerate(clients):
        client.send(request_of(*[10 * number, 7][: 1 + number % 2]))
    assert front.run() == [4]
    assert [client.rows() for client in clients] == [doubled(0), doubled(10, 7), doubled(20)]
    assert front.in_flight() == 0


def test_what_was_learned_and_what_was_not_share_a_batch(make_front):
    front = make_front()
    front.learn(ask(1))
    first, second = front.connect(), front.connect()
    first.send(ask(3))
    served = front.door.served
    second.send(ask(4, extra="new"))
    assert front.door.served == served + 1
    assert front.run() == [2]
    assert (first.rows(), second.rows()) == (doubled(3), doubled(4))


def test_each_request_has_its_own_id(make_front):
    front = make_front()
    front.learn(ask(1, id="one"))
    clients = [front.connect() for _ in range(4)]
    for number, client in enumerate(clients):
        client.send(ask(number, id="i" * 10 * number + "d"))
    front.run()
    for number, client in enumerate(clients):
        document = json.loads(client.answer()[2])
        assert document["id"] == "i" * 10 * number + "d"
        assert document["outputs"][0]["data"] == doubled(number)


def test_the_next_request_waits_for_the_answer(make_front):
    front = make_front()
    front.learn(ask(1))
    client = front.connect()
    client.send(ask(1) + ask(2) + ask(3)[:-4])
    assert front.run() == [1, 1]
    client.send(ask(3)[-4:])
    assert front.run() == [1]
    assert [json.loads(body)["outputs"][0]["data"] for _, _, body in client.answers()] == [
        doubled(1),
        doubled(2),
        doubled(3),
    ]


def test_nothing_is_read_from_whom_too_much_is_held(make_front):
    front = make_front()
    front.learn(ask(1))
    client = front.connect()
    client.send(ask(1))
    client.send(ask(2) * 1000)
    assert not client.transport.is_reading
    front.run()
    assert client.transport.is_reading
    assert len(client.answers()) == 1001


def test_a_request_is_not_begun_before_the_last_answer_is_taken(make_front):
    front = make_front()
    front.learn(ask(1))
    client = front.connect()
    client.send(ask(1) + ask(2))
    client.connection.pause_writing()
    assert front.run() == [1]
    client.send(ask(3))
    assert front.run() == []
    client.connection.resume_writing()
    assert front.run() == [1, 1]
    assert len(client.answers()) == 3


def test_answers_that_the_socket_does_not_take_are_not_overtaken(make_front):
    front = make_front()
    front.learn(ask(1))
    client = front.connect()
    filled = client.fill_socket()
    client.send(ask(5) + ask(6))
    front.run()
    assert client.transport.rest.startswith(b"HTTP/1.1 200 OK\r\n")
    client.empty_socket(filled)
    client.send(ask(7))  # there is room now, but not for this one
    front.run()
    found = [json.loads(body)["outputs"][0]["data"] for _, _, body in client.answers()]
    assert found == [doubled(5), doubled(6), doubled(7)]
    client.send(ask(8))
    front.run()
    assert client.transport.rest == b""
    assert client.rows() == doubled(8)


# The queue


@pytest.mark.parametrize("request_of", REQUESTS)
def test_a_full_queue_refuses_what_is_known_and_what_is_new(make_front, request_of):
    front = make_front(max_queue_size=3)
    front.learn(request_of(1))
    waiting = [front.connect() for _ in range(3)]
    for number, client in enumerate(waiting):
        client.send(request_of(number))
    for request in (request_of(9), ask(9, extra="new")):
        refused = front.connect()
        refused.send(request)
        status, headers, body = refused.answer()
        assert (status, headers["retry-after"], headers["x-error-code"]) == (429, "1", "queue_full")
        assert b"queue.max_size" in body
    assert front.run() == [3]
    assert [client.rows() for client in waiting] == [doubled(n) for n in range(3)]
    refused.send(request_of(9))  # on the same connection
    front.run()
    assert refused.rows() == doubled(9)


@pytest.mark.parametrize("request_of", REQUESTS)
def test_requests_that_queue_own_their_data(make_front, request_of):
    front = make_front()
    front.learn(request_of(1))
    clients = [front.connect() for _ in range(20)]  # two slots of four; the others wait
    for number, client in enumerate(clients):
        client.send(request_of(number))
    assert front.bench.dispatcher.waiting() == 20
    assert front.run() == [4] * 5
    assert [client.rows() for client in clients] == [doubled(n) for n in range(20)]


@pytest.mark.parametrize("position", [0, 5, 9])
def test_a_request_expires_in_its_slot_and_in_the_queue(make_front, position):
    front = make_front()
    late = {"parameters": {"timeout": FAR_US}}
    front.learn(ask(1), ask(1, **late))
    clients = [front.connect() for _ in range(10)]
    for number, client in enumerate(clients):
        client.send(ask(number, **(late if number == position else {})))
    front.bench.loop.fire()
    assert "time in the queue" in clients[position].error(504)
    assert sum(front.run()) == 9
    for number, client in enumerate(clients):
        assert number == position or client.rows() == doubled(number)
    assert front.in_flight() == 0


def test_a_request_that_a_worker_has_does_not_expire(make_front):
    front = make_front()
    late = {"parameters": {"timeout": FAR_US}}
    front.learn(ask(1, **late))
    client = front.connect()
    client.send(ask(5, **late))
    front.loop.turn()
    taken = front.bench.workers[0].seal()
    front.bench.loop.fire()
    assert client.answers() == []
    front.bench.workers[0].publish(taken)
    front.bench.deliver()
    assert client.rows() == doubled(5)


# Leaving


def test_who_leaves_before_the_seal_never_runs(make_front):
    front = make_front()
    front.learn(ask(1))
    clients = [front.connect() for _ in range(10)]
    for number, client in enumerate(clients):
        client.send(ask(number))
    before = front.counted()
    for number in (1, 4, 9):  # in an open slot, in a full one and in the queue
        clients[number].leave()
    assert sum(front.run()) == 7
    for number, client in enumerate(clients):
        if number not in (1, 4, 9):
            assert client.rows() == doubled(number)
    assert front.in_flight() == 0
    after = front.counted()
    assert after["failed"] == before["failed"] + 3
    assert front.counted_as(CLIENT_GONE) == 3


def test_who_leaves_while_it_runs_is_not_answered(make_front):
    front = make_front()
    front.learn(ask(1))
    gone, mate = front.connect(), front.connect()
    gone.send(ask(1))
    mate.send(ask(2))
    front.loop.turn()
    taken = front.bench.workers[0].seal()
    gone.leave()
    front.bench.workers[0].publish(taken)
    front.bench.deliver()
    assert gone.answers() == []
    assert mate.rows() == doubled(2)
    assert front.in_flight() == 0


def test_who_leaves_within_a_body_is_not_waited_for(make_front):
    front = make_front()
    client = front.connect()
    client.send(ask(1)[:-3])
    assert front.bench.dispatcher.intake.receiving == 1
    client.leave()
    assert front.bench.dispatcher.intake.receiving == 0


def test_who_leaves_after_the_answer_changes_nothing(make_front):
    front = make_front()
    front.learn(ask(1))
    client = front.connect()
    client.send(ask(1))
    front.run()
    assert client.rows() == doubled(1)
    before = front.counted()
    client.leave()
    assert front.counted() == before
    assert front.in_flight() == 0


def test_the_end_of_input_keeps_only_what_a_worker_has(make_front):
    front = make_front()
    front.learn(ask(1))
    early, late, idle = front.connect(), front.connect(), front.connect()
    early.send(ask(1))
    front.loop.turn()
    taken = front.bench.workers[0].seal()
    late.send(ask(2))
    assert early.connection.eof_received()
    assert not late.connection.eof_received()
    assert not idle.connection.eof_received()
    late.leave()
    front.bench.workers[0].publish(taken)
    front.bench.deliver()
    assert early.rows() == doubled(1)
    assert early.transport.is_closed
    assert front.run() == []


# Failures and deaths


@pytest.mark.parametrize("culprit", range(4))
def test_a_run_that_raises_fails_only_the_culprit(make_front, culprit):
    """The others are run again, each alone, from the copies that they were given."""
    front = make_front()
    front.learn(ask(1), ask_raw(1))
    clients = [front.connect() for _ in range(4)]
    for number, client in enumerate(clients):
        client.send((ask if number % 2 else ask_raw)(number))
    sizes = front.run(ok=lambda rows: culprit not in rows)
    assert sizes == [4, 1, 1, 1, 1]
    for number, client in enumerate(clients):
        if number == culprit:
            assert "the model failed on this request" in client.error(500)
        else:
            assert client.rows() == doubled(number)
    assert front.in_flight() == 0


def test_inputs_that_are_given_back_are_told_apart(make_front):
    front = make_front(signature=PAIR, model=lambda arrays: [arrays["x"], arrays["w"]])

    def both(number: float) -> bytes:
        raw = np.float32([number, number + 1]).tobytes()
        entries = [
            {"name": "w", "datatype": "FP32", "shape": [1, 2], "data": [-number, 0.25]},
            {
                "name": "x",
                "datatype": "FP32",
                "shape": [1, 2],
                "parameters": {"binary_data_size": 8},
            },
        ]
        text = json.dumps({"inputs": entries}).encode()
        return post(text + raw, inference_header_content_length=str(len(text)))

    front.learn(both(1))
    clients = [front.connect() for _ in range(11)]  # some in slots, some in the queue
    for number, client in enumerate(clients):
        client.send(both(number))
    front.run(ok=lambda rows: 2 not in rows)
    for number, client in enumerate(clients):
        if number == 2:
            client.error(500)
            continue
        outputs = json.loads(client.answer()[2])["outputs"]
        assert outputs[0]["data"] == [number, number + 1]
        assert outputs[1]["data"] == [-number, 0.25]


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_batch_whose_workers_die_is_answered_by_another(make_front, deaths):
    front = make_front(workers=deaths)
    front.learn(ask(1), ask_raw(1))
    clients = [front.connect() for _ in range(3)]
    for number, client in enumerate(clients):
        client.send((ask if number % 2 else ask_raw)(number))
    front.loop.turn()
    for worker in front.bench.workers[:deaths]:
        assert worker.seal().rows == 3
        front.bench.dispatcher.worker_died(worker.incarnation)
        front.bench.dispatcher.worker_exited(worker.incarnation, KILL, False)
    sizes = front.bench.run_all(front.bench.hire())
    assert sizes == ([3] if deaths == 1 else [1, 1, 1])
    assert [client.rows() for client in clients] == [doubled(n) for n in range(3)]


def test_a_version_that_goes_answers_everybody(make_front):
    front = make_front()
    front.learn(ask(1))
    clients = [front.connect() for _ in range(12)]
    for number, client in enumerate(clients):
        client.send(ask(number))
    uploading = front.connect()
    uploading.send(ask(1)[:-3])
    front.version.state, front.version.dispatcher = VersionState.UNLOADED, None
    front.bench.dispatcher.fail_all(front.version.refusal())
    front.bench.dispatcher.close()
    uploading.send(ask(1)[-3:])
    for client in [*clients, uploading]:
        assert "unloaded" in client.error(503)
    assert front.in_flight() == 0
    front.door.forget_routes()


def test_a_version_that_goes_takes_nothing_that_was_pipelined(make_front):
    front = make_front()
    front.learn(ask(1))
    clients = [front.connect() for _ in range(3)]
    for client in clients:
        client.send(ask(1) + ask(2))
    front.bench.dispatcher.fail_all(front.version.refusal())
    front.bench.dispatcher.close()
    front.loop.turn()
    for client in clients:
        assert [status for status, *_ in client.answers()] == [503, 503]
    assert front.in_flight() == 0


def test_what_follows_a_request_cannot_keep_its_mates_answers_back(make_front, monkeypatch):
    front = make_front()
    front.learn(ask(1))
    first, *others = [front.connect() for _ in range(3)]
    monkeypatch.setattr(front.door, "step_aside", lambda _connection: 1 / 0)
    first.send(ask(1) + b"GET / HTTP/1.1\r\n\r\n")
    for client in others:
        client.send(ask(2))
    assert front.run() == [3]
    assert first.rows() == doubled(1)
    for client in others:
        assert client.rows() == doubled(2)
    assert front.in_flight() == 0


# What a template does not cover

BAD = [
    "[1, 1e39]", "[1, 1e400]", "[1, null]", "[1, true]", '[1, "a"]', "[1, {}]", "[1,]", "[1]", "[1, 2, 3]",
    "[1 2]", "[01, 2]", "[1., 2]", "[+1, 2]", "[0x1, 2]", "[1, --2]", "[[1, 2]", "[1, 2]]", "[,1]", "[]", "1",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_numbers_that_do_not_decode_get_the_general_parsers_words(make_front, text):
    front = make_front()
    other = front.connect()
    other.send(ask(1, text=text))
    wanted = other.answer()
    assert wanted[0] == 400
    front.learn(ask(1))
    client = front.connect()
    client.send(ask(1, text=text))
    status, headers, body = client.answer()
    assert (status, body) == (wanted[0], wanted[2])
    assert headers["x-error-code"] == wanted[1]["x-error-code"]
    client.send(ask(4))  # the connection is as good as before
    front.run()
    assert client.rows() == doubled(4)
    assert front.in_flight() == 0


@pytest.mark.parametrize("place", ["an open slot", "the queue"])
def test_numbers_that_do_not_decode_are_refused_wherever_they_would_go(make_front, place):
    front = make_front()
    front.learn(ask(1))
    others = [front.connect() for _ in range(2 if place == "an open slot" else 10)]
    for number, client in enumerate(others):
        client.send(ask(number))
    refused = front.connect()
    refused.send(ask(1, text="[1, 1e39]"))
    assert "input 'x'" in refused.error(400)
    front.run()
    assert [client.rows() for client in others] == [doubled(n) for n in range(len(others))]


def test_the_state_of_a_request_follows_its_answer(make_front):
    front = make_front()
    front.learn(ask(1))
    client = front.connect()
    client.send(ask(1))
    (lane,) = front.bench.lanes
    (request,) = [each for slot in lane.slots for each in slot.requests]
    assert request.state is State.PLACED
    front.run()
    assert request.state is State.ENDED


def test_another_target_on_the_same_connection_is_another_route(make_front):
    front = make_front()
    other = dataclasses.replace(front.version, number=2)
    front.table.models["m"][2] = other
    front.learn(ask(1))
    client = front.connect()
    for path, version in (("", "1"), ("/versions/2", "2"), ("/versions/1", "1"), ("", "1")) * 2:
        client.send(ask(1).replace(b"/m/infer", f"/m{path}/infer".encode()))
        front.run()
        status, headers, _ = client.answer()
        assert (status, headers["x-model-version"]) == (200, version)
    front.direct(ModelRoute.to(2))
    client.send(ask(1))
    front.run()
    assert client.answer()[1]["x-model-version"] == "2"


# Routes that differ by request

TO_2 = ModelRoute(ModelRoute.to(1).shares, pins=(Pin("x-to", "2", 2),))
"""Everything goes to version 1 but what is pinned to version 2."""


def tripled(arrays):
    return [3 * arrays["x"]]


def pinned(request: bytes, value: str = "2") -> bytes:
    """The same request with a header."""
    return request.replace(b"\r\n", f"\r\nX-To: {value}\r\n".encode(), 1)


@pytest.mark.parametrize("request_of", REQUESTS)
def test_what_one_version_taught_is_not_used_for_another(make_front, request_of):
    front = make_front()
    other = front.add(model=tripled)
    front.direct(TO_2)
    client = front.connect()
    for round_number in range(4):
        served = front.door.served
        for request, times in ((request_of(5), 2), (pinned(request_of(5)), 3)):
            for _ in range(2):
                client.send(request)
                front.run()
                other.run_all(other.workers[0])
                front.bench.deliver()
                assert client.rows() == [5.0 * times, 5.5 * times]
        assert (front.door.served == served) == (round_number > 0)  # both are known by then


def test_a_plain_route_asks_nobody(make_front):
    front = make_front()
    front.add()
    targets = (b"/v2/models/m/infer", b"/v1/models/m:predict", b"/v2/models/m/versions/2/infer")
    assert {type(front.door.resolve(target)) for target in targets} == {Route}
    front.direct(TO_2)
    assert [type(front.door.resolve(target)) for target in targets] == [Fork, Fork, Route]


def test_a_version_without_workers_is_stood_in_for(make_front):
    front = make_front()
    front.add(workers=0)
    front.direct(TO_2)
    client = front.connect()
    client.send(pinned(ask(1)))
    front.run()
    status, headers, _ = client.answer()
    assert (status, headers["x-model-version"]) == (200, "1")


def test_a_slice_is_counted_by_itself(make_front):
    front = make_front()
    client = front.connect()
    for is_slice in (True, False, True):
        front.direct(ModelRoute((Share(1, 9999, is_slice), Share(1, 1))))
        for _ in range(3):  # of the general parsers' and of the kernel's
            client.send(ask(1))
            front.run()
            assert client.answer()[0] == 200
    snapshot = front.bench.metrics.ledger.read()
    assert 4 <= snapshot.slices().succeeded <= 6  # one in 10,000 goes to the other share
    assert snapshot.requests().succeeded == 9


# Keys


class Refused(Exception):
    """A request went to aiohttp, which would refuse it."""


def test_without_a_key_aiohttp_is_to_refuse(make_front, monkeypatch):
    front = make_front()
    front.learn(ask(1))
    _, text = make_key()
    secret = bytes(range(32))
    key = {"digest": key_digest(secret, text), "role": "infer", "models": ["m"], "expires_s": None}
    front.guard.update(required=True, secret=secret, keys=[key])
    front.door.forget_routes()

    def step_aside(_connection):
        raise Refused

    monkeypatch.setattr(front.door, "step_aside", step_aside, raising=False)
    client = front.connect()
    _, _, body = ask(1).partition(b"\r\n\r\n")
    for _ in range(3):
        client.send(post(body, authorization=f"Bearer {text}"))
        front.run()
        assert client.rows() == doubled(1)
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": text}):
        with pytest.raises(Refused):
            front.connect().send(post(body, **headers))
    front.guard.update(required=False, secret=b"", keys=[])
    front.door.forget_routes()
    client.send(ask(1))
    front.run()
    assert client.rows() == doubled(1)


def test_what_a_connection_tells_of_a_request_is_gone_with_it(make_front):
    front = make_front()
    client = front.connect()
    client.send(pinned(ask(1)))
    assert client.connection.header("x-to") is None
