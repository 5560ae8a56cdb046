"""A thousand clients at once, a tenth of which go away: every answer is its asker's own.

With requests of every size from 1 to 64 rows, and under several limits on the batch size with requests of
every size that fits mixed. The clients are plain sockets, so that they can leave in the middle of anything.
"""

from __future__ import annotations

import asyncio
import enum
import json
import random
import shutil
from contextlib import ExitStack

import msgpack
import numpy as np
import orjson
import pytest

from tests.system import clients
from tests.system.server import LANES, Server

LIMITS = (1, 2, 3, 5, 7, 16, 33, 64)
ANY_SIZE = "echo-any"
CLIENTS = 1000
LEAVING = 100
WIDTH = 16


class Leave(enum.Enum):
    """When a client goes away."""

    IN_REQUEST = enum.auto()  # a part of the body was sent
    AT_ONCE = enum.auto()  # all was sent
    IN_ANSWER = enum.auto()  # the first byte of the answer came


@pytest.fixture(scope="module", params=LANES)
def server(make_repository, request):
    """One server with the model echo under each limit, as echo1, echo2, …, and one more of 64."""
    repository = make_repository("echo")
    for name, limit in [*((f"echo{limit}", limit) for limit in LIMITS), (ANY_SIZE, 64)]:
        shutil.copytree(repository / "echo", repository / name)
        (repository / name / "config.yaml").write_text(f"max_batch_size: {limit}\n")
    shutil.rmtree(repository / "echo")
    with Server(repository, **LANES[request.param]) as running:
        yield running


def rows_of(number: int, rows: int) -> np.ndarray:
    """Rows that no other client sends, and whose doubles and sums are exact in FP32."""
    first = np.float32(number) + CLIENTS * np.arange(rows, dtype=np.float32)
    return first[:, None] + np.arange(WIDTH, dtype=np.float32)


def request_of(model: str, number: int, x: np.ndarray) -> tuple[bytes, bytes]:
    """Head and body of a request; every other client speaks msgpack."""
    if number % 2:
        kind, body = "application/json", json.dumps(clients.v2_document({"x": x})).encode()
    else:
        entry = clients.tensor("x", x, x.tobytes())
        kind, body = "application/msgpack", msgpack.packb({"inputs": [entry]})
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: test\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode(), body


def outputs_of(answer: clients.Answer) -> dict[str, np.ndarray]:
    """The outputs in an answer, flat."""
    status, headers, body = answer
    assert status == 200, body
    if headers["content-type"] == "application/msgpack":
        document = msgpack.unpackb(body)
        return {o["name"]: np.frombuffer(o["data"], np.float32) for o in document["outputs"]}
    return {o["name"]: np.array(o["data"], np.float32) for o in orjson.loads(body)["outputs"]}


def ask_all(port: int, model: str, rows: list[int], seed: int) -> set[int]:
    """All clients at once, each with its number of rows; which of them left.

    All connect, then all ask; those that leave have left before the others read, in order, what has come.
    """
    chance = random.Random(seed)
    leaving = {n: chance.choice(list(Leave)) for n in chance.sample(range(CLIENTS), LEAVING)}
    asked = [rows_of(number, rows[number]) for number in range(CLIENTS)]
    requests = [request_of(model, number, x) for number, x in enumerate(asked)]
    with ExitStack() as stack:
        wires = [stack.enter_context(clients.Wire(port)) for _ in range(CLIENTS)]
        for number, (wire, (head, body)) in enumerate(zip(wires, requests, strict=True)):
            leave = leaving.get(number)
            wire.send(head + (body[: number % len(body)] if leave is Leave.IN_REQUEST else body))
            if leave in (Leave.IN_REQUEST, Leave.AT_ONCE):
                wire.close()
        for number, leave in leaving.items():
            if leave is Leave.IN_ANSWER:
                assert wires[number].socket.recv(1)
                wires[number].close()
        for number, (wire, x) in enumerate(zip(wires, asked, strict=True)):
            if number not in leaving:
                outputs = outputs_of(wire.receive())
                assert np.array_equal(outputs["y"], (2 * x + 1).ravel())
                assert np.array_equal(outputs["row_sum"], x.sum(axis=1))
    return set(leaving)


@pytest.mark.parametrize("rows", range(1, 65))
async def test_a_thousand_requests_of_every_size_get_their_own_answers(server, rows):
    ask_all(server.port, ANY_SIZE, [rows] * CLIENTS, seed=rows)
    async with clients.many_connections() as session:
        await clients.until_queued(session, server.url, ANY_SIZE, 0)


@pytest.mark.parametrize("limit", LIMITS)
async def test_a_thousand_clients_get_their_own_answers(server, limit):
    model = f"echo{limit}"
    rows = [1 + number % limit for number in range(CLIENTS)]
    leaving = ask_all(server.port, model, rows, seed=limit)

    async with clients.many_connections() as session:
        await clients.until_queued(session, server.url, model, 0)
        x = rows_of(1, limit)
        async with session.post(
            f"{server.url}/v2/models/{model}/infer", json=clients.v2_document({"x": x})
        ) as answer:
            assert answer.status == 200
        entry, codes = await settled(session, server.url, model)

    answered = CLIENTS - LEAVING + 1
    counts = entry["inference_stats"]
    assert set(codes) <= {"200", "499"}  # 499: the client went away
    assert (codes["200"], codes.get("499", 0)) == (
        counts["success"]["count"],
        counts["fail"]["count"],
    )
    assert answered <= counts["success"]["count"]
    assert counts["success"]["count"] + counts["fail"]["count"] <= CLIENTS + 1
    batches = clients.batches(entry)
    assert max(batches) <= limit
    assert sum(batches.values()) == entry["execution_count"]
    # Rows whose client left while they ran were run, but count as nobody's inference.
    ran = sum(size * count for size, count in batches.items())
    kept = sum(rows[n] for n in range(CLIENTS) if n not in leaving) + limit
    assert kept <= entry["inference_count"] <= ran <= sum(rows) + limit


async def settled(session, url: str, model: str) -> tuple[dict, dict[str, float]]:
    """Statistics and statuses once no request of a client that left is on its way any more."""
    async with asyncio.timeout(clients.DEADLINE_S):
        while True:
            entry = await clients.statistics(session, url, model)
            codes = await answers_by_code(session, url, model)
            if entry == await clients.statistics(session, url, model):
                return entry, codes


async def answers_by_code(session, url: str, model: str) -> dict[str, float]:
    """``gateway_requests_total`` of a model, by status."""
    async with session.get(f"{url}/metrics") as answer:
        values = clients.samples(await answer.text())
    found = {}
    for (name, labels), value in values.items():
        if name == "gateway_requests_total" and dict(labels)["model"] == model:
            found[dict(labels)["code"]] = value
    return found


def test_no_worker_and_no_front_end_died_of_it(server):
    log = "\n".join(server.lines)
    assert "ERROR" not in log, log
    assert "Traceback" not in log, log
    assert len(server.workers()) == len(LIMITS) + 1
