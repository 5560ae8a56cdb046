"""What happens when processes die: every request gets exactly one answer, the right one."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import aiohttp
import numpy as np
import onnx
import pytest
import requests
from onnx import TensorProto, helper

from tests.system.server import POLL_S, Server, command_line


class Progress:
    """Counts answers, and waits for more of them."""

    def __init__(self) -> None:
        self.count = self._target = 0
        self._reached = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        if self.count >= self._target:
            self._reached.set()

    async def more(self, n: int) -> None:
        self._target = self.count + n
        self._reached.clear()
        await self._reached.wait()


def echo_request(value: float, rows: int = 1) -> dict:
    data = np.arange(rows * 16, dtype=np.float32).reshape(rows, 16) + np.float32(value)
    return {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [rows, 16], "data": data.ravel().tolist()}
        ]
    }


async def ask_echo(session, url: str, value: float, rows: int = 1) -> None:
    """One request whose answer is checked against the model's formula."""
    async with session.post(
        f"{url}/v2/models/echo/infer", json=echo_request(value, rows)
    ) as answer:
        document = await answer.json()
        assert answer.status == 200, document
    got = {o["name"]: o["data"] for o in document["outputs"]}
    x = np.arange(rows * 16, dtype=np.float32) + np.float32(value)
    assert got["y"] == (2 * x + 1).tolist()


async def test_twenty_worker_kills_under_load_lose_no_request(make_repository):
    with Server(make_repository("echo")) as server:
        stop = asyncio.Event()
        answers = Progress()

        async def client(session, number: int) -> None:
            i = 0
            while not stop.is_set():
                await ask_echo(session, server.url, number * 10_000 + i % 1000, rows=1 + i % 3)
                answers.add()
                i += 1

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            clients = [asyncio.create_task(client(session, n)) for n in range(24)]
            for _ in range(20):
                (pid,) = server.workers()
                os.kill(pid, signal.SIGKILL)
                await asyncio.wait_for(answers.more(200), 30)  # a new worker came up
            stop.set()
            await asyncio.wait_for(asyncio.gather(*clients), 30)
        assert answers.count >= 20 * 200


@pytest.mark.parametrize("position", [0, 5, 11])
async def test_a_row_that_makes_run_raise_fails_alone(make_repository, position):
    """One of twelve requests in a batch names a row that does not exist."""
    config = "max_batch_size: 32\nmax_queue_delay_us: 200000\n"
    with Server(make_repository("gather", gather=config)) as server:

        async def ask(session, index: int):
            body = {
                "inputs": [{"name": "index", "datatype": "INT64", "shape": [1], "data": [index]}]
            }
            async with session.post(f"{server.url}/v2/models/gather/infer", json=body) as answer:
                return answer.status, await answer.json()

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            indexes = [7 + i for i in range(12)]
            indexes[position] = 5000
            answers = await asyncio.gather(*(ask(session, i) for i in indexes))
            expected = await asyncio.gather(*(ask(session, i) for i in range(7, 19)))
            stats = await (await session.get(f"{server.url}/v2/models/gather/stats")).json()
        for i, (status, document) in enumerate(answers):
            if i == position:
                assert status == 500
                assert "5000" not in document["error"]
            else:
                assert status == 200
                assert document["outputs"] == expected[i][1]["outputs"]
        statistics = stats["model_stats"][0]["inference_stats"]
        assert statistics["fail"]["count"] == 1


def write_spinning_model(path) -> None:
    """y = x + 1 after as many steps of a Loop as the largest x says: a hang at will."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes_on"]),
            helper.make_node("Tanh", ["state"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["steps"], keepdims=0),
        helper.make_node("Loop", ["steps", "", "start"], ["end"], body=body),
        helper.make_node("Cast", ["end"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", ["x", "whole"], ["plus_nothing"]),
        helper.make_node("Add", ["plus_nothing", "one"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "spin",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["n"])],
        [
            helper.make_tensor("start", TensorProto.FLOAT, [1], [0.5]),
            helper.make_tensor("one", TensorProto.INT64, [], [1]),
        ],
    )
    path.parent.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path
    )


async def test_a_request_that_hangs_every_worker_is_isolated(tmp_path):
    """It shares a batch with five others, which all get their answers; the version stays up."""
    write_spinning_model(tmp_path / "spin" / "1" / "model.onnx")
    (tmp_path / "spin" / "config.yaml").write_text(
        "max_batch_size: 8\nmax_queue_delay_us: 300000\nexecution_timeout_ms: 1000\n"
    )
    with Server(tmp_path) as server:

        async def ask(session, value: int):
            body = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [value]}]}
            async with session.post(f"{server.url}/v2/models/spin/infer", json=body) as answer:
                return answer.status, await answer.json()

        async with aiohttp.ClientSession() as session:
            answers = await asyncio.gather(*(ask(session, v) for v in (1, 2, 10**15, 3, 4, 5)))
            assert [status for status, _ in answers] == [200, 200, 500, 200, 200, 200]
            assert "died" in answers[2][1]["error"]
            for value, (_, document) in zip((1, 2, 0, 3, 4, 5), answers, strict=True):
                if value:
                    assert document["outputs"][0]["data"] == [value + 1]
            assert (await ask(session, 7))[0] == 200


def test_a_crash_loop_fails_the_version(make_repository):
    with Server(make_repository("echo", "mlp16")) as server, requests.Session() as session:
        url = f"{server.url}/v2/models/echo"
        for death in range(1, 6):
            (victim,) = (p for p in server.workers() if "echo/1#0" in command_line(p))
            logged = len(server.lines)
            os.kill(victim, signal.SIGKILL)
            server.wait_for("killed by SIGKILL", after=logged)
            deadline = time.monotonic() + 30  # until the next one is up, or the version is not
            while session.get(f"{url}/ready", timeout=30).status_code != 200 and death < 5:
                assert time.monotonic() < deadline
                time.sleep(POLL_S)
        server.wait_for("died 5 times without completing a batch")
        answer = session.post(f"{url}/infer", json=echo_request(1), timeout=30)
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        other = session.get(f"{server.url}/v2/models/mlp16/ready", timeout=30)
        assert other.status_code == 200
