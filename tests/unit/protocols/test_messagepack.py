import resource
import struct
import time

import msgpack
import numpy as np
import pytest

from gateway.bytestrings import elements, serialise
from gateway.errors import InvalidRequest
from gateway.protocols.call import InferCall, WantedOutput, check_call
from gateway.protocols.messagepack import encode_infer, parse_infer
from gateway.tensors import DATATYPES

from .support import (
    ANY_WORDS,
    BINARY_ONLY,
    DIGITS,
    FIXED_SIZE,
    IN_JSON,
    MAX_BYTES,
    WORDS,
    nested,
    output,
    request,
    signature,
    spec,
    strings,
    whole,
    with_input,
)


def refusal(document, against=DIGITS):
    body = document if isinstance(document, bytes) else msgpack.packb(document)
    with pytest.raises(InvalidRequest) as caught:
        check_call(parse_infer(body, against), against, MAX_BYTES)
    return caught.value.message


def one_input(datatype, data, shape=(1, 2)):
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]}


@pytest.mark.parametrize("datatype", FIXED_SIZE, ids=lambda t: t.name)
@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_every_datatype_as_bin(datatype, wrap):
    raw = np.array([0, 1], datatype.dtype).tobytes()
    against = signature([spec("x", datatype.name, "N", 2)], [spec("y", datatype.name, "N")])
    call = parse_infer(wrap(msgpack.packb(one_input(datatype.name, raw))), against)
    check_call(call, against, MAX_BYTES)
    assert isinstance(call.inputs[0].data, memoryview)
    assert bytes(call.inputs[0].data) == raw


@pytest.mark.parametrize("datatype", IN_JSON, ids=lambda t: t.name)
def test_every_datatype_as_array(datatype):
    values = np.array([[0, 1]], datatype.dtype).tolist()
    against = signature([spec("x", datatype.name, "N", 2)])
    call = parse_infer(msgpack.packb(one_input(datatype.name, values)), against)
    check_call(call, against, MAX_BYTES)
    assert call.inputs[0].data == values


@pytest.mark.parametrize("datatype", BINARY_ONLY, ids=lambda t: t.name)
def test_binary_only_datatypes_as_array(datatype):
    against = signature([spec("x", datatype.name, "N", 2)])
    assert "use binary data" in refusal(one_input(datatype.name, [1, 2]), against)


def words(shape, data):
    return {"inputs": [{"name": "s", "datatype": "BYTES", "shape": shape, "data": data}]}


@pytest.mark.parametrize(
    "data",
    [
        [b"\xff\0", b"", b"c", "é".encode()],
        [[b"\xff\0", ""], ["c", "é"]],
        serialise([b"\xff\0", b"", b"c", "é".encode()]),
    ],
    ids=["flat", "nested", "raw"],
)
def test_strings(data):
    call = parse_infer(msgpack.packb(words([2, 2], data)), WORDS)
    check_call(call, WORDS, MAX_BYTES)
    assert elements(call.inputs[0].data) == [b"\xff\0", b"", b"c", "é".encode()]


@pytest.mark.parametrize("data", [[b"one"], "one", serialise([b"one"])])
def test_a_string_without_dims(data):
    call = parse_infer(msgpack.packb(words([], data)), ANY_WORDS)
    check_call(call, ANY_WORDS, MAX_BYTES)
    assert elements(call.inputs[0].data) == [b"one"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([b"a"], "expected 2 strings for shape [1,2], got 1"),
        ([b"a", 1], "element 1: expected a string, got an integer"),
        ([b"a", msgpack.Timestamp(0)], "element 1: expected a string, got an unsupported value"),
        (b"a\0", "expected 2 strings for shape [1,2], but the data end within a length"),
        ("ab", "'data' must be an array"),
        (nested(101), "'data' nests deeper than 100 levels"),
    ],
)
def test_strings_that_are_refused(data, message):
    assert refusal(words([1, 2], data), WORDS) == f"input 's': {message}"


@pytest.mark.parametrize("data", [1.5, [1.5], struct.pack("<f", 1.5)])
def test_a_number_without_dims(data):
    model = whole([spec("x", "FP32")])
    call = parse_infer(msgpack.packb(one_input("FP32", data, [])), model)
    check_call(call, model, MAX_BYTES)
    assert call.inputs[0].data in ([1.5], struct.pack("<f", 1.5))


def test_answers_hold_strings_in_a_flat_array():
    outputs = [strings("t", (2, 1), b"\xff", b""), strings("u", (0,))]
    answer = msgpack.unpackb(encode_infer(InferCall([]), "m", "2", outputs))
    assert answer["outputs"] == [
        {"name": "t", "datatype": "BYTES", "shape": [2, 1], "data": [b"\xff", b""]},
        {"name": "u", "datatype": "BYTES", "shape": [0], "data": []},
    ]


def test_the_fields_are_those_of_v2():
    call = parse_infer(
        msgpack.packb(
            request(
                id="é",
                parameters={"timeout": 9, "priority": 2, "binary_data_output": False},
                outputs=[{"name": "y", "parameters": {"binary_data": False}}],
            )
        ),
        DIGITS,
    )
    assert (call.id, call.timeout_us, call.priority, call.binary_outputs) == ("é", 9, 2, True)
    assert call.outputs == [WantedOutput("y", binary=True)]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "must be an object"),
        (with_input(data=None), "needs 'data' or 'binary_data_size'"),
        (with_input(data="text"), "'data' must be an array"),
        (with_input(data=bytes(31)), "expected 32 bytes of data for shape [2,4], got 31"),
        (with_input(data=None, parameters={"binary_data_size": 32}), "0 are left"),
        (with_input(name=b"x"), "string 'name'"),
        (with_input(shape=b"\x02\x04"), "'shape' must be an array"),
        (request(id=b"x"), "'id' must be a string"),
        (request(parameters={"a": b"x"}), "parameter 'a' must be a string"),
        (request(parameters={"triton_a": 1}), "reserved"),
        (request(other=nested(101)), "deeper than 100 levels"),
    ],
)
def test_refusals_of_fields(document, message):
    assert message in refusal(document)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends after 0 bytes"),
        (msgpack.packb(request()) + b"\x00\x00", "2 bytes are left over"),
        (b"\xc1", "not allowed"),
        (b"\x81\xa1a\xc1", "not allowed"),
        (b"\x81\xa1a\xa1\xff", "not UTF-8"),
        (b"\x81\x01\x01", "not allowed"),
        (b"\x81\xc0\x01", "not allowed"),
        (b"\x81\x90\x01", "not allowed"),
        (b"\x81\xc4\x01a\x01", "keys of a map must be strings"),
        (b"\x82\xa1a\x01\xa1a\x02", "holds a key twice"),
        (b"\x81\xa1b\x82\xa1a\x01\xa1a\x02", "holds a key twice"),
        (b"\x81\xa1a\xd4\x05a", "extension types"),
        (b"\x81\xa1a\xd6\xff\0\0\0\0", "unsupported type"),  # a timestamp
        (b"\x81\xa1a\x91\xd6\xff\0\0\0\0", "unsupported type"),
        (b"\xd6\xff\0\0\0\0", "must be an object"),
        (b"\x81\xa1a\xd7\xff\xff\xff\xff\xff\0\0\0\0", "not allowed"),  # of 2^30 ns
        (b"\x91" * 2000 + b"\xc0", "nests too deep"),
        (b"\xdd\xff\xff\xff\xff", "ends after 5 bytes"),
        (b"\xdf\xff\xff\xff\xff", "ends after 5 bytes"),
        (b"\xdb\xff\xff\xff\xff", "ends after 5 bytes"),
        (b"\xc6\xff\xff\xff\xff", "ends after 5 bytes"),
        (b"\xc9\xff\xff\xff\xff\x05", "malformed msgpack"),
    ],
)
def test_refusals_of_bodies(body, message):
    assert message in refusal(body)


def test_a_timestamp_in_a_field_that_is_read():
    stamp = msgpack.Timestamp(0)
    for document in (
        with_input(shape=[stamp, 4]),
        with_input(name=stamp),
        with_input(data=stamp),
        request(parameters={"timeout": stamp}),
        request(id=stamp),
    ):
        refusal(document)


def test_every_truncation_is_refused():
    body = msgpack.packb(with_input(data=bytes(32)))
    for length in range(len(body)):
        assert "ends after" in refusal(body[:length])


def test_headers_that_promise_too_much_cost_nothing():
    promise = b"\xdd" + struct.pack(">I", 1 << 20)
    body = promise * 900 + bytes(1 << 20)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    for _ in range(20):
        assert "ends after" in refusal(body)
    # Allocating what the headers promise would touch 7 GiB of zeros, twenty times.
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10


def test_answers_hold_bin():
    outputs = [output("label", "INT64", [3]), output("score", "FP16", [[0.5, 1]])]
    call = InferCall([], id="7", outputs=[WantedOutput("score", True), WantedOutput("label", True)])
    assert msgpack.unpackb(encode_infer(call, "m", "2", outputs)) == {
        "id": "7",
        "model_name": "m",
        "model_version": "2",
        "outputs": [
            {
                "name": "score",
                "datatype": "FP16",
                "shape": [1, 2],
                "data": np.array([0.5, 1], "f2").tobytes(),
            },
            {"name": "label", "datatype": "INT64", "shape": [1], "data": struct.pack("<q", 3)},
        ],
    }
    answer = msgpack.unpackb(encode_infer(InferCall([]), "m", "2", outputs))
    assert [entry["name"] for entry in answer["outputs"]] == ["label", "score"]
    assert "id" not in answer


def test_an_answer_is_a_request_of_the_same_tensors():
    outputs = [output("x", "FP32", [[1, 2, 3, 4]])]
    answer = msgpack.unpackb(encode_infer(InferCall([]), "m", "1", outputs))
    call = parse_infer(msgpack.packb({"inputs": answer["outputs"]}), DIGITS)
    check_call(call, DIGITS, MAX_BYTES)
    assert call.inputs[0].datatype is DATATYPES["FP32"]
