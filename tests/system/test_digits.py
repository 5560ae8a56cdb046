"""The demo's model: the held-out digits through every encoding, against ONNX Runtime itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import requests
import tritonclient.http

from tests.system import clients
from tests.system.server import Server

ROWS_PER_REQUEST = 64  # the model's max_batch_size

ENCODINGS = {
    "json": clients.ask_json,
    "binary": clients.ask_binary,
    "msgpack": clients.ask_msgpack,
    "tensorflow rows": clients.ask_rows,
    "tensorflow columns": clients.ask_columns,
}


@pytest.fixture(scope="module")
def server(digits_repository):
    with Server(digits_repository) as running:
        yield running


@pytest.fixture(scope="module")
def held_out(root) -> tuple[np.ndarray, np.ndarray]:
    with np.load(root / "examples" / "digits" / "held_out.npz", allow_pickle=False) as held:
        return held["images"].astype(np.float32), held["labels"]


@pytest.fixture(scope="module")
def direct(digits_repository, held_out) -> dict[int, clients.Arrays]:
    """The outputs of a direct run of each version on all images."""
    return {
        version: clients.direct_run(
            digits_repository / "digits" / str(version) / "model.onnx", {"image": held_out[0]}
        )
        for version in (1, 2, 3)
    }


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_predictions_are_those_of_a_direct_run(server, root, held_out, direct, encoding, version):
    images, labels = held_out
    requests_of_rows = [
        images[start : start + ROWS_PER_REQUEST]
        for start in range(0, len(images), ROWS_PER_REQUEST)
    ]
    answers = [
        ENCODINGS[encoding](server.url, "digits", {"image": rows}, version)
        for rows in requests_of_rows
    ]
    predicted = np.concatenate([answer["label"] for answer in answers])
    probabilities = np.concatenate([answer["probabilities"] for answer in answers])
    np.testing.assert_array_equal(predicted, direct[version]["label"])
    # Not to the bit: a matrix product of 64 rows may add up in another order than one of 599.
    np.testing.assert_allclose(
        probabilities, direct[version]["probabilities"], rtol=1e-4, atol=1e-6
    )
    measured = json.loads((root / "examples" / "digits" / "accuracy.json").read_text())
    assert int((predicted == labels).sum()) == measured[str(version)]["correct"]
    assert len(labels) == measured[str(version)]["total"]


def post_in_every_form(url: str, version: int | None, image: np.ndarray):
    """Each encoding's answer to one image, as a response whose headers can be looked at."""
    inputs = {"image": image}
    infer = f"{url}{clients.v2_path('digits', version)}/infer"
    predict = f"{url}{clients.v1_path('digits', version)}:predict"
    body, header_length = tritonclient.http.InferenceServerClient.generate_request_body(
        clients.triton_inputs(inputs)
    )
    yield requests.post(infer, json=clients.v2_document(inputs), timeout=clients.DEADLINE_S)
    yield requests.post(
        infer,
        data=body,
        headers={"Inference-Header-Content-Length": str(header_length)},
        timeout=clients.DEADLINE_S,
    )
    yield requests.post(
        infer,
        data=clients.msgpack.packb(clients.v2_document(inputs)),
        headers={"Content-Type": "application/msgpack"},
        timeout=clients.DEADLINE_S,
    )
    yield requests.post(predict, json={"instances": image.tolist()}, timeout=clients.DEADLINE_S)
    yield requests.post(predict, json={"inputs": image.tolist()}, timeout=clients.DEADLINE_S)


@pytest.mark.parametrize(("asked", "answering"), [(None, "1"), (1, "1"), (2, "2"), (3, "3")])
def test_every_answer_names_its_version_and_the_route_stays_on_1(
    server, held_out, asked, answering
):
    for answer in post_in_every_form(server.url, asked, held_out[0][:1]):
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-model-version"] == answering


def test_documents_and_refusals_of_a_version_name_it_too(server):
    for path in ("", "/ready", "/config"):
        answer = requests.get(f"{server.url}/v2/models/digits{path}", timeout=clients.DEADLINE_S)
        assert (answer.status_code, answer.headers["x-model-version"]) == (200, "1"), path
    refused = requests.post(
        f"{server.url}/v2/models/digits/versions/2/infer", data=b"{", timeout=clients.DEADLINE_S
    )
    assert (refused.status_code, refused.headers["x-model-version"]) == (400, "2")


def test_all_three_versions_are_listed(server):
    document = requests.get(f"{server.url}/v2/models/digits", timeout=clients.DEADLINE_S).json()
    assert document["versions"] == ["1", "2", "3"]
    status = requests.get(f"{server.url}/v1/models/digits", timeout=clients.DEADLINE_S).json()
    states = {v["version"]: v["state"] for v in status["model_version_status"]}
    assert states == {"1": "AVAILABLE", "2": "AVAILABLE", "3": "AVAILABLE"}
