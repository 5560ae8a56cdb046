"""What becomes of requests that no worker takes at once: they wait, are refused, expire, or leave.

A worker is held busy by stopping its process in the middle of a run, so nothing here depends on how long
anything takes. What was run, and together with what, is read from the model's statistics.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
import pytest

from tests.conftest import ROOT, load_script
from tests.system import clients
from tests.system.server import Server

RUN_STEPS = 150_000
"""Steps of a run of the model slow: some 0.4 s, enough to be stopped in the middle."""

HELD_BACK = "max_batch_size: 4\nmax_queue_delay_us: 60000000\n"

CONFIGS = {
    "slow": {
        "bounded": "max_batch_size: 1\nqueue: {max_size: 4}\nwarmup: false\n",
        "timed": "max_batch_size: 1\nqueue: {timeout_ms: 1000}\nwarmup: false\n",
        "batched": "max_batch_size: 8\nwarmup: false\n",
    },
    "echo": {
        "prompt": "max_batch_size: 4\n",
        "delayed": "max_batch_size: 4\nmax_queue_delay_us: 200000\n",
        "held": HELD_BACK,
    },
    "dynamic": {"shapes": "max_batch_size: 4\n"},
}
"""Each model of benchmarks/models.py, and the names and settings under which it is served."""


@pytest.fixture(scope="module")
def server(make_repository):
    repository = make_repository(*CONFIGS)
    models = load_script(ROOT / "benchmarks" / "models.py")
    models.slow(repository / "slow" / "1" / "model.onnx", RUN_STEPS)
    for source, configs in CONFIGS.items():
        for name, config in configs.items():
            shutil.copytree(repository / source, repository / name)
            (repository / name / "config.yaml").write_text(config)
        shutil.rmtree(repository / source)
    with Server(repository) as running:
        yield running


class Client:
    """Asks one model and sees what the model does.

    ``batches`` is how many batches of which number of rows ran since the client was made.
    """

    def __init__(self, session: aiohttp.ClientSession, server: Server, model: str) -> None:
        self._session = session
        self.server = server
        self.model = model

    async def begin(self) -> Client:
        self._before = await clients.statistics(self._session, self.server.url, self.model)
        return self

    async def ask(self, x: np.ndarray, **fields: object) -> tuple[int, dict]:
        """Status and document of one inference."""
        async with self._session.post(
            f"{self.server.url}/v2/models/{self.model}/infer",
            json=clients.v2_document({"x": x}, **fields),
        ) as answer:
            self.retry_after = answer.headers.get("Retry-After")
            return answer.status, await answer.json()

    async def ask_slow(self, number: int, rows: int = 1, **parameters: int) -> int:
        """One inference of the model slow, checked if it was answered; the status."""
        x = np.full((rows, 4), number, np.float32)
        status, document = await self.ask(x, parameters=parameters)
        if status == 200:
            assert document["outputs"][0]["data"] == [number + 1] * (4 * rows)
        else:
            assert list(document) == ["error"]
        return status

    async def until_waiting(self, requests: int) -> None:
        """Wait until so many requests wait for the worker."""
        await clients.until_queued(self._session, self.server.url, self.model, requests)

    async def batches(self) -> dict[int, int]:
        entry = await clients.statistics(self._session, self.server.url, self.model)
        return dict(Counter(clients.batches(entry)) - Counter(clients.batches(self._before)))

    async def rows_answered(self) -> int:
        entry = await clients.statistics(self._session, self.server.url, self.model)
        return entry["inference_count"] - self._before["inference_count"]

    async def queued_ns(self) -> int:
        entry = await clients.statistics(self._session, self.server.url, self.model)
        before = self._before["inference_stats"]["queue"]["ns"]
        return entry["inference_stats"]["queue"]["ns"] - before

    async def answers(self, code: int) -> float:
        """``gateway_requests_total`` of a status."""
        return await clients.metric(
            self._session,
            self.server.url,
            "gateway_requests_total",
            model=self.model,
            version="1",
            code=str(code),
        )

    def worker_stopped(self):
        """The worker stands still, idle: requests wait in slots that it could take."""
        return clients.stopped(clients.worker_of(self.server, self.model))

    @asynccontextmanager
    async def worker_busy(self) -> AsyncIterator[asyncio.Task]:
        """The worker stands still in the middle of a request's run; yields that request."""
        pid = clients.worker_of(self.server, self.model)
        async with asyncio.TaskGroup() as group:
            with clients.stopped(pid):
                running = group.create_task(self.ask_slow(1000))
                await self.until_waiting(1)
                os.kill(pid, signal.SIGCONT)
                await self.until_waiting(0)
                os.kill(pid, signal.SIGSTOP)
                yield running
                assert not running.done()
        assert running.result() == 200


@pytest.fixture
async def client(server, request) -> AsyncIterator[Client]:
    async with clients.many_connections() as session:
        yield await Client(session, server, request.param).begin()


def serving(model: str):
    """The client asks this model."""
    return pytest.mark.parametrize("client", [model], indirect=True)


async def collect(tasks: list[asyncio.Task]) -> list[int]:
    async with asyncio.timeout(clients.DEADLINE_S):
        return await asyncio.gather(*tasks)


async def leave(task: asyncio.Task) -> None:
    """Close the connection that a request was sent on."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# Full


@serving("bounded")
async def test_a_full_queue_refuses_at_once_while_the_worker_is_busy(client):
    async with client.worker_busy():
        waiting = [asyncio.create_task(client.ask_slow(n)) for n in range(4)]
        await client.until_waiting(4)
        for _ in range(3):
            assert await client.ask_slow(5) == 429
            assert int(client.retry_after) >= 1
        assert not any(task.done() for task in waiting)
    assert await collect(waiting) == [200] * 4
    assert await client.batches() == {1: 5}
    assert await client.answers(429) == 3
    assert await client.ask_slow(6) == 200


@serving("bounded")
async def test_a_refusal_names_the_setting(client):
    async with client.worker_busy():
        waiting = [asyncio.create_task(client.ask_slow(n)) for n in range(4)]
        await client.until_waiting(4)
        status, document = await client.ask(np.zeros((1, 4), np.float32))
        assert status == 429
        assert "queue.max_size" in document["error"]
    await collect(waiting)


@serving("bounded")
async def test_who_leaves_or_expires_makes_room(client):
    async with client.worker_busy():
        waiting = [asyncio.create_task(client.ask_slow(n)) for n in range(2)]
        expiring = [asyncio.create_task(client.ask_slow(n, timeout=1000)) for n in range(2)]
        assert await collect(expiring) == [504, 504]
        await client.until_waiting(2)
        await leave(waiting.pop())
        await client.until_waiting(1)
        waiting += [asyncio.create_task(client.ask_slow(n)) for n in range(3)]
        await client.until_waiting(4)
        assert await client.ask_slow(5) == 429
    assert await collect(waiting) == [200] * 4
    assert await client.batches() == {1: 5}


# Late


@serving("bounded")
async def test_a_request_times_out_while_the_worker_is_busy_and_never_runs(client):
    async with client.worker_busy():
        assert await client.ask_slow(1, timeout=20_000) == 504
        assert await client.batches() == {}
    assert await client.ask_slow(2) == 200
    assert await client.batches() == {1: 2}  # the one that was running, and the last
    assert await client.rows_answered() == 2


@serving("timed")
async def test_the_models_own_timeout_ends_the_wait_too(client):
    async with client.worker_busy():
        assert await client.ask_slow(1) == 504
        assert await client.ask_slow(2, timeout=1000) == 504  # a shorter one of its own
        assert await client.batches() == {}
        assert await client.answers(504) == 2
    assert await client.ask_slow(3) == 200
    assert await client.batches() == {1: 2}


@serving("batched")
async def test_only_the_late_member_of_a_waiting_batch_expires(client):
    async with client.worker_busy():
        waiting = [asyncio.create_task(client.ask_slow(1))]
        await client.until_waiting(1)
        assert await client.ask_slow(2, rows=2, timeout=1000) == 504
        waiting.append(asyncio.create_task(client.ask_slow(3, rows=3)))
        await client.until_waiting(2)
    assert await collect(waiting) == [200, 200]
    assert await client.batches() == {1: 1, 4: 1}


# Gone


@serving("bounded")
async def test_a_client_that_leaves_the_queue_never_runs(client):
    async with client.worker_busy():
        waiting = [asyncio.create_task(client.ask_slow(n)) for n in range(3)]
        await client.until_waiting(3)
        await leave(waiting.pop(1))
        await client.until_waiting(2)
    assert await collect(waiting) == [200, 200]
    assert await client.batches() == {1: 3}
    assert await client.rows_answered() == 3


@serving("batched")
@pytest.mark.parametrize("leaving", [0, 1, 2])
async def test_a_client_that_leaves_a_waiting_batch_leaves_its_mates_alone(client, leaving):
    async with client.worker_busy():
        waiting = []
        for n in range(3):
            waiting.append(asyncio.create_task(client.ask_slow(n, rows=n + 1)))
            await client.until_waiting(n + 1)
        await leave(waiting.pop(leaving))
        await client.until_waiting(2)
    assert await collect(waiting) == [200, 200]
    assert await client.batches() == {1: 1, 5 - leaving: 1}


@serving("bounded")
async def test_a_client_that_leaves_while_its_request_runs_frees_the_worker_for_the_next(client):
    pid = clients.worker_of(client.server, "bounded")
    with clients.stopped(pid):
        running = asyncio.create_task(client.ask_slow(1))
        await client.until_waiting(1)
        os.kill(pid, signal.SIGCONT)
        await client.until_waiting(0)
        os.kill(pid, signal.SIGSTOP)
        await leave(running)
    assert await client.ask_slow(2) == 200
    # Both are answered: a client that is gone cannot be told from one that only sends nothing more.
    assert await client.rows_answered() == 2


# Together


@serving("batched")
async def test_what_arrives_during_a_run_is_the_next_batch(client):
    async with client.worker_busy():
        waiting = [asyncio.create_task(client.ask_slow(n)) for n in range(8)]
        await client.until_waiting(8)
    assert await collect(waiting) == [200] * 8
    assert await client.batches() == {1: 1, 8: 1}


@serving("batched")
async def test_a_request_that_does_not_fit_begins_the_next_batch(client):
    async with client.worker_busy():
        waiting = []
        for n in range(3):
            waiting.append(asyncio.create_task(client.ask_slow(n, rows=3)))
            await client.until_waiting(n + 1)
    assert await collect(waiting) == [200] * 3
    assert await client.batches() == {1: 1, 6: 1, 3: 1}


@serving("shapes")
async def test_rows_of_different_shapes_never_share_a_batch(client):
    with client.worker_stopped():
        asked = [np.full((1, length), length, np.float32) for length in (3, 5, 3, 5, 7)]
        waiting = [asyncio.create_task(client.ask(x)) for x in asked]
        await client.until_waiting(5)
    for x, (status, document) in zip(asked, await collect(waiting), strict=True):
        assert status == 200
        y, mean = document["outputs"]
        assert (y["shape"], y["data"]) == ([1, x.shape[1]], (3 * x[0]).tolist())
        assert mean["data"] == [x.shape[1]]
    assert await client.batches() == {2: 2, 1: 1}


@serving("shapes")
async def test_requests_for_different_outputs_share_a_batch(client):
    x = np.ones((1, 6), np.float32)
    wanted = [["y"], ["mean"], ["mean", "y"], ["y", "mean"]]
    with client.worker_stopped():
        waiting = [
            asyncio.create_task(client.ask(x, outputs=[{"name": name} for name in names]))
            for names in wanted
        ]
        await client.until_waiting(4)
    for names, (status, document) in zip(wanted, await collect(waiting), strict=True):
        assert status == 200
        assert [output["name"] for output in document["outputs"]] == names
    assert await client.batches() == {4: 1}


# Held back


def echo_rows(rows: int = 1) -> np.ndarray:
    return np.zeros((rows, 16), np.float32)


@serving("prompt")
async def test_without_a_delay_an_idle_worker_takes_what_there_is(client):
    for _ in range(3):
        status, _document = await client.ask(echo_rows())
        assert status == 200
    assert await client.batches() == {1: 3}


@serving("held")
async def test_a_full_batch_goes_at_once(client):
    waiting = [asyncio.create_task(client.ask(echo_rows())) for _ in range(3)]
    await client.until_waiting(3)
    assert await client.batches() == {}
    status, _document = await client.ask(echo_rows())
    assert [status, *(s for s, _ in await collect(waiting))] == [200] * 4
    assert await client.batches() == {4: 1}


@serving("held")
async def test_a_request_that_fills_a_batch_by_itself_goes_at_once(client):
    status, _document = await client.ask(echo_rows(4))
    assert status == 200
    assert await client.batches() == {4: 1}


@serving("held")
async def test_who_leaves_or_expires_while_held_back_makes_room(client):
    leaving = asyncio.create_task(client.ask(echo_rows()))
    await client.until_waiting(1)
    status, _document = await client.ask(echo_rows(), parameters={"timeout": 1000})
    assert status == 504
    await leave(leaving)
    await client.until_waiting(0)
    waiting = [asyncio.create_task(client.ask(echo_rows())) for _ in range(4)]
    assert [s for s, _ in await collect(waiting)] == [200] * 4
    assert await client.batches() == {4: 1}


@serving("delayed")
async def test_a_part_batch_goes_once_its_oldest_row_has_waited(client):
    with client.worker_stopped():
        waiting = [asyncio.create_task(client.ask(echo_rows())) for _ in range(3)]
        await client.until_waiting(3)
    assert [s for s, _ in await collect(waiting)] == [200] * 3
    assert await client.batches() == {3: 1}
    assert await client.queued_ns() >= 200_000_000
