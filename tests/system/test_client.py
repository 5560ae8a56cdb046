"""gateway.client against gateways: the same answers as a direct run, whatever happens to the servers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from gateway.client import Answer, AsyncClient, Client, ConnectionFailed
from gateway.client.failover import Waiting
from gateway.errors import DeadlineExceeded, InferenceFailed, InvalidRequest, NotFound, QueueFull
from tests.system import clients
from tests.system.server import Server, wait_gone
from tests.system.test_models import EVERY_DTYPE

MAX_QUEUE = 3

ROWS = {"x": np.random.default_rng(5).standard_normal((3, 16), np.float32)}

SPECIAL = {"x": ROWS["x"].copy()}
SPECIAL["x"][1, :3] = np.nan, np.inf, -np.inf

BIG_ENDIAN = {
    name: np.asfortranarray(array).astype(array.dtype.newbyteorder(">"))
    for name, array in EVERY_DTYPE.items()
}

CASES = {
    "rows": ("echo", ROWS, ROWS),
    "special": ("echo", SPECIAL, SPECIAL),
    "dtypes": ("multi", EVERY_DTYPE, EVERY_DTYPE),
    "layouts": ("multi", BIG_ENDIAN, EVERY_DTYPE),
}
"""Model, what is sent, and what a direct run is given."""


@pytest.fixture(scope="module")
def repository(make_repository):
    return make_repository(
        "echo", "multi", "gather", "mlp16", mlp16=f"queue: {{max_size: {MAX_QUEUE}}}\n"
    )


@pytest.fixture(scope="module")
def server(repository):
    with Server(repository) as running:
        yield running


def expected(repository, model: str, inputs: clients.Arrays) -> clients.Arrays:
    return clients.direct_run(repository / model / "1" / "model.onnx", inputs)


def ask_sync(url: str, encoding: str, model: str, inputs: clients.Arrays) -> Answer:
    with Client(url, encoding=encoding, retries=0) as client:
        return client.infer(model, inputs, request_id="an id")


def ask_async(url: str, encoding: str, model: str, inputs: clients.Arrays) -> Answer:
    async def ask() -> Answer:
        async with AsyncClient(url, encoding=encoding, retries=0) as client:
            return await client.infer(model, inputs, version=1, request_id="an id")

    return asyncio.run(ask())


@pytest.mark.parametrize("ask", [ask_sync, ask_async])
@pytest.mark.parametrize("encoding", ["binary", "msgpack", "json"])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_a_direct_run(server, repository, case, encoding, ask):
    model, sent, direct = CASES[case]
    if encoding == "json" and model == "multi":
        with pytest.raises(InvalidRequest, match="FP16 cannot be sent in JSON"):
            ask(server.url, encoding, model, sent)
        return
    answer = ask(server.url, encoding, model, sent)
    clients.assert_same(answer.outputs, expected(repository, model, direct))
    assert (answer.model, answer.version, answer.request_id) == (model, "1", "an id")


@pytest.mark.parametrize("encoding", ["binary", "msgpack", "json"])
def test_outputs_are_those_asked_for_in_their_order(server, encoding):
    with Client(server.url, encoding=encoding) as client:
        answer = client.infer("echo", ROWS, outputs=["y"])
        assert list(answer.outputs) == ["y"]
        answer = client.infer("echo", ROWS, outputs=["row_sum", "y"])
        assert list(answer.outputs) == ["row_sum", "y"]
        assert len(answer.request_id) == 32  # the server's own


def test_the_other_calls(server):
    with Client(server.url) as client:
        assert client.live()
        assert client.ready()
        assert client.model_ready("echo")
        assert client.model_ready("echo", 1)
        assert not client.model_ready("echo", 2)
        assert not client.model_ready("absent")
        metadata = client.metadata("echo", 1)
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]
        (of_echo,) = client.statistics("echo")["model_stats"]
        assert of_echo["name"] == "echo"
        every = {entry["name"] for entry in client.statistics()["model_stats"]}
        assert every == {"echo", "multi", "gather", "mlp16"}


def raised_by(call: Callable[[], object]) -> type[BaseException]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    assert str(caught.value)
    return caught.type


def test_errors_are_the_gateways_own(server):
    with Client(server.url) as client:
        assert raised_by(lambda: client.infer("absent", ROWS)) is NotFound
        assert raised_by(lambda: client.infer("echo", ROWS, version=9)) is NotFound
        assert raised_by(lambda: client.metadata("absent")) is NotFound
        assert raised_by(lambda: client.infer("echo", {})) is InvalidRequest
        wrong = {"x": ROWS["x"].astype(np.float64)}
        assert raised_by(lambda: client.infer("echo", wrong)) is InvalidRequest
        assert raised_by(lambda: client.infer("echo", ROWS, outputs=["z"])) is InvalidRequest
        too_large = {"index": np.array([10**6], np.int64)}
        assert raised_by(lambda: client.infer("gather", too_large)) is InferenceFailed


async def test_late_in_the_queue_and_late_altogether(server):
    with clients.stopped(clients.worker_of(server, "echo")):
        async with AsyncClient(server.url) as client:
            with pytest.raises(DeadlineExceeded):
                await client.infer("echo", ROWS, queue_timeout_s=0.02)
            with pytest.raises(DeadlineExceeded, match="no answer within"):
                await client.infer("echo", ROWS, timeout_s=0.05)


@pytest.mark.parametrize("retries", [0, 3])
async def test_a_full_queue_is_tried_again_after_its_time(server, repository, retries):
    x = {"x": np.random.default_rng(1).standard_normal((1, 16), np.float32)}
    pid = clients.worker_of(server, "mlp16")
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        """In place of the wait: the worker goes on and empties the queue."""
        slept.append(seconds)
        os.kill(pid, signal.SIGCONT)
        assert len(await asyncio.gather(*waiting)) == MAX_QUEUE

    waits = Waiting(sleep=sleep, jitter=lambda: 0.0)
    with clients.stopped(pid):
        async with (
            AsyncClient(server.url) as others,
            AsyncClient(server.url, retries=retries, waiting=waits) as client,
            clients.many_connections() as session,
        ):
            waiting = [asyncio.create_task(others.infer("mlp16", x)) for _ in range(MAX_QUEUE)]
            await clients.until_queued(session, server.url, "mlp16", MAX_QUEUE)
            if not retries:
                with pytest.raises(QueueFull):
                    await client.infer("mlp16", x)
                await sleep(0)
                return
            answer = await client.infer("mlp16", x)
    clients.assert_same(answer.outputs, expected(repository, "mlp16", x))
    assert slept == [pytest.approx(1.0, abs=0.01)]


@pytest.mark.parametrize("encoding", ["binary", "msgpack"])
async def test_a_server_that_is_killed_under_load_costs_no_answer(server, repository, encoding):
    """Every one of many calls is answered rightly while one of two servers dies."""
    answered: asyncio.Queue[None] = asyncio.Queue()

    async def keep_asking(client: AsyncClient, task: int, enough: asyncio.Event) -> None:
        number = 0
        while not enough.is_set():
            number += 1
            x = np.full((1, 16), task * 100_000 + number, np.float32)
            answer = await client.infer("echo", {"x": x})
            np.testing.assert_array_equal(answer.outputs["y"], 2 * x + 1)
            answered.put_nowait(None)

    async def until_answered(count: int) -> None:
        async with asyncio.timeout(clients.DEADLINE_S):
            for _ in range(count):
                await answered.get()

    with Server(repository) as doomed:
        family = [doomed.pid, *doomed.frontends(), *doomed.workers()]
        async with AsyncClient([doomed.url, server.url], encoding=encoding) as client:
            enough = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:  # a wrong answer ends the test at once
                for task in range(16):
                    tasks.create_task(keep_asking(client, task, enough))
                await until_answered(500)
                for pid in family:
                    os.kill(pid, signal.SIGKILL)
                await until_answered(1000)
                enough.set()
        doomed.process.wait()
        for pid in family[1:]:
            wait_gone(pid)
        with Client(doomed.url, retries=0) as client:
            assert not client.live()
            assert raised_by(lambda: client.infer("echo", ROWS)) is ConnectionFailed
