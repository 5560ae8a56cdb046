import math
import struct

import numpy as np
import orjson
import pytest

from gateway.bytestrings import elements, serialise
from gateway.errors import InvalidRequest, TooLarge
from gateway.protocols.call import InferCall, WantedOutput, check_call
from gateway.protocols.strings import MAX_STRINGS
from gateway.protocols.v2_infer import (
    MAX_TIMEOUT_US,
    encode_infer,
    parse_infer,
)

from .support import (
    ANY_WORDS,
    DIGITS,
    IN_JSON,
    MAX_BYTES,
    PAIR,
    WORDS,
    framed,
    nested,
    optional,
    output,
    request,
    signature,
    spec,
    strings,
    unranked,
    whole,
    with_input,
)


def parse(document, against=DIGITS):
    return parse_infer(orjson.dumps(document), None, against)


def refusal(document, against=DIGITS, header_length=None):
    body = document if isinstance(document, bytes) else orjson.dumps(document)
    with pytest.raises(InvalidRequest) as caught:
        check_call(parse_infer(body, header_length, against), against, MAX_BYTES)
    return caught.value.message


def test_json():
    call = parse(request())
    (tensor,) = call.inputs
    assert (tensor.name, tensor.datatype.name, tensor.shape) == ("x", "FP32", (2, 4))
    assert tensor.data == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not tensor.strict
    assert (call.id, call.outputs, call.binary_outputs, call.timeout_us) == (
        None, None, False, None,
    )  # fmt: skip


def test_nested_data_is_left_to_the_kernel():
    assert parse(with_input(data=[[1, 2], [3]])).inputs[0].data == [[1, 2], [3]]


def test_tokens_in_data():
    data = (
        parse_infer(
            b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[NaN,-Infinity,1]}]}',
            None,
            DIGITS,
        )
        .inputs[0]
        .data
    )
    assert math.isnan(data[0])
    assert data[1:] == [-math.inf, 1]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be an object"),
        (None, "must be an object"),
        ({}, "array 'inputs'"),
        (request(inputs={}), "array 'inputs'"),
        (request(inputs=[]), "expected 1 inputs but got 0, missing: 'x'"),
        (request(inputs=[7]), "must be an object"),
        (with_input(name=None), "string 'name'"),
        (with_input(name=7), "string 'name'"),
        (with_input(shape=None), "input 'x': 'shape' must be an array of integers"),
        (with_input(shape=[2, "4"]), "input 'x': 'shape' must be an array of integers"),
        (with_input(shape=[2, 4.0]), "input 'x': 'shape' must be an array of integers"),
        (with_input(shape=[2, True]), "input 'x': 'shape' must be an array of integers"),
        (with_input(shape={"a": 1}), "input 'x': 'shape' must be an array of integers"),
        (with_input(shape=[1] * 9), "'shape' has 9 dims, at most 8"),
        (with_input(shape=[-2, 4]), "negative dim"),
        (with_input(shape=[2**40, 2**40]), "expected [-1,4]"),
        (with_input(datatype=None), "input 'x': 'datatype' must be one of BOOL,"),
        (with_input(datatype="fp32"), "'datatype' must be one of"),
        (with_input(datatype=["FP32"]), "'datatype' must be one of"),
        (with_input(datatype="INT8"), "has datatype INT8, expected FP32"),
        (with_input(datatype="BYTES"), "input 'x': element 0: expected a string, got an integer"),
        (with_input(datatype="BYTES", data=["a"] * 8), "has datatype BYTES, expected FP32"),
        (with_input(shape=[], data=None), "needs 'data' or 'binary_data_size'"),
        (with_input(shape=[], data={}), "'data' must be an array"),
        (with_input(shape=[]), "unexpected shape for input 'x': expected [-1,4], got []"),
        (with_input(parameters={"triton_x": 1}), "input 'x': parameter 'triton_x': names with"),
        (
            request(outputs=[{"name": "y", "parameters": {"triton_y": True}}]),
            "output 'y': parameter 'triton_y': names with 'triton_' are reserved",
        ),
        (with_input(data=None), "input 'x': needs 'data' or 'binary_data_size'"),
        (with_input(data="abcd"), "input 'x': 'data' must be an array"),
        (with_input(data=5), "input 'x': 'data' must be an array"),
        (with_input(data={}), "input 'x': 'data' must be an array"),
        (with_input(parameters=[]), "input 'x': 'parameters' must be an object"),
        (with_input(parameters={"a": {}}), "input 'x': parameter 'a' must be a string"),
        (with_input(parameters={"binary_data_size": 32}), "exclude each other"),
        (
            with_input(data=None, parameters={"shared_memory_region": "r"}),
            "input 'x': 'shared_memory_region': client shared memory is not enabled",
        ),
        (request(outputs={}), "'outputs' must be an array"),
        (request(outputs=["y"]), "must be an object"),
        (request(outputs=[{}]), "string 'name'"),
        (request(outputs=[{"name": "z"}]), "unexpected inference output 'z'"),
        (request(outputs=[{"name": "y"}, {"name": "y"}]), "requested twice"),
        (request(outputs=[{"name": "y", "parameters": 1}]), "output 'y': 'parameters' must be"),
        (
            request(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
            "output 'y': parameter 'binary_data' must be a boolean",
        ),
        (
            request(outputs=[{"name": "y", "parameters": {"classification": 3}}]),
            "output 'y': 'classification' is not supported",
        ),
        (
            request(outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]),
            "output 'y': 'shared_memory_region': client shared memory is not enabled",
        ),
        (request(id=7), "'id' must be a string"),
        (request(id=["a"]), "'id' must be a string"),
        (request(parameters=[]), "'parameters' must be an object"),
        (request(parameters={"a": {"b": 1}}), "parameter 'a' must be a string"),
        (request(parameters={"a": [1]}), "parameter 'a' must be a string"),
        (request(parameters={"a b": [1]}), "parameter <name not shown> must be a string"),
        (request(parameters={"triton_x": 1}), "parameter 'triton_x': names with 'triton_'"),
        (request(parameters={"timeout": -1}), "'timeout' must be an unsigned"),
        (request(parameters={"timeout": 1.5}), "'timeout' must be an unsigned"),
        (request(parameters={"timeout": True}), "'timeout' must be an unsigned"),
        (request(parameters={"timeout": "1"}), "'timeout' must be an unsigned"),
        (request(parameters={"priority": -1}), "'priority' must be an unsigned"),
        (request(parameters={"priority": "high"}), "'priority' must be an unsigned"),
        (request(parameters={"binary_data_output": 1}), "must be a boolean"),
        (request(parameters={"sequence_id": 3}), "'sequence_id': sequences are not supported"),
        (request(parameters={"sequence_id": "s"}), "sequences are not supported"),
        (request(parameters={"sequence_start": True}), "sequences are not supported"),
        (request(parameters={"sequence_end": True}), "sequences are not supported"),
    ],
)
def test_refusals(document, message):
    assert message in refusal(document)


def test_names_of_the_model_are_shown_in_refusals():
    odd = signature([spec("a/b:0", "FP32", "N", 4)])
    assert refusal(with_input(name="a/b:0", data=5), odd).startswith("input 'a/b:0':")
    assert refusal(with_input(name="a/b:1", data=5), odd).startswith("input <name not shown>:")


def test_null_is_not_absent():
    for field in ("id", "parameters", "outputs"):
        refusal(orjson.dumps(request()).replace(b"{", b'{"%b":null,' % field.encode(), 1))


def test_what_is_accepted_and_ignored():
    call = parse(
        {
            **request(),
            "comment": {"any": [1, {}]},
            "parameters": {
                "priority": 1, "sequence_id": 0, "sequence_start": False, "sequence_end": False,
                "mine": "x", "headers": "y", "ratio": 0.5,
            },
            "outputs": [{"name": "y", "note": [], "parameters": {"classification": 0}}],
        }
    )  # fmt: skip
    check_call(call, DIGITS, MAX_BYTES)
    assert call.outputs == [WantedOutput("y", binary=False)]


@pytest.mark.parametrize(
    "document",
    [
        request(other=nested(101)),
        with_input(other=nested(101)),
        request(outputs=[{"name": "y", "other": nested(101)}]),
        request(other={"a": nested(100)}),
        request(parameters={"other": nested(101)}),
        with_input(shape=nested(101)),
    ],
)
def test_depth_anywhere_but_in_data(document):
    refusal(document)


def test_depth_below_the_limit_is_fine():
    check_call(parse(request(other=nested(100))), DIGITS, MAX_BYTES)


def test_id_is_kept_and_must_be_text():
    assert parse(request(id="é\0")).id == "é\0"
    assert parse(request(id="")).id == ""
    body = b'{"id":"\\ud800","inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}'
    assert refusal(body) == "'id' must be Unicode text"


@pytest.mark.parametrize(
    ("sent", "kept"), [(0, None), (1, 1), (10**6, 10**6), (2**64 - 1, MAX_TIMEOUT_US)]
)
def test_timeout(sent, kept):
    assert parse(request(parameters={"timeout": sent})).timeout_us == kept


@pytest.mark.parametrize("level", [0, 1, 2**64 - 1])
def test_priority(level):
    assert parse(request(parameters={"priority": level})).priority == level
    assert parse(request()).priority == 0


def one_input(name, datatype, shape, data):
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]}


@pytest.mark.parametrize("data", [7, [7], [[7]]])
def test_a_tensor_without_dims(data):
    model = whole([spec("x", "INT64")])
    call = parse(one_input("x", "INT64", [], data), model)
    check_call(call, model, MAX_BYTES)
    assert np.array(call.inputs[0].data).ravel().tolist() == [7]
    assert call.inputs[0].shape == ()
    assert isinstance(call.inputs[0].data, list)


def test_a_tensor_without_elements():
    model = whole([unranked("x", "FP64")])
    call = parse(one_input("x", "FP64", [2, 0, 3], []), model)
    check_call(call, model, MAX_BYTES)
    assert (call.inputs[0].shape, call.inputs[0].data) == ((2, 0, 3), [])


@pytest.mark.parametrize(
    "data", [["a", "é\0", "", "d"], [["a", "é\0"], ["", "d"]], [["a"], "é\0", [["", "d"]]]]
)
def test_strings_in_json(data):
    call = parse(one_input("s", "BYTES", [2, 2], data), WORDS)
    check_call(call, WORDS, MAX_BYTES)
    assert elements(call.inputs[0].data) == [b"a", "é\0".encode(), b"", b"d"]


@pytest.mark.parametrize("data", ["one", ["one"]])
def test_a_string_without_dims(data):
    call = parse(one_input("s", "BYTES", [], data), ANY_WORDS)
    check_call(call, ANY_WORDS, MAX_BYTES)
    assert elements(call.inputs[0].data) == [b"one"]


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ([1, 2], ["a"], "input 's': expected 2 strings for shape [1,2], got 1"),
        ([1, 2], [["a", "b", "c"]], "input 's': expected 2 strings for shape [1,2], got 3"),
        ([1, 2], ["a", 1], "input 's': element 1: expected a string, got an integer"),
        ([1, 2], [["a"], [None]], "input 's': element 1: expected a string, got null"),
        ([1, 2], [{"b64": "AA=="}, "b"], "input 's': element 0: expected a string, got an object"),
        ([1, 2], [True, "b"], "input 's': element 0: expected a string, got a boolean"),
        ([1, 2], [0.5, "b"], "input 's': element 0: expected a string, got a float"),
        ([1, 2], "ab", "input 's': 'data' must be an array"),
        ([1, 2], nested(101), "input 's': 'data' nests deeper than 100 levels"),
        ([1, 2], [["a", ["b"]], [["c"]]], "input 's': expected 2 strings for shape [1,2], got 3"),
        ([1, 2], [[]], "input 's': expected 2 strings for shape [1,2], got 0"),
        ([0, 2], ["a"], "input 's': expected 0 strings for shape [0,2], got 1"),
        ([-1, -2], ["a", "b"], "input 's': 'shape' has a negative dim"),
        ([1, 3], ["a"] * 3, "unexpected shape for input 's': expected [-1,2], got [1,3]"),
    ],
)
def test_strings_that_are_refused(shape, data, message):
    assert refusal(one_input("s", "BYTES", shape, data), WORDS) == message


def test_strings_nest_up_to_the_limit():
    call = parse(one_input("s", "BYTES", [0], nested(100)), ANY_WORDS)
    check_call(call, ANY_WORDS, MAX_BYTES)


@pytest.mark.parametrize("shape", [[MAX_STRINGS + 1], [0, MAX_STRINGS + 1], [2**62, 2**62]])
@pytest.mark.parametrize("data", [["a"], b"\1\0\0\0a"], ids=["json", "binary"])
def test_a_request_of_too_many_strings(shape, data):
    document = one_input("s", "BYTES", shape, data)
    raw = data if isinstance(data, bytes) else b""
    if raw:
        del document["inputs"][0]["data"]
        document["inputs"][0]["parameters"] = {"binary_data_size": len(raw)}
    body, length = framed(document, raw)
    shown = "over 2^63-1" if max(shape) == 2**62 else str(MAX_STRINGS + 1)
    with pytest.raises(TooLarge) as caught:
        parse_infer(body, length, ANY_WORDS)
    assert caught.value.message == (
        f"the request holds {shown} strings or more, the limit is {MAX_STRINGS}: send it in parts"
    )


def test_strings_are_limited_by_the_request_and_not_by_the_tensor():
    half = one_input("s", "BYTES", [MAX_STRINGS // 2], [""] * (MAX_STRINGS // 2))
    (entry,) = half["inputs"]
    call = parse({"inputs": [entry, entry]}, ANY_WORDS)
    assert [len(tensor.data) for tensor in call.inputs] == [MAX_STRINGS * 2] * 2
    one = {**entry, "shape": [1], "data": [""]}
    with pytest.raises(TooLarge):
        parse({"inputs": [entry, entry, one]}, ANY_WORDS)


def test_strings_in_too_many_lists():
    data = ["a"] * 100
    for _ in range(8):
        data = [[item] for item in data]
    parse(one_input("s", "BYTES", [100], data), ANY_WORDS)
    for _ in range(2):
        data = [[item] for item in data]
    assert refusal(one_input("s", "BYTES", [100], data), ANY_WORDS) == (
        "input 's': expected 100 strings for shape [100], got more lists than they need"
    )


def test_text_that_is_not_unicode():
    body = orjson.dumps(one_input("s", "BYTES", [3], ["a", "NaN"]))
    assert refusal(body.replace(b'"NaN"', b'"\\ud800",NaN'), ANY_WORDS) == (
        "input 's': element 1: a string must be Unicode text"
    )


def test_strings_in_binary():
    raw = serialise([b"\xff\0", b""])
    document = one_input("s", "BYTES", [1, 2], None)
    del document["inputs"][0]["data"]
    document["inputs"][0]["parameters"] = {"binary_data_size": len(raw)}
    body, length = framed(document, raw)
    call = parse_infer(body, length, WORDS)
    check_call(call, WORDS, MAX_BYTES)
    assert bytes(call.inputs[0].data) == raw
    body, length = framed(document, raw[:-4], serialise([b""])[:3], b"\1")
    assert "but the data end within a string" in refusal(body, WORDS, length)


def test_wanted_outputs_take_the_requests_default():
    outputs = [
        {"name": "label"},
        {"name": "score", "parameters": {"binary_data": False}},
    ]
    call = parse(request(outputs=outputs, parameters={"binary_data_output": True}), PAIR)
    assert call.outputs == [WantedOutput("label", True), WantedOutput("score", False)]
    call = parse(request(outputs=outputs), PAIR)
    assert call.outputs == [WantedOutput("label", False), WantedOutput("score", False)]


def test_no_outputs_named_means_all():
    call = parse(request(outputs=[], parameters={"binary_data_output": True}))
    assert call.outputs is None
    assert call.binary_outputs


def binary_pair(ids_size, mask_size):
    def entry(name, datatype, size):
        parameters = {"binary_data_size": size}
        return {"name": name, "shape": [1, 2], "datatype": datatype, "parameters": parameters}

    return {"inputs": [entry("ids", "INT64", ids_size), entry("mask", "BOOL", mask_size)]}


@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_binary_inputs_follow_in_order(wrap):
    ids = struct.pack("<qq", 7, -7)
    body, length = framed(binary_pair(16, 2), ids, b"\x01\x00")
    call = parse_infer(wrap(body), length, PAIR)
    check_call(call, PAIR, MAX_BYTES)
    assert [bytes(tensor.data) for tensor in call.inputs] == [ids, b"\x01\x00"]
    assert isinstance(call.inputs[0].data, memoryview)
    assert call.inputs[0].data.obj is body


def test_json_and_binary_inputs_mix():
    document = binary_pair(16, 2)
    document["inputs"][0].pop("parameters")
    document["inputs"][0]["data"] = [1, 2]
    body, length = framed(document, b"\x01\x00")
    call = parse_infer(body, length, PAIR)
    check_call(call, PAIR, MAX_BYTES)
    assert call.inputs[0].data == [1, 2]
    assert bytes(call.inputs[1].data) == b"\x01\x00"


def test_header_over_an_all_json_body():
    body, length = framed(request())
    assert parse_infer(body, length, DIGITS).inputs[0].data[0] == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (bytes(17), "input 'mask': expected 2 bytes of binary data, 1 are left"),
        (b"", "input 'ids': expected 16 bytes of binary data, 0 are left"),
        (bytes(21), "3 bytes are left over after the last input"),
    ],
)
def test_binary_part_of_the_wrong_length(raw, message):
    body, length = framed(binary_pair(16, 2), raw)
    assert refusal(body, PAIR, length) == message


def test_integers_of_thousands_of_digits_are_not_echoed():
    digits = "9" * 4000
    for entry in (
        '"parameters":{"binary_data_size":%s}',
        '"data":[NaN],"shape":[%s,4]',
        '"data":[NaN],"shape":[1,-%s]',
        '"data":[NaN],"parameters":{"binary_data_size":%s}',
    ):
        shape = "" if "shape" in entry else '"shape":[1,4],'
        body = '{"note":NaN,"inputs":[{"name":"x","datatype":"FP32",%s%s}]}'
        assert len(refusal((body % (shape, entry % digits)).encode())) < 100
    body = '{"note":NaN,"inputs":[],"parameters":{"timeout":' + digits + "}}"
    assert "'timeout' must be an unsigned" in refusal(body.encode())


@pytest.mark.parametrize("size", [-1, "16", 16.0, True, None])
def test_binary_data_size_is_a_size(size):
    body, length = framed(binary_pair(size, 2), bytes(18))
    assert "ids" in refusal(body, PAIR, length)


def test_binary_size_against_shape():
    body, length = framed(binary_pair(15, 3), bytes(18))
    assert refusal(body, PAIR, length) == (
        "input 'ids': expected 16 bytes of data for shape [1,2], got 15"
    )


def test_binary_data_size_without_a_binary_part():
    assert "expected 16 bytes of binary data, 0 are left" in refusal(binary_pair(16, 2), PAIR)


@pytest.mark.parametrize(
    "length",
    ["99999999999", "9" * 5000, "-1", "+1", " 1", "1 ", "", "1.0", "0x1", "1_0", "١", "²", "a"],
)
def test_header_length_that_is_none(length):
    body, _ = framed(request())
    assert refusal(body, DIGITS, length).startswith("Inference-Header-Content-Length")


def test_header_length_that_cuts_the_json():
    body, length = framed(request())
    assert "malformed JSON" in refusal(body, DIGITS, str(int(length) - 1))


def test_raw_mode_with_fixed_dims():
    call = parse_infer(bytes(16), "0", DIGITS)
    check_call(call, DIGITS, MAX_BYTES)
    assert (call.rows, call.inputs[0].shape, call.binary_outputs) == (1, (1, 4), True)
    assert refusal(bytes(20), DIGITS, "0") == (
        "input 'x': expected 16 bytes of data for shape [1,4], got 20"
    )


def test_raw_mode_with_a_variable_dim():
    wide = signature([spec("x", "INT16", "N", 3, "T")])
    call = parse_infer(bytes(30), "0", wide)
    check_call(call, wide, MAX_BYTES)
    assert call.inputs[0].shape == (1, 3, 5)
    assert refusal(bytes(31), wide, "0") == "input 'x': expected a multiple of 6 bytes, got 31"
    assert parse_infer(b"", "0", wide).inputs[0].shape == (1, 3, 0)


def test_raw_mode_of_one_element():
    scalar = signature([spec("x", "FP64", "N")])
    assert parse_infer(bytes(8), "00", scalar).inputs[0].shape == (1,)


def test_raw_mode_needs_one_plain_input():
    assert "one required input, this one has 2" in refusal(bytes(8), PAIR, "0")
    wide = signature([spec("x", "INT16", "N", None, "T")])
    assert "at most one variable dim, 'x' has 2" in refusal(bytes(8), wide, "0")
    assert refusal(b"a", WORDS, "0") == "a raw request holds one string, input 's' takes several"
    lone = signature([optional("x", "FP32")])
    assert "one required input, this one has 0" in refusal(bytes(4), lone, "0")


@pytest.mark.parametrize(
    ("declared", "shape"), [((), ()), ((2, 3), (2, 3)), (("N", 2), (3, 2)), (("N",), (6,))]
)
def test_raw_mode_of_whole_models(declared, shape):
    model = whole([spec("x", "INT16", *declared), optional("o", "FP32")])
    call = parse_infer(bytes(2 * math.prod(shape)), "0", model)
    check_call(call, model, MAX_BYTES)
    assert (call.rows, call.inputs[0].shape) == (1, shape)
    assert len(call.inputs) == 1


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (signature([spec("s", "BYTES", "N")]), (1,)),
        (signature([spec("s", "BYTES", "N", 1)]), (1, 1)),
        (signature([spec("s", "BYTES", "N", "T")]), (1, 1)),
        (whole([spec("s", "BYTES", 1)]), (1,)),
        (whole([spec("s", "BYTES", "N")]), (1,)),
        (whole([spec("s", "BYTES")]), ()),
        (ANY_WORDS, (1,)),
    ],
)
@pytest.mark.parametrize("body", [b"", b"\xff\0 a string \x05\0\0\0"])
def test_raw_mode_of_a_string(model, shape, body):
    call = parse_infer(body, "0", model)
    check_call(call, model, MAX_BYTES)
    assert call.inputs[0].shape == shape
    assert elements(call.inputs[0].data) == [body]


OUTPUTS = [output("label", "INT64", [3, 4]), output("score", "FP32", [[0.5, 1, 2], [3, 4, 5]])]


def test_encode_json():
    body, header_length = encode_infer(InferCall([]), "m", "3", OUTPUTS)
    assert header_length is None
    assert orjson.loads(body) == {
        "model_name": "m",
        "model_version": "3",
        "outputs": [
            {"name": "label", "datatype": "INT64", "shape": [2], "data": [3, 4]},
            {
                "name": "score",
                "datatype": "FP32",
                "shape": [2, 3],
                "data": [0.5, 1.0, 2.0, 3.0, 4.0, 5.0],
            },
        ],
    }


def test_encode_echoes_the_id_only_when_sent():
    assert b'"id"' not in encode_infer(InferCall([]), "m", "1", OUTPUTS)[0]
    for request_id in ("", "é\0", "null"):
        body, _ = encode_infer(InferCall([], id=request_id), "m", "1", OUTPUTS)
        assert orjson.loads(body)["id"] == request_id


def test_encode_all_binary():
    body, length = encode_infer(InferCall([], binary_outputs=True), "m", "1", OUTPUTS)
    assert length is not None
    entries = orjson.loads(body[:length])["outputs"]
    assert entries[0] == {
        "name": "label", "datatype": "INT64", "shape": [2],
        "parameters": {"binary_data_size": 16},
    }  # fmt: skip
    assert body[length:] == bytes(OUTPUTS[0].data) + bytes(OUTPUTS[1].data)


def test_encode_filters_orders_and_mixes():
    wanted = [WantedOutput("score", False), WantedOutput("label", True)]
    body, length = encode_infer(InferCall([], outputs=wanted), "m", "1", OUTPUTS)
    entries = orjson.loads(body[:length])["outputs"]
    assert [entry["name"] for entry in entries] == ["score", "label"]
    assert entries[0]["data"][0] == 0.5
    assert body[length:] == bytes(OUTPUTS[0].data)
    only = InferCall([], outputs=[WantedOutput("score", True)])
    body, length = encode_infer(only, "m", "1", OUTPUTS)
    assert body[length:] == bytes(OUTPUTS[1].data)


def test_encode_an_empty_binary_output():
    body, length = encode_infer(
        InferCall([], binary_outputs=True), "m", "1", [output("y", "FP32", np.zeros((1, 0)))]
    )
    assert length == len(body)
    assert orjson.loads(body)["outputs"][0]["parameters"] == {"binary_data_size": 0}


def test_encode_without_dims():
    (entry,) = orjson.loads(
        encode_infer(InferCall([]), "m", "1", [output("y", "FP32", np.array(1.5))])[0]
    )["outputs"]
    assert (entry["shape"], entry["data"]) == ([], [1.5])


def test_encode_strings():
    outputs = [strings("t", (2, 1), "é\0".encode(), b""), strings("u", (0, 3))]
    entries = orjson.loads(encode_infer(InferCall([]), "m", "1", outputs)[0])["outputs"]
    assert entries == [
        {"name": "t", "datatype": "BYTES", "shape": [2, 1], "data": ["é\0", ""]},
        {"name": "u", "datatype": "BYTES", "shape": [0, 3], "data": []},
    ]
    body, length = encode_infer(InferCall([], binary_outputs=True), "m", "1", outputs)
    sizes = [e["parameters"]["binary_data_size"] for e in orjson.loads(body[:length])["outputs"]]
    assert sizes == [11, 0]
    assert elements(memoryview(body)[length:]) == ["é\0".encode(), b""]


def test_strings_that_json_cannot_hold():
    outputs = [strings("t", (2,), b"null", b"\xff")]
    with pytest.raises(InvalidRequest) as caught:
        encode_infer(InferCall([]), "m", "1", outputs)
    assert caught.value.message == (
        "output 't': element 1 is not UTF-8 and has no JSON form, "
        "use binary data (the v2 binary extension or msgpack)"
    )
    encode_infer(InferCall([], outputs=[WantedOutput("t", binary=True)]), "m", "1", outputs)


def test_strings_beside_tokens():
    outputs = [strings("t", (1,), b"null NaN"), output("y", "FP32", [math.nan])]
    body, _ = encode_infer(InferCall([]), "m", "1", outputs)
    assert b'"data":["null NaN"]' in body
    assert b'"data":[NaN]' in body


def test_encode_tokens():
    outputs = [output("y", "FP32", [[math.nan, math.inf, -math.inf, 0.1]])]
    body, _ = encode_infer(InferCall([], id="null"), "m", "1", outputs)
    assert b'"data":[NaN,Infinity,-Infinity,0.1]' in body
    assert b'"id":"null"' in body


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_encode_binary_only_datatypes(datatype):
    outputs = [output("y", datatype, [[1, 2]])]
    with pytest.raises(InvalidRequest, match="use binary data"):
        encode_infer(InferCall([]), "m", "1", outputs)
    body, length = encode_infer(InferCall([], binary_outputs=True), "m", "1", outputs)
    assert body[length:] == bytes(outputs[0].data)


@pytest.mark.parametrize("datatype", IN_JSON, ids=lambda t: t.name)
@pytest.mark.parametrize("rank", range(1, 9))
def test_every_datatype_and_rank(datatype, rank):
    array = np.arange(2**rank).reshape((2,) * rank) % 2
    body, _ = encode_infer(InferCall([]), "m", "1", [output("y", datatype.name, array)])
    (entry,) = orjson.loads(body)["outputs"]
    assert entry["shape"] == [2] * rank
    assert entry["data"] == array.ravel().astype(datatype.dtype).tolist()


def test_an_answer_holds_no_view_of_the_outputs():
    for binary in (False, True):
        buffer = bytearray(struct.pack("<ff", 1, 2))
        tensor = output("y", "FP32", [[1, 2]])
        tensor.data = memoryview(buffer)
        encode_infer(InferCall([], binary_outputs=binary), "m", "1", [tensor])
        tensor.data.release()
        buffer.clear()  # BufferError while anything still shows it
