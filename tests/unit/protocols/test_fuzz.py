"""Whatever comes, only errors of our own that are the caller's fault escape, and they stay short."""

import base64
import copy
import math

import msgpack
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import bytestrings
from gateway.errors import GatewayError
from gateway.protocols import messagepack, tfserving, v2_infer
from gateway.protocols.call import check_call

from .support import (
    ANY_WORDS,
    DIGITS,
    MAX_BYTES,
    PAIR,
    WORDS,
    framed,
    optional,
    output,
    signature,
    spec,
    strings,
    unranked,
    whole,
)

fuzz = settings(deadline=None)  # a busy machine is no failure
SCALED = signature([spec("s", "BYTES", "N"), optional("x", "FP32", None, 4)])
FREE = whole([unranked("x", "FP32"), optional("ids", "INT64")])
SIGNATURES = st.sampled_from([DIGITS, PAIR, WORDS, ANY_WORDS, SCALED, FREE])
ANSWERS = {
    DIGITS: [output("y", "FP32", [[1, 2, 3, math.nan]])],
    PAIR: [output("label", "INT64", [1]), output("score", "FP32", [[1, 2, 3]])],
    WORDS: [strings("t", (1,), b"a")],
    ANY_WORDS: [strings("t", (1, 1), b"")],
    SCALED: [output("y", "FP32", [[1, 2, 3, 4]])],
    FREE: [output("y", "FP32", [1.5])],
}
SECRET = "s3cret/§"  # matches no grammar of ours: no message may hold it

V2 = [
    {
        "id": "a",
        "parameters": {"timeout": 7, "binary_data_output": True, "priority": 0},
        "inputs": [
            {
                "name": "ids",
                "shape": [1, 2],
                "datatype": "INT64",
                "parameters": {"binary_data_size": 16},
            },
            {"name": "mask", "shape": [1, 2], "datatype": "BOOL", "data": [[True], False]},
        ],
        "outputs": [{"name": "score", "parameters": {"binary_data": False}}, {"name": "label"}],
    },
    {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [1.5] * 8}]},
    {"inputs": [{"name": "s", "shape": [1, 2], "datatype": "BYTES", "data": [["a", "é"]]}]},
    {
        "inputs": [
            {"name": "s", "shape": [2], "datatype": "BYTES", "data": ["", "b"]},
            {"name": "x", "shape": [0, 4], "datatype": "FP32", "data": []},
        ]
    },
    {"inputs": [{"name": "x", "shape": [], "datatype": "FP32", "data": 1.5}]},
]
PREDICT = [
    {"signature_name": "", "instances": [[1, 2, 3, 4], [1, 2, 3, 4]]},
    {"instances": [{"inputs": {"x": [1, 2, 3, 4]}}]},
    {"instances": [{"ids": [1], "mask": [True]}, {"ids": [1], "mask": [True]}]},
    {"inputs": {"ids": [[1]], "mask": [[True]]}},
    {"instances": [["a", {"b64": "AA=="}]]},
    {"instances": [{"b64": "AA=="}]},
    {"inputs": {"s": ["a"], "x": [[1, 2, 3, 4]]}},
    {"inputs": {"x": 1.5, "ids": 2}},
]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([SECRET, "x", "ids", "FP32", "FP16", "BYTES", "triton_x", 2**63, -1, 0])
)
big = st.integers(2**64, 10**4000)
keys = st.sampled_from(
    ["id", "name", "shape", "data", "parameters", "binary_data_size", "inputs", "b64", SECRET]
) | st.text(max_size=4)
anything = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(keys, below, max_size=4),
    max_leaves=12,
)


def paths(value, here=()):
    """Where something can be put into a document: the path of every value in it."""
    yield here
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in items:
            yield from paths(below, (*here, key))


@st.composite
def changed(draw, documents, leaves=anything):
    """A good document of which up to three values are replaced, removed or added."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(paths(document))))
        if not path:
            continue
        parent = document
        for step in path[:-1]:
            parent = parent[step]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            parent[path[-1]] = draw(leaves)
        elif change == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(keys)] = draw(leaves)
        else:
            parent.append(draw(leaves))
    return document


@st.composite
def damaged(draw, bodies):
    """A good body with some of its bytes cut out, repeated or replaced."""
    body = bytearray(draw(bodies))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 8)))
        body[start:end] = draw(st.binary(max_size=6) | st.just(bytes(body[start:end]) * 2))
    return bytes(body)


def json_text(value):
    """JSON with the tokens, which orjson does not write."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, list):
        return f"[{','.join(map(json_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{json_text(k)}:{json_text(v)}" for k, v in value.items()) + "}"
    if type(value) is int:
        return str(value)
    return orjson.dumps(value).decode()


def survive(parse, against):
    """The checked call, or None where it was refused as the caller's mistake."""
    refusal = None
    try:
        call = parse()
        check_call(call, against, MAX_BYTES)
    except GatewayError as error:
        refusal = error
    if refusal is not None:
        assert 400 <= refusal.status < 500
        assert len(refusal.message) < 300
        assert "s3cret" not in refusal.message
        return None
    assert 1 <= call.rows <= max(1, against.max_batch_size)
    return call


def survive_v2(body, header_length, against):
    call = survive(lambda: v2_infer.parse_infer(body, header_length, against), against)
    if call is not None:
        v2_infer.encode_infer(call, "m", "1", ANSWERS[against])


def survive_predict(body, against):
    call = survive(lambda: tfserving.parse_predict(body, against)[0], against)
    if call is not None:
        for row in (True, False):
            tfserving.encode_predict(against, row, ANSWERS[against])


def survive_msgpack(body, against):
    call = survive(lambda: messagepack.parse_infer(body, against), against)
    if call is not None:
        messagepack.encode_infer(call, "m", "1", ANSWERS[against])


header_lengths = st.none() | st.integers(-2, 400).map(str) | st.text(max_size=5)


@fuzz
@given(st.binary(max_size=200), header_lengths, SIGNATURES)
def test_random_bytes(body, header_length, against):
    survive_v2(body, header_length, against)
    survive_predict(body, against)
    survive_msgpack(body, against)


@fuzz
@given(changed(V2, anything | big), st.booleans(), SIGNATURES)
def test_changed_v2(document, with_header, against):
    text = json_text(document).encode()
    survive_v2(text + bytes(16), str(len(text)) if with_header else None, against)
    survive_v2(text, str(len(text)) if with_header else None, against)


@fuzz
@given(damaged(changed(V2).map(lambda document: json_text(document).encode())), header_lengths)
def test_damaged_v2(body, header_length):
    survive_v2(body, header_length, PAIR)


@fuzz
@given(damaged(st.just(framed(V2[0], bytes(16))[0])))
def test_damaged_binary_v2(body):
    survive_v2(body, framed(V2[0])[1], PAIR)


@fuzz
@given(changed(PREDICT, anything | big), SIGNATURES)
def test_changed_predict(document, against):
    survive_predict(json_text(document).encode(), against)


@fuzz
@given(damaged(changed(PREDICT).map(lambda document: json_text(document).encode())), SIGNATURES)
def test_damaged_predict(body, against):
    survive_predict(body, against)


msgpack_leaves = (
    anything
    | st.binary(max_size=16)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**33))
)


@fuzz
@given(changed(V2, msgpack_leaves), SIGNATURES)
def test_changed_msgpack(document, against):
    survive_msgpack(msgpack.packb(document), against)


@fuzz
@given(damaged(changed(V2, msgpack_leaves).map(msgpack.packb)), SIGNATURES)
def test_damaged_msgpack(body, against):
    survive_msgpack(body, against)


@pytest.mark.parametrize("document", [V2[1], PREDICT[0]])
def test_the_unchanged_documents_are_good(document):
    if "instances" in document:
        assert survive(
            lambda: tfserving.parse_predict(json_text(document).encode(), DIGITS)[0], DIGITS
        )
    else:
        assert survive(
            lambda: v2_infer.parse_infer(json_text(document).encode(), None, DIGITS), DIGITS
        )
        assert survive(lambda: messagepack.parse_infer(msgpack.packb(document), DIGITS), DIGITS)


@st.composite
def any_strings(draw, elements):
    """A shape and its elements."""
    shape = draw(st.lists(st.integers(0, 3), max_size=4).map(tuple))
    count = math.prod(shape)
    return shape, draw(st.lists(elements, min_size=count, max_size=count))


def nest(values, shape):
    """The values as lists of the shape."""
    if not shape:
        return values[0]
    step = math.prod(shape[1:])
    return [nest(values[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def v2_input(shape, data):
    return {"inputs": [{"name": "s", "shape": shape, "datatype": "BYTES", "data": data}]}


def checked(call):
    """The elements of the call's one input, and its shape."""
    check_call(call, ANY_WORDS, MAX_BYTES)
    return call.inputs[0].shape, bytestrings.elements(call.inputs[0].data)


@fuzz
@given(any_strings(st.text(max_size=6)))
def test_text_in_json_there_and_back(tensor):
    shape, texts = tensor
    raw = [text.encode() for text in texts]
    for data in (texts, nest(texts, shape) if shape else texts):
        body = orjson.dumps(v2_input(shape, data))
        call = v2_infer.parse_infer(body, None, ANY_WORDS)
        assert checked(call) == (shape, raw)
    body, _ = v2_infer.encode_infer(call, "m", "1", [strings("t", shape, *raw)])
    assert orjson.loads(body)["outputs"][0]["data"] == texts
    assert orjson.loads(body)["outputs"][0]["shape"] == list(shape)


@fuzz
@given(any_strings(st.binary(max_size=6)))
def test_bytes_in_binary_there_and_back(tensor):
    shape, raw = tensor
    data = bytestrings.serialise(raw)
    document = v2_input(shape, None)
    document["inputs"][0] = {
        **{k: v for k, v in document["inputs"][0].items() if k != "data"},
        "parameters": {"binary_data_size": len(data)},
    }
    document["parameters"] = {"binary_data_output": True}
    body, length = framed(document, data)
    call = v2_infer.parse_infer(body, length, ANY_WORDS)
    assert checked(call) == (shape, raw)
    body, length = v2_infer.encode_infer(call, "m", "1", [strings("t", shape, *raw)])
    assert bytestrings.elements(memoryview(body)[length:]) == raw


@fuzz
@given(any_strings(st.binary(max_size=6)))
def test_bytes_in_msgpack_there_and_back(tensor):
    shape, raw = tensor
    forms = [raw, bytestrings.serialise(raw), nest(raw, shape) if shape else raw]
    for data in forms:
        call = messagepack.parse_infer(msgpack.packb(v2_input(shape, data)), ANY_WORDS)
        assert checked(call) == (shape, raw)
    body = messagepack.encode_infer(call, "m", "1", [strings("t", shape, *raw)])
    (entry,) = msgpack.unpackb(body)["outputs"]
    assert (tuple(entry["shape"]), entry["data"]) == (shape, raw)


@fuzz
@given(any_strings(st.binary(max_size=6)), st.sampled_from(["t", "t_bytes"]))
def test_bytes_in_predict_there_and_back(tensor, name):
    shape, raw = tensor
    if 0 in shape[:-1]:
        return  # the dims behind a zero are not seen
    against = whole([unranked("s", "BYTES")], [unranked(name, "BYTES")])
    encoded = [{"b64": base64.b64encode(value).decode()} for value in raw]
    body = orjson.dumps({"inputs": {"s": nest(encoded, shape)}})
    call, row = tfserving.parse_predict(body, against)
    assert not row
    assert checked(call) == (shape, raw)
    answer = tfserving.encode_predict(against, False, [strings(name, shape, *raw)])
    back, _ = tfserving.parse_predict(
        orjson.dumps({"inputs": {"s": orjson.loads(answer)["outputs"]}}), against
    )
    assert checked(back) == (shape, raw)
