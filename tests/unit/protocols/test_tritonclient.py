"""The real client's request builder and answer parser against our parser and encoder."""

import ml_dtypes
import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from gateway.bytestrings import elements
from gateway.errors import InvalidRequest
from gateway.protocols.call import OutputTensor, WantedOutput, check_call
from gateway.protocols.v2_infer import encode_infer, parse_infer
from gateway.tensors import DATATYPES

from .support import FIXED_SIZE, MAX_BYTES, PAIR, WORDS, signature, spec, strings, whole

# What set_data_from_numpy wants for each datatype; BF16 has no dtype of NumPy's own.
NUMPY = {t.name: np.dtype(t.numpy) for t in FIXED_SIZE} | {"BF16": np.dtype(ml_dtypes.bfloat16)}


def client_input(name, datatype, array, binary):
    array = np.asarray(array, NUMPY[datatype])
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def send(inputs, against, **options):
    body, length = InferenceServerClient.generate_request_body(inputs, **options)
    call = parse_infer(body, None if length is None else str(length), against)
    check_call(call, against, MAX_BYTES)
    return call


def receive(call, outputs):
    body, length = encode_infer(call, "m", "1", outputs)
    return InferenceServerClient.parse_response_body(body, header_length=length)


def raw_output(name, datatype, array):
    array = np.asarray(array, NUMPY[datatype])
    return OutputTensor(name, DATATYPES[datatype], array.shape, memoryview(array.tobytes()))


def values(tensor):
    """The tensor's data as the client's array."""
    dtype = NUMPY[tensor.datatype.name]
    if isinstance(tensor.data, memoryview):
        return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
    return np.array(tensor.data, dtype).reshape(tensor.shape)


def sample(datatype):
    dtype = NUMPY[datatype]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.array([[limits.min, limits.max, 1], [2, 3, 4]], dtype)
    if dtype.kind == "b":
        return np.array([[True, False, True], [False, False, True]])
    return np.array([[0.1, -0.0, np.nan], [np.inf, -np.inf, 1e-3]], np.float32).astype(dtype)


FORMS = [
    (datatype.name, binary)
    for datatype in FIXED_SIZE
    for binary in (True, False)
    if binary or datatype.in_json
]


@pytest.mark.parametrize(("datatype", "binary"), FORMS)
def test_a_tensor_goes_there_and_comes_back(datatype, binary):
    against = signature([spec("x", datatype, "N", 3)], [spec("y", datatype, "N", 3)])
    array = sample(datatype)
    call = send(
        [client_input("x", datatype, array, binary)],
        against,
        outputs=[InferRequestedOutput("y", binary_data=binary)],
    )
    assert call.rows == 2
    assert isinstance(call.inputs[0].data, memoryview) is binary
    assert values(call.inputs[0]).tobytes() == array.tobytes()
    result = receive(call, [raw_output("y", datatype, array)])
    np.testing.assert_array_equal(result.as_numpy("y").astype(np.float64), array.astype(np.float64))


def test_defaults_ask_for_everything_in_binary():
    call = send([client_input("x", "FP32", [[1, 2]], True)], signature([spec("x", "FP32", "N", 2)]))
    assert call.outputs is None
    assert call.binary_outputs
    assert call.id is None
    result = receive(call, [raw_output("y", "FP32", [[3, 4]])])
    assert result.as_numpy("y").tolist() == [[3, 4]]
    assert result.get_response()["model_name"] == "m"
    assert "id" not in result.get_response()


def test_options():
    inputs = [
        client_input("ids", "INT64", [[1]], True),
        client_input("mask", "BOOL", [[True]], False),
    ]
    call = send(
        inputs,
        PAIR,
        request_id="réq",
        timeout=2500,
        priority=1,
        outputs=[
            InferRequestedOutput("score"),
            InferRequestedOutput("label", binary_data=False),
        ],
        parameters={"mine": "x"},
    )
    assert (call.id, call.timeout_us, call.priority) == ("réq", 2500, 1)
    assert call.outputs == [WantedOutput("score", True), WantedOutput("label", False)]
    result = receive(
        call, [raw_output("label", "INT64", [7]), raw_output("score", "FP32", [[1, 2, 3]])]
    )
    assert result.get_response()["id"] == "réq"
    assert result.as_numpy("label").tolist() == [7]
    assert result.as_numpy("score").tolist() == [[1, 2, 3]]
    with pytest.raises(InferenceServerException, match="reserved"):
        InferenceServerClient.generate_request_body(inputs, parameters={"triton_x": 1})


@pytest.mark.parametrize("binary", [True, False])
def test_zero_elements(binary):
    inputs = [
        client_input("ids", "INT64", np.empty((2, 0)), binary),
        client_input("mask", "BOOL", np.empty((2, 0)), binary),
    ]
    call = send(inputs, PAIR, outputs=[InferRequestedOutput("score", binary_data=binary)])
    assert call.rows == 2
    result = receive(call, [raw_output("score", "FP32", np.empty((2, 0)))])
    assert result.as_numpy("score").shape == (2, 0)


def test_what_is_not_offered_is_refused():
    against = signature([spec("x", "FP32", "N", 2)])
    made = client_input("x", "FP32", [[1, 2]], True)
    with pytest.raises(InvalidRequest, match="sequences are not supported"):
        send([made], against, sequence_id=3, sequence_start=True)
    with pytest.raises(InvalidRequest, match="'classification' is not supported"):
        send([made], against, outputs=[InferRequestedOutput("y", class_count=3)])
    shared = InferRequestedOutput("y")
    shared.set_shared_memory("r", 8)
    with pytest.raises(InvalidRequest, match="client shared memory is not enabled"):
        send([made], against, outputs=[shared])
    made.set_shared_memory("r", 8)
    with pytest.raises(InvalidRequest, match="client shared memory is not enabled"):
        send([made], against)


@pytest.mark.parametrize("binary", [True, False])
def test_strings_go_there_and_come_back(binary):
    array = np.array([["a", "é\0"], ["", "null"]], object)
    made = InferInput("s", [2, 2], "BYTES")
    made.set_data_from_numpy(array, binary_data=binary)
    call = send([made], WORDS, outputs=[InferRequestedOutput("t", binary_data=binary)])
    assert call.rows == 2
    sent = [text.encode() for text in array.ravel()]
    assert elements(call.inputs[0].data) == sent
    got = receive(call, [strings("t", (2, 2), *sent)]).as_numpy("t")
    assert got.shape == (2, 2)
    assert [v if isinstance(v, bytes) else v.encode() for v in got.ravel()] == sent


@pytest.mark.parametrize("binary", [True, False])
def test_tensors_without_dims_go_there_and_come_back(binary):
    model = whole([spec("x", "FP64")], [spec("y", "FP64")])
    call = send(
        [client_input("x", "FP64", np.array(1.5), binary)],
        model,
        outputs=[InferRequestedOutput("y", binary_data=binary)],
    )
    assert (call.rows, call.inputs[0].shape) == (1, ())
    assert values(call.inputs[0]) == 1.5
    got = receive(call, [raw_output("y", "FP64", np.array(2.5))]).as_numpy("y")
    assert (got.shape, got.item()) == ((), 2.5)
