"""Outputs whose size only the run tells."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import onnx
import pytest
import requests
from onnx import TensorProto, helper

from gateway.client import Client
from tests.system.server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """y = x tiled k times, k being the largest x of the batch."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["k"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["k", "first"], ["k1"]),
        helper.make_node("Concat", ["one", "k1"], ["repeats"], axis=0),
        helper.make_node("Tile", ["x", "repeats"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
        [
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        ],
    )
    opset = helper.make_opsetid("", 17)
    repository = tmp_path_factory.mktemp("tile")
    (repository / "tile" / "1").mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[opset], ir_version=9),
        repository / "tile" / "1" / "model.onnx",
    )
    (repository / "tile" / "config.yaml").write_text("max_batch_size: 1\n")
    with Server(repository) as running:
        yield running


def ask(server: Server, k: int) -> requests.Response:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [k]}]}
    return requests.post(f"{server.url}/v2/models/tile/infer", json=body, timeout=30)


def test_each_answer_has_the_size_of_its_own_run(server):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for k, answer in pool.map(lambda k: (k, ask(server, k)), [3, 5, 2, 1, 300, 7, 3, 0] * 20):
            assert answer.status_code == 200, answer.text
            (output,) = answer.json()["outputs"]
            assert output["shape"] == [1, k]
            assert output["data"] == [k] * k


def test_an_output_beyond_the_slot_travels_in_memory_of_its_own(server):
    """20 MB and 120 MB, where a slot holds 4 MB at most."""
    with Client(server.url.removeprefix("http://")) as client:
        for k in (5_000_000, 3, 30_000_000, 4):
            y = client.infer("tile", {"x": np.full((1, 1), k, np.float32)}).outputs["y"]
            assert y.shape == (1, k)
            assert (y == k).all()
