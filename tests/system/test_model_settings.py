"""What a model's settings change, seen from outside."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from gateway.client import AsyncClient, Client
from tests.system import clients
from tests.system.server import Server

OPSET = '<ir_version: 9, opset_import: ["" : 17]>'

MEAN = f"""{OPSET}
g (float[n, seq, 2] x, int64[n, seq] mask) => (float[n, 2] mean, float[n, seq, 2] kept)
<int64[1] one = {{1}}, int64[1] two = {{2}}> {{
    m = Cast <to = 1> (mask)
    m3 = Unsqueeze (m, two)
    kept = Mul (x, m3)
    total = ReduceSum <keepdims = 0> (kept, one)
    count = ReduceSum <keepdims = 1> (m, one)
    mean = Div (total, count)
}}"""

ROWS_SEEN = f"""{OPSET}
g (float[n, 1] x) => (float[n, 1] y) {{
    shape = Shape <start = 0, end = 1> (x)
    rows = Cast <to = 1> (shape)
    zero = Sub (x, x)
    y = Add (zero, rows)
}}"""

SCALED = f"""{OPSET}
g (float[n, 2] x, float factor) => (float[n, 2] y) <float factor = {{3}}> {{ y = Mul (x, factor) }}"""


LARGE = f"""{OPSET}
g (uint8[size] x) => (uint8[size] y) <uint8 most = {{255}}> {{ y = Sub (most, x) }}"""


def write(repository: Path, name: str, text: str, config: str = "") -> Path:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    onnx.save(parser.parse_model(text), folder / "model.onnx")
    if config:
        (folder.parent / "config.yaml").write_text(config)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def server(tmp_path_factory, benchmark_models):
    repository = tmp_path_factory.mktemp("settings")
    write(repository, "right", MEAN, "padding: {seq: {buckets: [4, 8]}}\n")
    write(repository, "left", MEAN, "padding: {seq: {buckets: [4, 8], side: left}}\n")
    write(
        repository,
        "sized",
        ROWS_SEEN,
        "allowed_batch_sizes: [2, 5, 8]\naccept_batch_effects: true\n",
    )
    write(repository, "scaled", SCALED)
    write(repository, "large", LARGE, "max_batch_size: 0\n")
    (repository / "levels" / "1").mkdir(parents=True)
    benchmark_models.echo(repository / "levels" / "1" / "model.onnx")
    (repository / "levels" / "config.yaml").write_text(
        "max_batch_size: 1\nqueue: {priority_levels: 3}\ninstances: [{threads: 1, cpus: 0}]\n"
    )
    with Server(repository, "--log-level", "info") as running:
        yield running


def address(server: Server) -> str:
    return server.url.removeprefix("http://")


def sequence(length: int, rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, length, 2)).astype(np.float32)
    return {"x": x, "mask": np.ones((rows, length), np.int64)}


@pytest.mark.parametrize("model", ["right", "left"])
async def test_padded_requests_share_batches_and_get_their_own_lengths_back(server, model):
    lengths = [1, 3, 4, 5, 8, 2, 7, 11, 6, 4, 1, 12]
    async with AsyncClient(address(server)) as client:
        with clients.stopped(clients.worker_of(server, model)):
            asked = [
                asyncio.create_task(client.infer(model, sequence(length, 1 + i % 2, i)))
                for i, length in enumerate(lengths)
            ]
            async with clients.many_connections() as session:
                await clients.until_queued(session, server.url, model, len(lengths))
        answers = await asyncio.gather(*asked)
    for i, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        x = sequence(length, 1 + i % 2, i)["x"]
        np.testing.assert_array_equal(answer.outputs["kept"], x)
        np.testing.assert_allclose(answer.outputs["mean"], x.mean(1), rtol=1e-5, atol=1e-6)
    async with clients.many_connections() as session:
        entry = await clients.statistics(session, server.url, model)
    sizes = clients.batches(entry)
    # Two buckets, and the lengths 11 and 12, which have no bucket: four shapes, so four batches.
    assert sum(sizes.values()) == 4
    assert max(sizes) >= 6


def test_batches_are_padded_to_an_allowed_size(server):
    with Client(address(server)) as client:
        for rows, run in ((1, 2), (2, 2), (3, 5), (5, 5), (6, 8), (8, 8)):
            y = client.infer("sized", {"x": np.ones((rows, 1), np.float32)}).outputs["y"]
            assert y.tolist() == [[run]] * rows


def test_an_optional_input_may_be_sent_or_left_out(server):
    x = np.array([[1, 2], [3, 4]], np.float32)
    with Client(address(server)) as client:
        for factor in (None, 0.5, -2.0):
            inputs = {"x": x}
            if factor is not None:
                inputs["factor"] = np.array(factor, np.float32)
            y = client.infer("scaled", inputs).outputs["y"]
            np.testing.assert_array_equal(y, x * (3 if factor is None else factor))


async def test_a_higher_priority_overtakes(server):
    """Two batches of one may lie ready for the worker; what waits behind them goes by level."""
    done: list[int] = []

    async def ask(client: AsyncClient, number: int, priority: int) -> None:
        await client.infer("levels", {"x": np.full((1, 16), number, np.float32)}, priority=priority)
        done.append(number)

    async with AsyncClient(address(server)) as client, clients.many_connections() as session:
        with clients.stopped(clients.worker_of(server, "levels")):
            tasks = []
            for number, priority in enumerate([3, 3, 3, 3, 2, 1, 2, 1, 3]):
                tasks.append(asyncio.create_task(ask(client, number, priority)))
                await clients.until_queued(session, server.url, "levels", len(tasks))
        await asyncio.gather(*tasks)
    assert sorted(done) == list(range(9))
    last_of_first_level = max(done.index(number) for number in (5, 7))
    assert last_of_first_level < min(done.index(number) for number in (2, 3, 8))


def test_workers_stay_on_their_cpus(server):
    status = Path(f"/proc/{clients.worker_of(server, 'levels')}/status").read_text()
    assert re.search(r"^Cpus_allowed_list:\s*0$", status, re.MULTILINE)


def test_the_log_says_how_each_model_is_served_and_why(server):
    text = "\n".join(server.lines)
    assert re.search(r"'right' version 1: batches of up to 64 rows: .* first dim 'n'", text)
    assert re.search(r"'sized' version 1: batches of up to 8 rows: its settings say so", text)


BIG = f"""{OPSET}
g (float[n, 2048] x) => (float[n, 2048] y) <float[2048, 2048] w> {{ y = MatMul (x, w) }}"""


def write_big(repository: Path, config: str = "") -> Path:
    """A model of 16 MiB."""
    folder = repository / "big" / "1"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((2048, 2048)).astype(np.float32)
    model = parser.parse_model(BIG)
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, folder / "model.onnx")
    (folder.parent / "config.yaml").write_text(config)
    return folder / "model.onnx"


def index_entry(server: Server) -> dict:
    (entry,) = json.loads(clients.exchange(server.port, "POST", "/v2/repository/index")[2])
    return entry


@pytest.mark.parametrize(
    ("config", "environment", "reason"),
    [
        ("memory_bytes: 8000000\n", {}, "memory_bytes in its config.yaml allows 8000000"),
        ("", {"GATEWAY_MEMORY_BYTES": "8000000"}, "the server has 8000000 left"),
        (
            "instances: [{count: 9}]\n",
            {"GATEWAY_MEMORY_BYTES": "300000000"},
            "left: raise the server",
        ),
    ],
)
def test_a_model_over_the_memory_budget_is_refused(tmp_path, config, environment, reason):
    write_big(tmp_path, config)
    with Server(tmp_path, "--no-exit-on-error", **environment) as server:
        entry = index_entry(server)
    assert entry["state"] == "UNAVAILABLE"
    assert reason in entry["reason"]


def test_the_second_start_uses_the_optimised_graph_of_the_first(tmp_path):
    write_big(tmp_path)
    x = np.random.default_rng(2).standard_normal((3, 2048)).astype(np.float32)
    folder = tmp_path / ".gateway" / "cache"
    answers, written = [], []
    for _ in range(2):
        with Server(tmp_path) as server, Client(address(server)) as client:
            answers.append(client.infer("big", {"x": x}).outputs["y"])
        (entry,) = folder.glob("*.onnx")
        written.append((entry.name, entry.stat().st_mtime_ns))
    assert written[0] == written[1]
    np.testing.assert_array_equal(*answers)


def test_a_body_of_64_mib_is_served_and_one_byte_more_is_not(server):
    """Exactly the default of max_request_bytes, header of the binary extension included."""
    limit = 64 << 20
    size = limit - 200  # the head is padded with blanks to the rest

    entry = {"name": "x", "datatype": "UINT8", "shape": [size]}
    entry["parameters"] = {"binary_data_size": size}
    document = {"inputs": [entry], "parameters": {"binary_data_output": True}}
    head = json.dumps(document).encode().ljust(limit - size)
    assert len(head) == 200
    data = np.random.default_rng(3).integers(0, 256, size, np.uint8)
    headers = {"Inference_Header_Content_Length": str(len(head))}
    path = "/v2/models/large/infer"
    status, fields, body = clients.exchange(
        server.port, "POST", path, head + data.tobytes(), **headers
    )
    assert status == 200, body[:200]
    np.testing.assert_array_equal(
        np.frombuffer(body[int(fields["inference-header-content-length"]) :], np.uint8), ~data
    )
    status, _, body = clients.exchange(
        server.port, "POST", path, head + data.tobytes() + b"x", **headers
    )
    assert status == 413
    assert b"max_request_bytes" in body
