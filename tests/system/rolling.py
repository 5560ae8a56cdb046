"""What the tests of rollouts share: good and bad versions of a model, a steady load, the admin API's client.

The model doubles four numbers, and takes a while for it. What a bad version does wrong depends on the first
of them, so that its client decides how often that happens, and no made-up input of a warm-up meets it.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
import requests
import xxhash
from onnx import numpy_helper

from gateway.store.store import Store
from tests.system.server import Server, wait_gone
from tests.zoo.building import parse

MODEL = "m"

WIDTH, LAYERS = 256, 24
"""Of the products that take the time: a fraction of a millisecond."""

USUAL, ODD = 1000, 2000
"""What the first number of every request is above, and of the odd ones, one in twenty."""

ODD_PART = 0.05

DEADLINE_S = 40
"""After this long what is waited for counts as never coming."""

ENDS = ("SUCCEEDED", "ABORTED", "FAILED")

_ABOVE = (
    "first = Slice (x, zero, one, one)  far = Greater (first, above)  bad = Cast <to = 7> (far)  "
)
_CONSTANTS = "int64[1] zero = {0}, int64[1] one = {1}"

_KINDS: Mapping[str, tuple[str, str]] = {
    "good": ("", "y = Add (doubled, nothing)"),
    "wrong": ("", "negative = Neg (doubled)  y = Add (negative, nothing)"),
    # An index of a million in a table of two.
    "failing": (
        ", float[2] table = {0, 0}, int64 million = {1000000}",
        f"{_ABOVE} index = Mul (bad, million)  none = Gather (table, index)  "
        "all = Add (doubled, nothing)  flat = Reshape (none, column)  y = Add (all, flat)",
    ),
    # The lowest whole number by -1: the processor ends the process.
    "crashing": (
        ", int64 lowest = {-9223372036854775808}, int64 minus = {-1}",
        f"{_ABOVE} low = Mul (bad, lowest)  whole = Div (low, minus)  part = Mul (whole, bad)  "
        "kept = Cast <to = 1> (part)  rest = Mul (kept, nil)  all = Add (doubled, nothing)  "
        "y = Add (all, rest)",
    ),
    "hanging": (
        ", bool true = {1}",
        "endless = Loop (, true, doubled) <body = step (int64 i, bool on, float[n, 4] had) => "
        "(bool more, float[n, 4] now) { more = Identity (true)  now = Neg (had) }>  "
        "y = Add (endless, nothing)",
    ),
}
"""Of each kind: initializers of its own, and how it comes to its outputs."""

BROKEN = "broken"
"""A kind that is no model at all."""


def version_bytes(kind: str, number: int, above: float = ODD, layers: int = LAYERS) -> bytes:
    """The file of a version; the same kind with another number has the same outputs and other bytes.

    Args:
        kind: ``good``, ``wrong``, ``failing``, ``crashing``, ``hanging`` or ``broken``.
        number: of the version.
        above: of the failing and the crashing, what the first number is above where they do so.
        layers: products of matrices, each of which takes as long.
    """
    if kind == BROKEN:
        return b"no model at all, the %dth" % number
    constants, ending = _KINDS[kind]
    steps = "  ".join(f"h{i + 1} = MatMul (h{i}, w)" for i in range(layers))
    model = parse(
        f"(float[n, 4] x) => (float[n, 4] y) <{_CONSTANTS}, int64[2] column = {{-1, 1}}, "
        f"float two = {{2}}, float nil = {{0}}, float above = {{{above}}}, "
        f"int64[1] wide = {{{WIDTH // 4}}}, int64[1] rows = {{1}}{constants}> {{ "
        "doubled = Mul (x, two)  times = Concat <axis = 0> (rows, wide)  h0 = Tile (x, times)  "
        f"{steps}  mean = ReduceMean <keepdims = 1> (h{layers}, one)  nothing = Mul (mean, nil)  "
        f"{ending} }}"
    )
    weights = np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    model.doc_string = f"version {number}"
    return model.SerializeToString()


def make_repository(folder: Path, config: str = "", layers: int = LAYERS) -> Path:
    """A repository in which the model has version 1, a good one."""
    place = folder / "repository" / MODEL / "1"
    place.mkdir(parents=True)
    (place / "model.onnx").write_bytes(version_bytes("good", 1, layers=layers))
    if config:
        (place.parent / "config.yaml").write_text(config)
    return folder / "repository"


# The admin API


class Admin:
    """The admin port's client: answers' documents, AssertionError for a status that was not expected."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/admin/v1"
        self._session = requests.Session()
        self._session.trust_env = False

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def ask(self, method: str, path: str, status: int = 200, **given: object) -> dict:
        """One exchange; ``match`` is If-Match."""
        headers = {"If-Match": str(given.pop("match", "*"))}
        if isinstance(given.get("data"), bytes):
            headers["Content-Type"] = "application/octet-stream"
        answer = self._session.request(
            method, self._url + path, headers=headers, timeout=DEADLINE_S, **given
        )
        assert answer.status_code == status, f"{answer.status_code}: {answer.text[:500]}"
        return answer.json() if answer.content else {}

    def register(self, kind: str, number: int, above: float = ODD, layers: int = LAYERS) -> None:
        """Make a version of a kind."""
        body = version_bytes(kind, number, above, layers)
        self.ask("PUT", f"/models/{MODEL}/versions/{number}", 201, data=body)

    def start(self, spec: Mapping[str, object], status: int = 201) -> dict:
        """Begin a rollout."""
        return self.ask("POST", f"/models/{MODEL}/rollouts", status, json=spec)

    def rollout(self, identity: str) -> dict:
        """One."""
        return self.ask("GET", f"/models/{MODEL}/rollouts/{identity}")

    def command(self, identity: str, verb: str, status: int = 200, **given: object) -> dict:
        """Carry out a verb, which may have a query."""
        name, _, query = verb.partition("?")
        path = f"/models/{MODEL}/rollouts/{identity}:{name}" + (f"?{query}" if query else "")
        return self.ask("POST", path, status, **given)

    def wait(
        self, identity: str, until: Callable[[dict], bool], deadline_s: float = DEADLINE_S
    ) -> dict:
        """The rollout once that is so."""
        deadline = time.monotonic() + deadline_s
        while not until(rollout := self.rollout(identity)):
            shown = {k: rollout[k] for k in ("state", "step", "answered", "failed", "reason")}
            texts = [verdict["text"] for verdict in rollout["verdicts"].values()]
            assert time.monotonic() < deadline, f"still {shown}: {texts}"
            time.sleep(0.02)
        return rollout

    def wait_end(self, identity: str, deadline_s: float = DEADLINE_S) -> dict:
        """The rollout once it has ended."""
        return self.wait(identity, lambda rollout: rollout["state"] in ENDS, deadline_s)

    def events(self, identity: str) -> list[dict]:
        """All of a rollout."""
        return self.ask("GET", f"/events?rollout={identity}&limit=1000")["events"]


# The load


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's end. ``status`` is 0 where the connection failed, ``version`` where none is named."""

    sent_s: float
    answered_s: float
    key: str | None
    status: int
    version: int
    is_right: bool


@dataclass
class Load:
    """A steady load in a thread of its own; within the context.

    Requests are sent when they are due, whatever became of those before: late ones follow at once.

    Attributes:
        url: of the data port.
        rate: requests a second; None: as many as there can be.
        connections: over which they are spread in turn.
        keys: of requests, drawn by lot; empty: they have none.
        most: requests after which it ends; None: with the context.
        headers: of every request.
        answers: so far, in the order of their ends.
    """

    url: str
    rate: float | None = 500.0
    connections: int = 16
    keys: tuple[str, ...] = ()
    most: int | None = None
    headers: str = ""
    answers: list[Answer] = field(default_factory=list)
    _is_ending: bool = False
    _sent: int = 0

    def __enter__(self) -> Load:
        self._chance = random.Random(self.url)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        self._thread.join()

    def wait(self) -> None:
        """Until ``most`` requests are answered."""
        self._thread.join()

    async def _run(self) -> None:
        begun = time.monotonic()
        await asyncio.gather(*(self._send(begun, i) for i in range(self.connections)))

    async def _send(self, begun: float, connection: int) -> None:
        """What one connection does."""
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        number = connection
        while not self._is_ending and (self.most is None or self._sent < self.most):
            self._sent += 1
            if self.rate is not None:
                await asyncio.sleep(max(0.0, begun + number / self.rate - time.monotonic()))
            number += self.connections
            values = [round(self._chance.uniform(0.01, 0.99), 2) for _ in range(4)]
            values[0] += ODD if self._chance.random() < ODD_PART else USUAL
            key = self._chance.choice(self.keys) if self.keys else None
            sent_s, status, version, is_right = time.time(), 0, 0, False
            try:
                if streams is None:
                    host, _, port = self.url.removeprefix("http://").rpartition(":")
                    streams = await asyncio.open_connection(host, int(port))
                streams[1].write(self._request(values, key))
                status, version, body = await _answer(streams[0])
                is_right = status == 200 and _is_right(body, values)
            except (OSError, asyncio.IncompleteReadError):
                if streams is not None:
                    streams[1].close()
                streams = None
            self.answers.append(Answer(sent_s, time.time(), key, status, version, is_right))
        if streams is not None:
            streams[1].close()

    def _request(self, values: list[float], key: str | None) -> bytes:
        body = orjson.dumps(
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": values}]}
        )
        keyed = f"X-User: {key}\r\n" if key is not None else ""
        return (
            f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: gateway\r\n{self.headers}{keyed}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body


async def _answer(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """Status, version and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    body = await reader.readexactly(int(fields["content-length"]))
    return int(head.split(" ", 2)[1]), int(fields.get("x-model-version", "0")), body


def _is_right(body: bytes, values: list[float]) -> bool:
    data = orjson.loads(body)["outputs"][0]["data"]
    return bool(np.array_equal(np.float32(data), np.float32(values) * np.float32(2)))


# What must hold of answers


@dataclass(frozen=True)
class Exposure:
    """How many requests a canary answered, and how many of its weights' worth it may have.

    ``most`` is four standard deviations above the expectation.
    """

    answered: int
    expected: float
    most: float


def exposure(answers: Iterable[Answer], rollout: Mapping, events: Iterable[Mapping]) -> Exposure:
    """What a rollout exposed clients to: of each request, the greatest weight while it was under way.

    A step's weight holds from the moment that it is decided to the end of the rollout or the next step.
    """
    changes = [(0.0, 0.0)]
    for event in events:
        if event["kind"] == "rollout.step":
            changes.append((event["at_s"], event["numbers"]["to_weight_bp"] / 10_000))
        elif event["kind"] in ("rollout.promoting", "rollout.succeeded"):
            changes.append((event["at_s"], 1.0))
        elif event["kind"] in ("rollout.aborted", "rollout.failed"):
            changes.append((event["at_s"], 0.0))
    canary, answered, expected, variance = rollout["spec"]["canary"], 0, 0.0, 0.0
    for answer in answers:
        weight = _weight_between(changes, answer.sent_s, answer.answered_s)
        answered += answer.version == canary
        expected += weight
        variance += weight * (1 - weight)
    return Exposure(answered, expected, expected + 4 * math.sqrt(variance))


def _weight_between(changes: list[tuple[float, float]], begin_s: float, end_s: float) -> float:
    at_begin = next(weight for at_s, weight in reversed(changes) if at_s <= begin_s)
    return max([at_begin, *(weight for at_s, weight in changes if begin_s < at_s <= end_s)])


def failures(answers: list[Answer], version: int = -1) -> list[Answer]:
    """Answers that are not right, but for those of one version."""
    return [answer for answer in answers if not answer.is_right and answer.version != version]


def bucket(salt: str, key: str) -> int:
    """The bucket of a key, by the published rule."""
    return xxhash.xxh3_64_intdigest(salt.encode() + b"\0" + key.encode()) % 10_000


# Kills


KEYS = tuple(f"user-{i}" for i in range(400))
"""Of the requests that say whether a route is as the store has it."""


def start_again(repository: Path, **env: str) -> Server:
    """A server of two front ends that end with it, however it ends."""
    return Server(repository, "--frontends", "2", GATEWAY_ORPHAN_GRACE_S="0", **env)


def check_resumed(before: dict, route: dict, server: Server, admin: Admin, identity: str) -> None:
    """A server has taken up a rollout as the store had it, and its answers say the same."""
    after = admin.rollout(identity)
    stable, canary = after["spec"]["stable"], after["spec"]["canary"]
    deadline = time.monotonic() + DEADLINE_S
    while admin.ask("GET", f"/models/{MODEL}/versions/{canary}")["state"] != "READY":
        assert time.monotonic() < deadline, "the canary is not loaded again"
        time.sleep(0.02)
    if before["state"] == "STEPPING":
        assert after == before
        assert admin.ask("GET", f"/models/{MODEL}")["route"] == route
    else:
        assert (after["id"], after["attempt"]) == (before["id"], before["attempt"])
    with Load(server.url, keys=KEYS, most=100) as load:
        load.wait()
    assert not failures(load.answers)
    first, last = (weight_of(rollout) for rollout in (after, admin.rollout(identity)))
    for answer in load.answers:
        at = bucket(after["salt"], answer.key)
        assert answer.version == canary if at < first else answer.version == stable or at < last, (
            answer
        )


def weight_of(rollout: dict) -> int:
    """The weight of a canary, at least that which is decided."""
    match rollout["state"]:
        case "STEPPING":
            return rollout["spec"]["steps"][rollout["step"]]["weight_bp"]
        case "PROMOTING" | "SUCCEEDED":
            return 10_000
    return 0


def kill_all(server: Server) -> None:
    """SIGKILL for the supervisor; until front ends and workers have followed it."""
    children = [*server.frontends(), *server.workers()]
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    for pid in children:
        wait_gone(pid)


def stored(repository: Path, identity: str) -> tuple[dict, dict]:
    """A rollout's document and its model's route, as a store that nobody has open has them."""
    store = Store(f"sqlite:///{repository / '.gateway' / 'state.db'}")
    store.open()
    try:
        rollout = store.rollout(identity)
        model = next(record for record in store.models() if record.name == MODEL)
    finally:
        store.close()
    return dict(rollout.document), dict(model.route)


def is_whole(repository: Path) -> bool:
    """Whether the database has no damage."""
    with closing(sqlite3.connect(repository / ".gateway" / "state.db")) as connection:
        return connection.execute("pragma integrity_check").fetchone() == ("ok",)
