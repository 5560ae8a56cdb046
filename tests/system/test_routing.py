"""A front end whose supervisor and workers are the test's: routes, labels, copies and keys, in both lanes.

The process is the real one. What the supervisor would say is said by hand, and what workers would run is run
between a request and its answer, so that every number is known.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from gateway._kernels import ring
from gateway.control.process import start_process
from gateway.security.keys import key_digest, make_key
from gateway.serving import memory
from gateway.serving.channel import Channel
from gateway.serving.routing import BASIS_POINTS, ModelRoute, Pin, Shadow, Share, Sticky
from gateway.telemetry.ledger import Ledger, board_bytes
from tests.system.clients import DEADLINE_S, Answer, Wire, message
from tests.unit.test_dispatcher import SIGNATURE, Worker, double
from tests.unit.test_fastlane import OPTIONS, tripled

SECRET = bytes(range(32))

BODY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [3, 4]}]}
).encode()

INFER, PREDICT = "/v2/models/m/infer", "/v1/models/m:predict"

BODIES = {INFER: BODY, PREDICT: b'{"instances":[[3,4]]}'}


class PlayedVersion:
    """A version with one worker, both in the test's hands."""

    def __init__(self, stack: ExitStack, number: int, model) -> None:
        self.number = number
        self.board_fd = memory.create("board", board_bytes(1, 1))
        stack.callback(os.close, self.board_fd)
        self.ledger = Ledger.mapped(self.board_fd, 1)
        board = memory.map_writable(self.board_fd, ring.board_bytes(1))
        bench = SimpleNamespace(signature=SIGNATURE, model=model, board=board)
        self.worker = Worker(bench, 0, 1)
        stack.callback(self.worker.close)

    def run(self) -> None:
        """Let the worker run what there is."""
        while (taken := self.worker.seal()) is not None:
            self.worker.publish(taken)

    def counted(self) -> dict[str, int]:
        """What its ledger has, as far as it is not 0."""
        snapshot = self.ledger.read()
        totals = snapshot.requests()
        names = ("compared", "agreed", "shadow_dropped", "shadow_failed", "succeeded", "failed")
        found = {name: getattr(totals, name) for name in names}
        found["sliced"] = snapshot.slices().succeeded
        return {name: count for name, count in found.items() if count}


class PlayedServer:
    """A front end with two versions of the model m, of which the second triples where the first doubles."""

    def __init__(self, stack: ExitStack, *, fast_lane: bool) -> None:
        self._stack = stack
        self.channel, theirs = Channel.pair()
        stack.callback(self.channel.close)
        data, metrics = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        self.port = data.getsockname()[1]
        process = start_process("gateway.frontend.server", theirs.fileno(), [])
        stack.callback(process.wait, DEADLINE_S)
        stack.callback(process.kill)
        theirs.close()
        options = dataclasses.replace(
            OPTIONS, frontends=1, fast_lane=fast_lane, drain_timeout_s=2 * DEADLINE_S
        )
        fds = [data.fileno(), metrics.fileno()]
        self.channel.send("configure", fds, options=options.to_wire())
        data.close()
        metrics.close()
        self.versions = {n: PlayedVersion(stack, n, f) for n, f in ((1, double), (2, tripled))}
        for version in self.versions.values():
            self._introduce(version)
        self.direct(ModelRoute.to(1))
        self.keys()
        self.channel.send("started", is_started=True)
        self.expect("serving")

    def _introduce(self, version: PlayedVersion) -> None:
        self.tell_state(
            version,
            "READY",
            [version.board_fd],
            seats=1,
            signature=SIGNATURE.to_wire(),
            config={"max_queue_delay_us": 0, "instances": [("cpu", 1)], "version_policy": {}},
            max_queue_size=100,
            queue_timeout_ns=0,
            priority_levels=0,
            default_level=1,
            slo_ns=0,
        )
        pidfd = os.pidfd_open(os.getpid())
        self.channel.send(
            "worker_up",
            [pidfd, version.worker.theirs.fileno()],
            model="m",
            version=version.number,
            incarnation=1,
            instance=0,
        )
        os.close(pidfd)
        version.worker.theirs.close()

    def tell_state(self, version: PlayedVersion, state: str, fds=(), **fields: object) -> None:
        self.channel.send(
            "version", fds, model="m", version=version.number, state=state, reason="", **fields
        )

    def direct(self, route: ModelRoute | None, **labels: int) -> None:
        """Give the model a route and labels."""
        wire = None if route is None else route.to_wire()
        self.channel.send("route", model="m", route=wire, labels=labels)
        self._settle()

    def keys(self, *keys: dict[str, object], required: bool = False) -> None:
        self.channel.send("keys", required=required, secret=SECRET, keys=list(keys))
        self._settle()

    def _settle(self) -> None:
        self.channel.send("sync", number=1)
        self.expect("synced")

    def expect(self, op: str) -> None:
        """Wait for the front end to say this next."""
        assert select.select([self.channel], [], [], DEADLINE_S)[0], f"no {op}"
        received = self.channel.receive()
        assert received is not None
        assert received[0]["op"] == op

    def connect(self) -> Wire:
        return self._stack.enter_context(Wire(self.port))

    def ask(self, wire: Wire, data: bytes, *, without: int = 0) -> Answer:
        """The answer to a request; the worker of version ``without`` takes no part."""
        wire.send(data)
        deadline = time.monotonic() + DEADLINE_S
        while not select.select([wire.socket], [], [], 0.001)[0]:
            self.run(without=without)
            assert time.monotonic() < deadline
        return wire.receive()

    def run(self, *, without: int = 0) -> None:
        for version in self.versions.values():
            if version.number != without:
                version.run()

    def run_copies(self, count: int) -> None:
        """Let copies run until so many were compared."""
        deadline = time.monotonic() + DEADLINE_S
        while self.versions[2].counted().get("compared", 0) < count:
            self.run()
            assert time.monotonic() < deadline


@pytest.fixture(params=[True, False], ids=["fast", "aiohttp"])
def server(request) -> Iterator[PlayedServer]:
    with ExitStack() as stack:
        yield PlayedServer(stack, fast_lane=request.param)


def post(path: str, **headers: str) -> bytes:
    return message("POST", path, BODIES.get(path, BODY), **headers)


def version_of(answer: Answer) -> int:
    """The version that answered, which its outputs confirm."""
    status, headers, body = answer
    assert status == 200, body
    number = int(headers["x-model-version"])
    document = json.loads(body)
    outputs = (
        document["outputs"][0]["data"] if "outputs" in document else document["predictions"][0]
    )
    assert outputs == [3 * (number + 1), 4 * (number + 1)]
    return number


class User:
    """A caller with one header."""

    def __init__(self, name: str) -> None:
        self._name = name

    def header(self, name: str) -> str | None:
        return self._name if name == "x-user" else None

    def address(self) -> str:
        return "127.0.0.1"


def test_who_has_a_key_gets_the_same_version_of_every_lane(server):
    shares = (Share(2, 5000), Share(1, 5000))
    sticky = Sticky("header", "x-user")
    route = ModelRoute(shares, "salt", sticky, (Pin("x-go", "canary", 2),))
    server.direct(route)
    wire = server.connect()
    users = [f"user-{i}" for i in range(24)]
    expected = [route.choose(User(user)).version for user in users]
    assert set(expected) == {1, 2}
    for path in (INFER, PREDICT) * 2:
        answers = [server.ask(wire, post(path, X_USER=user)) for user in users]
        assert [version_of(answer) for answer in answers] == expected
    for user in users[:4]:
        assert version_of(server.ask(wire, post(INFER, x_user=user, x_go="canary"))) == 2
        assert version_of(server.ask(wire, post("/v2/models/m/versions/1/infer", x_user=user))) == 1
    for kind, header in (("ip", {}), ("cookie", {"cookie": "a=b; user=c"})):
        route = ModelRoute(shares, "salt", Sticky(kind, "user"))
        server.direct(route)
        assert len({version_of(server.ask(wire, post(INFER, **header))) for _ in range(8)}) == 1


def test_labels_and_the_list_of_models(server):
    wire = server.connect()
    labelled = "/v1/models/m/labels/next:predict"
    data = message("POST", labelled, BODIES[PREDICT])
    assert server.ask(wire, data)[0] == 404
    server.direct(ModelRoute.to(1), next=2)
    for _ in range(4):
        assert version_of(server.ask(wire, data)) == 2
        assert version_of(server.ask(wire, post(PREDICT))) == 1
    status, _, body = server.ask(wire, message("GET", "/v1/models/m/labels/next"))
    assert (status, json.loads(body)["model_version_status"][0]["version"]) == (200, "2")
    status, _, body = server.ask(wire, message("GET", "/v1/models"))
    (model,) = json.loads(body)["models"]
    assert (status, model.keys()) == (200, {"name", "model_version_status"})
    assert [each["version"] for each in model["model_version_status"]] == ["2", "1"]
    server.direct(None)
    assert server.ask(wire, post(INFER))[0] == 503
    assert server.ask(wire, data)[0] == 404


def test_copies_and_slices_are_counted_where_they_belong(server):
    shares = (Share(1, BASIS_POINTS - 1, is_slice=True), Share(1, 1))
    server.direct(ModelRoute(shares, shadow=Shadow(2, BASIS_POINTS, "cosine", 0.01)))
    wire = server.connect()
    for _ in range(4):
        for path in (INFER, PREDICT):
            assert version_of(server.ask(wire, post(path), without=2)) == 1
    server.run_copies(8)
    assert server.versions[2].counted() == {"compared": 8, "agreed": 8}
    counted = server.versions[1].counted()
    assert counted["succeeded"] == 8
    assert counted["sliced"] >= 7  # the other share has one in 10,000
    server.direct(ModelRoute((Share(1, BASIS_POINTS),), shadow=Shadow(2, BASIS_POINTS)))
    server.ask(wire, post(INFER), without=2)
    server.run_copies(9)
    assert server.versions[2].counted() == {"compared": 9, "agreed": 8}


def test_an_unload_does_not_wait_for_copies(server):
    server.direct(ModelRoute((Share(1, BASIS_POINTS),), shadow=Shadow(2, BASIS_POINTS)))
    wire = server.connect()
    assert version_of(server.ask(wire, post(INFER), without=2)) == 1
    server.tell_state(server.versions[2], "UNLOADING")
    server.expect("drained")  # long before the drain timeout
    assert server.versions[2].counted() == {"shadow_dropped": 1}
    assert version_of(server.ask(wire, post(INFER))) == 1


def test_keys(server):
    _, text = make_key()
    _, other = make_key()
    entry = {"role": "infer", "name": "k", "expires_s": None}
    server.keys(
        {**entry, "digest": key_digest(SECRET, text), "models": ["m"]},
        {**entry, "digest": key_digest(SECRET, other), "models": ["n"]},
        required=True,
    )
    wire = server.connect()
    for path in (INFER, PREDICT):
        for verb in ("POST", "GET"):  # access comes before everything else
            for authorization in ({}, {"authorization": "Bearer x"}):
                data = message(verb, path, BODIES[path] if verb == "POST" else b"", **authorization)
                status, headers, body = server.ask(wire, data)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert headers["x-error-code"] == "unauthorized"
                assert "API key" in json.loads(body)["error"]
        for _ in range(3):
            assert version_of(server.ask(wire, post(path, authorization=f"Bearer {text}"))) == 1
        assert server.ask(wire, post(path, authorization=f"Bearer {other}"))[0] == 403
    unknown = "/v2/models/%6d/infer", "/v2/models/nobody/infer", "/v1/models/m/versions/9:predict"
    for path in unknown:
        assert server.ask(wire, post(path))[0] == 401
    for path in ("/v2", "/readyz", "/metrics", "/v2/models/m", "/v1/models", "/v1/models/m"):
        assert server.ask(wire, message("GET", path))[0] == 200
    load = message("POST", "/v2/repository/models/m/load", authorization=f"Bearer {text}")
    status, _, body = server.ask(wire, load)
    assert (status, "role" in json.loads(body)["error"]) == (403, True)
    server.keys()
    assert version_of(server.ask(wire, post(INFER))) == 1
