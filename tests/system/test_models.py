"""Models of several dtypes and of variable dims, through every encoding, against ONNX Runtime itself."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import requests
import tritonclient.http

from tests.system import clients
from tests.system.server import LANES, Server


@pytest.fixture(scope="module")
def repository(make_repository):
    return make_repository("multi", "dynamic", "gather")


@pytest.fixture(scope="module", params=LANES)
def server(repository, request):
    with Server(repository, **LANES[request.param]) as running:
        yield running


def model_file(repository, model: str):
    return repository / model / "1" / "model.onnx"


EVERY_DTYPE = {
    "in_fp32": np.array(
        [[np.nan, np.inf, -np.inf, -0.0], [0.1, 1e-45, 3e38, -1e30], [1, 2, 3, 16777217]],
        np.float32,
    ),
    "in_fp16": np.array(
        [[np.nan, np.inf, -np.inf, -0.0], [0.1, 6e-8, 65504, -1], [1, 2, 3, 4]], np.float16
    ),
    "in_fp64": np.array([[np.nan, -np.inf], [0.1, 1e308], [5e-324, 2.0**53 + 1]]),
    "in_int64": np.array([[-(2**63), 2**63 - 2], [2**53 + 1, -1], [0, 7]], np.int64),
    "in_bool": np.array([[True, False], [False, False], [True, True]]),
    "in_uint8": np.array([[0, 1, 255], [2, 128, 127], [9, 8, 7]], np.uint8),
    "in_int8": np.array([[-128, 127, 0], [-1, 1, 2], [3, 4, 5]], np.int8),
}
"""Three rows for the model multi, with each dtype's special and extreme values."""


def ask_mixed(url: str, model: str, inputs: clients.Arrays) -> clients.Arrays:
    """v2 by Triton's client, in JSON but for what has no JSON form: both in one request."""
    names = [name.replace("in_", "out_") for name in inputs]
    outputs = [
        tritonclient.http.InferRequestedOutput(name, binary_data=name == "out_fp16")
        for name in names
    ]
    with tritonclient.http.InferenceServerClient(url.removeprefix("http://")) as client:
        result = client.infer(model, clients.triton_inputs(inputs, binary=False), outputs=outputs)
        return {name: result.as_numpy(name) for name in names}


def ask_msgpack_arrays(url: str, model: str, inputs: clients.Arrays) -> clients.Arrays:
    """msgpack with arrays of numbers."""
    return clients.ask_msgpack(url, model, inputs, arrays=True)


@pytest.mark.parametrize(
    "ask", [ask_mixed, clients.ask_binary, clients.ask_msgpack, ask_msgpack_arrays]
)
def test_every_dtype_comes_back_as_from_a_direct_run(server, repository, ask):
    answers = ask(server.url, "multi", EVERY_DTYPE)
    clients.assert_same(answers, clients.direct_run(model_file(repository, "multi"), EVERY_DTYPE))


def test_inputs_in_another_order_are_told_apart_by_name(server, repository):
    inputs = dict(reversed(EVERY_DTYPE.items()))
    answers = clients.ask_binary(server.url, "multi", inputs)
    clients.assert_same(answers, clients.direct_run(model_file(repository, "multi"), EVERY_DTYPE))


def test_what_json_cannot_carry_is_refused_with_a_hint(server):
    document = clients.v2_document(EVERY_DTYPE)
    columns = {name: np.zeros_like(array).tolist() for name, array in EVERY_DTYPE.items()}
    for path, body in (
        ("/v2/models/multi/infer", clients.json.dumps(document)),
        ("/v1/models/multi:predict", clients.json.dumps({"inputs": columns})),
    ):
        answer = requests.post(server.url + path, data=body, timeout=clients.DEADLINE_S)
        assert answer.status_code == 400
        assert "FP16" in answer.json()["error"]
        assert "binary" in answer.json()["error"]


EVERY_ENCODING = [
    clients.ask_json,
    clients.ask_binary,
    clients.ask_msgpack,
    ask_msgpack_arrays,
    clients.ask_rows,
    clients.ask_columns,
]


@pytest.mark.parametrize("ask", EVERY_ENCODING)
@pytest.mark.parametrize("length", [1, 2, 17, 300, 4097])
def test_rows_of_any_length(server, repository, ask, length):
    x = np.arange(3 * length, dtype=np.float32).reshape(3, length)
    answers = ask(server.url, "dynamic", {"x": x})
    answers = {name: array.astype(np.float32) for name, array in answers.items()}
    clients.assert_same(answers, clients.direct_run(model_file(repository, "dynamic"), {"x": x}))


@pytest.mark.parametrize("ask", [clients.ask_json, clients.ask_msgpack, clients.ask_columns])
def test_rows_without_elements(server, repository, ask):
    x = np.zeros((2, 0), np.float32)
    answers = ask(server.url, "dynamic", {"x": x})
    answers = {name: array.astype(np.float32) for name, array in answers.items()}
    clients.assert_same(answers, clients.direct_run(model_file(repository, "dynamic"), {"x": x}))


async def test_different_lengths_at_once_each_get_their_own(server, repository):
    """Integers, whose sums are exact however ONNX Runtime adds them up."""
    lengths = [1 + (37 * n) % 211 for n in range(300)] + [5000, 20_000]
    rows = [1 + n % 4 for n in range(len(lengths))]
    asked = [
        (np.arange(r * length, dtype=np.float32).reshape(r, length) + n) % 251
        for n, (r, length) in enumerate(zip(rows, lengths, strict=True))
    ]

    async def ask(session, x: np.ndarray) -> clients.Arrays:
        async with session.post(
            f"{server.url}/v2/models/dynamic/infer", json=clients.v2_document({"x": x})
        ) as answer:
            document = await answer.json()
            assert answer.status == 200, document
        return {
            o["name"]: np.array(o["data"], np.float32).reshape(o["shape"])
            for o in document["outputs"]
        }

    async with clients.many_connections() as session, asyncio.timeout(clients.DEADLINE_S):
        answers = await asyncio.gather(*(ask(session, x) for x in asked))
    expected = clients.direct_runs(model_file(repository, "dynamic"), [{"x": x} for x in asked])
    for answer, outputs in zip(answers, expected, strict=True):
        clients.assert_same(answer, outputs)


def test_a_single_tensor_drops_its_name_in_tensorflows_form(server):
    rows = clients.predict(server.url, "gather", {"instances": [3, 99]})
    assert rows == {"predictions": [[3, 3.25, 3.5, 3.75], [99, 99.25, 99.5, 99.75]]}
    columns = clients.predict(server.url, "gather", {"inputs": {"index": [3]}})
    assert columns == {"outputs": [[3, 3.25, 3.5, 3.75]]}


def test_an_instance_that_wraps_its_inputs_is_unwrapped(server):
    wrapped = {"instances": [{"inputs": {"x": [1, 2]}}, {"inputs": {"x": [3, 5]}}]}
    answer = clients.predict(server.url, "dynamic", wrapped)
    assert answer["predictions"] == [
        {"y": [3, 6], "mean": [1.5]},
        {"y": [9, 15], "mean": [4]},
    ]


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"instances": [{"x": [1, 2]}, {"x": [1, 2, 3]}]}, "1"),
        ({"instances": [{"x": [1, 2]}, {"y": [1, 2]}]}, "1"),
        ({"instances": []}, "instances"),
        ({"instances": [[1]], "inputs": [[1]]}, "Missing 'inputs' or 'instances' key"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"inputs": {"x": [[1]], "z": [[1]]}}, "z"),
        ({"inputs": [["text"]]}, "x"),
    ],
)
def test_malformed_predictions_are_refused(server, document, named):
    answer = requests.post(
        f"{server.url}/v1/models/dynamic:predict", json=document, timeout=clients.DEADLINE_S
    )
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["error"]
