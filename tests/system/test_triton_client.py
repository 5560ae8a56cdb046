"""Triton's own Python client, both of its forms, through everything that it can ask of us."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.system import clients
from tests.system.server import LANES, Server

X = np.arange(48, dtype=np.float32).reshape(3, 16)


class AwaitAll:
    """A client whose answers are awaited whether or not they have to be, so that one tour fits both."""

    def __init__(self, client) -> None:
        self._client = client

    def __getattr__(self, name: str):
        async def call(*args, **kwargs):
            answer = getattr(self._client, name)(*args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer

        return call


@pytest.fixture(scope="module", params=LANES)
def server(make_repository, request):
    with Server(make_repository("echo", "multi"), **LANES[request.param]) as running:
        yield running


@pytest.fixture(params=["sync", "aio"])
async def client(server, request):
    address = server.url.removeprefix("http://")
    if request.param == "sync":
        with tritonclient.http.InferenceServerClient(address) as one:
            yield AwaitAll(one)
    else:
        async with tritonclient.http.aio.InferenceServerClient(address) as one:
            yield AwaitAll(one)


def wanted(*names: str, binary: bool = True) -> list:
    return [tritonclient.http.InferRequestedOutput(name, binary_data=binary) for name in names]


async def test_health_and_readiness(client):
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("echo")
    assert await client.is_model_ready("echo", "1")
    assert not await client.is_model_ready("echo", "2")
    assert not await client.is_model_ready("nobody")


async def test_documents(client):
    assert (await client.get_server_metadata())["name"] == "inference-gateway"
    metadata = await client.get_model_metadata("echo")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]
    config = await client.get_model_config("multi", "1")
    assert config["max_batch_size"] == 16
    assert {i["data_type"] for i in config["input"]} >= {"TYPE_FP16", "TYPE_BOOL", "TYPE_INT8"}
    index = await client.get_model_repository_index()
    assert {entry["name"]: entry["state"] for entry in index} == {"echo": "READY", "multi": "READY"}


async def test_statistics_count_inferences(client):
    async def counted() -> tuple[int, int]:
        (entry,) = (await client.get_inference_statistics("echo"))["model_stats"]
        assert entry["name"] == "echo"
        return entry["inference_count"], entry["execution_count"]

    rows, batches = await counted()
    for _ in range(2):
        await client.infer("echo", clients.triton_inputs({"x": X}))
    assert await counted() == (rows + 6, batches + 2)
    every = await client.get_inference_statistics()
    assert {entry["name"] for entry in every["model_stats"]} == {"echo", "multi"}


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("outputs", [None, "binary", "json", "mixed"])
async def test_inference(client, binary_input, outputs):
    requested = {
        None: None,
        "binary": wanted("y", "row_sum"),
        "json": wanted("y", "row_sum", binary=False),
        "mixed": [*wanted("row_sum", binary=False), *wanted("y")],
    }[outputs]
    result = await client.infer(
        "echo",
        clients.triton_inputs({"x": X}, binary=binary_input),
        outputs=requested,
        request_id="seven",
    )
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * X + 1)
    np.testing.assert_array_equal(result.as_numpy("row_sum"), X.sum(axis=1))
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        "seven",
        "echo",
        "1",
    )
    forms = {o["name"]: "data" not in o for o in response["outputs"]}  # True: binary
    assert (
        forms
        == {
            None: {"y": True, "row_sum": True},
            "binary": {"y": True, "row_sum": True},
            "json": {"y": False, "row_sum": False},
            "mixed": {"y": True, "row_sum": False},
        }[outputs]
    )


async def test_one_output_of_two(client):
    result = await client.infer("echo", clients.triton_inputs({"x": X}), outputs=wanted("row_sum"))
    assert [output["name"] for output in result.get_response()["outputs"]] == ["row_sum"]
    assert "id" not in result.get_response()


@pytest.mark.parametrize("sent", [None, "gzip", "deflate"])
@pytest.mark.parametrize("wished", [None, "gzip", "deflate"])
async def test_compression(client, sent, wished):
    result = await client.infer(
        "echo",
        clients.triton_inputs({"x": X}),
        request_compression_algorithm=sent,
        response_compression_algorithm=wished,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * X + 1)


async def test_parameters_that_are_only_hints(client):
    result = await client.infer(
        "echo", clients.triton_inputs({"x": X}), priority=1, timeout=20_000_000
    )
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * X + 1)


@pytest.mark.parametrize(
    ("call", "arguments", "status", "text"),
    [
        ("get_model_metadata", ("nobody",), "404", "unknown model 'nobody'"),
        ("get_model_metadata", ("echo", "9"), "404", "no version 9"),
        ("get_model_config", ("nobody",), "404", "unknown model 'nobody'"),
        ("get_inference_statistics", ("nobody",), "404", "unknown model 'nobody'"),
        ("load_model", ("echo",), "403", "data port"),
        ("unload_model", ("echo",), "403", "data port"),
        ("get_model_metadata", ("a b",), "400", "name"),
    ],
)
async def test_failures_reach_the_caller_in_words(client, call, arguments, status, text):
    with pytest.raises(InferenceServerException, match=text) as caught:
        await getattr(client, call)(*arguments)
    assert caught.value.status() == status


@pytest.mark.parametrize("binary", [True, False])
async def test_refused_inferences(client, binary):
    cases = [
        ("echo", {"x": X[:, :15]}, None, "unexpected shape"),
        ("echo", {"x": X.astype(np.float64)}, None, "expected FP32"),
        ("echo", {"z": X}, None, "'z'"),
        ("echo", {"x": np.zeros((33, 16), np.float32)}, None, "batch-size must be <= 32"),
        ("echo", {"x": X}, wanted("nothing"), "'nothing'"),
        ("multi", {"in_fp32": X[:, :4]}, None, "missing"),
    ]
    for model, inputs, outputs, text in cases:
        with pytest.raises(InferenceServerException, match=text) as caught:
            await client.infer(model, clients.triton_inputs(inputs, binary), outputs=outputs)
        assert caught.value.status() == "400"
    result = await client.infer("echo", clients.triton_inputs({"x": X}))
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * X + 1)


def test_asynchronous_inference_of_the_synchronous_client(server):
    address = server.url.removeprefix("http://")
    with tritonclient.http.InferenceServerClient(address, concurrency=8) as client:
        asked = [X + n for n in range(40)]
        pending = [client.async_infer("echo", clients.triton_inputs({"x": x})) for x in asked]
        for x, request in zip(asked, pending, strict=True):
            result = request.get_result(timeout=clients.DEADLINE_S)
            np.testing.assert_array_equal(result.as_numpy("y"), 2 * x + 1)
