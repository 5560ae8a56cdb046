"""A gateway with a model on the GPU: answers under load, a worker's death, and memory that comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests

from tests.system.server import Server

CONFIG = "max_batch_size: 16\n{sizes}instances: [{{device: 'cuda:0', cuda_graphs: {graphs}}}]\n"
GRAPHS = {"plain": ("", "false"), "graphs": ("allowed_batch_sizes: [1, 4, 16]\n", "true")}
CLIENTS = 24

FORGOTTEN_MB = 64
"""What of the GPU's memory may seem to be left: other processes' changes between two looks."""


@pytest.fixture(params=list(GRAPHS))
def server(request, make_repository):
    sizes, graphs = GRAPHS[request.param]
    config = CONFIG.format(sizes=sizes, graphs=graphs)
    with Server(make_repository("echo", echo=config), "--model-control") as running:
        yield running


def ask(server: Server, value: float, rows: int) -> None:
    """One request whose answer is checked against the model's formula."""
    x = np.arange(rows * 16, dtype=np.float32).reshape(rows, 16) + np.float32(value)
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 16], "data": x.ravel().tolist()}
    answer = requests.post(
        f"{server.url}/v2/models/echo/infer", json={"inputs": [tensor]}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    got = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert got["y"] == (2 * x + 1).ravel().tolist()


def test_every_answer_is_its_requests(server):
    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = [clients.submit(ask, server, i * 1000, 1 + i % 16) for i in range(600)]
        for one in asked:
            one.result()


def test_a_worker_that_is_killed_loses_no_answer(server):
    half = threading.Event()
    done = iter(range(1, 601))

    def ask_and_count(i: int) -> None:
        ask(server, i * 1000, 1 + i % 16)
        if next(done) == 200:
            half.set()

    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = [clients.submit(ask_and_count, i) for i in range(600)]
        assert half.wait(60)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        for one in asked:
            one.result()


def used_mb() -> int:
    """Memory in use on GPU 0."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_an_unloaded_model_leaves_no_memory_on_the_gpu(server):
    ask(server, 1, 3)
    loaded_mb = used_mb()
    url = f"{server.url}/v2/repository/models/echo"
    assert requests.post(f"{url}/unload", timeout=60).status_code == 200
    unloaded_mb = used_mb()
    assert loaded_mb - unloaded_mb > FORGOTTEN_MB  # a context alone is larger
    assert requests.post(f"{url}/load", timeout=120).status_code == 200
    ask(server, 2, 3)
    assert requests.post(f"{url}/unload", timeout=60).status_code == 200
    assert abs(used_mb() - unloaded_mb) <= FORGOTTEN_MB
