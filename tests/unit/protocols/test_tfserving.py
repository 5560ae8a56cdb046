import math

import numpy as np
import orjson
import pytest

from gateway.bytestrings import elements
from gateway.errors import InvalidRequest, TooLarge
from gateway.protocols.call import check_call
from gateway.protocols.strings import MAX_STRINGS
from gateway.protocols.tfserving import (
    VersionStatus,
    encode_predict,
    metadata,
    model_status,
    parse_predict,
)

from .support import (
    ANY_WORDS,
    BINARY_ONLY,
    DIGITS,
    MAX_BYTES,
    PAIR,
    WORDS,
    nested,
    optional,
    output,
    signature,
    spec,
    strings,
    unranked,
    whole,
)

SCALAR = signature([spec("x", "FP32", "N")], [spec("y", "FP32", "N")])
NAMED_INPUTS = signature([spec("inputs", "FP32", "N", 2)])
ROW = [1.0, 2.0, 3.0, 4.0]


def parse(document, against=DIGITS):
    call, row = parse_predict(orjson.dumps(document), against)
    check_call(call, against, MAX_BYTES)
    return call, row


def tensors(call):
    return {t.name: (t.datatype.name, t.shape, t.data) for t in call.inputs}


def refusal(document, against=DIGITS):
    body = document if isinstance(document, bytes) else orjson.dumps(document)
    with pytest.raises(InvalidRequest) as caught:
        check_call(parse_predict(body, against)[0], against, MAX_BYTES)
    return caught.value.message


def test_rows_without_a_name():
    call, row = parse({"instances": [ROW, ROW]})
    assert row
    assert tensors(call) == {"x": ("FP32", (2, 4), [ROW, ROW])}
    assert call.rows == 2
    assert call.inputs[0].strict
    assert (call.id, call.outputs, call.binary_outputs) == (None, None, False)


def test_columns_without_a_name():
    call, row = parse({"inputs": [ROW, ROW]})
    assert not row
    assert tensors(call) == {"x": ("FP32", (2, 4), [ROW, ROW])}


def test_rows_by_name():
    assert tensors(parse({"instances": [{"x": ROW}, {"x": ROW}]})[0]) == {
        "x": ("FP32", (2, 4), [ROW, ROW])
    }
    call, _ = parse(
        {"instances": [{"mask": [True], "ids": [5]}, {"ids": [6], "mask": [False]}]}, PAIR
    )
    assert tensors(call) == {
        "ids": ("INT64", (2, 1), [[5], [6]]),
        "mask": ("BOOL", (2, 1), [[True], [False]]),
    }


def test_columns_by_name():
    assert tensors(parse({"inputs": {"x": [ROW]}})[0]) == {"x": ("FP32", (1, 4), [ROW])}
    call, row = parse({"inputs": {"ids": [[5], [6]], "mask": [[True], [False]]}}, PAIR)
    assert not row
    assert call.rows == 2


def test_a_scalar_for_each_row():
    for document in (
        {"instances": [1.0, 2.0]},
        {"instances": [{"x": 1.0}, {"x": 2.0}]},
        {"inputs": [1.0, 2.0]},
        {"inputs": {"x": [1.0, 2.0]}},
    ):
        assert tensors(parse(document, SCALAR)[0]) == {"x": ("FP32", (2,), [1.0, 2.0])}


def test_the_form_of_documentation_in_the_wild():
    call, row = parse({"instances": [{"inputs": {"x": ROW}}, {"inputs": {"x": ROW}}]})
    assert row
    assert tensors(call) == {"x": ("FP32", (2, 4), [ROW, ROW])}
    call, _ = parse({"instances": [{"inputs": {"ids": [1], "mask": [True]}}]}, PAIR)
    assert call.rows == 1
    assert "instance 1" in refusal({"instances": [{"inputs": {"x": ROW}}, {"x": ROW}]})
    assert "instance 1" in refusal({"instances": [{"inputs": {"x": ROW}}, ROW]})


def test_an_input_that_is_named_inputs():
    call, _ = parse({"instances": [{"inputs": [1, 2]}]}, NAMED_INPUTS)
    assert tensors(call) == {"inputs": ("FP32", (1, 2), [[1, 2]])}
    call, _ = parse({"inputs": {"inputs": [[1, 2]]}}, NAMED_INPUTS)
    assert call.rows == 1
    # Read as the tensor that it names; the object in it is for the decode kernel to refuse.
    call, _ = parse_predict(orjson.dumps({"instances": [{"inputs": {"x": 1}}]}), NAMED_INPUTS)
    assert call.inputs[0].name == "inputs"


@pytest.mark.parametrize("name", [None, "", "serving_default"])
def test_signature_name(name):
    parse({"signature_name": name, "instances": [ROW]})


@pytest.mark.parametrize("name", ["other", 7, ["serving_default"], {}])
def test_another_signature_name(name):
    assert "'signature_name' must be" in refusal({"signature_name": name, "instances": [ROW]})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"inputs": [ROW], "instances": [ROW]}, "Missing 'inputs' or 'instances' key"),
        ({"instances": []}, "at least one element"),
        ({"instances": {}}, "must be an array"),
        ({"instances": 7}, "must be an array"),
        ({"instances": [ROW[:3]]}, "expected [-1,4], got [1,3]"),
        ({"instances": [7]}, "expected [-1,4], got [1]"),
        ({"instances": [[[1, 2, 3, 4]]]}, "expected [-1,4], got [1,1,4]"),
        ({"instances": [[]]}, "expected [-1,4], got [1,0]"),
        ({"instances": [ROW] * 9}, "batch-size must be <= 8"),
        ({"instances": [{"z": ROW}]}, "unexpected inference input 'z'"),
        ({"instances": [{"a b": ROW}]}, "unexpected inference input <name not shown>"),
        ({"instances": [{}]}, "missing: 'x'"),
        ({"instances": [{"x": ROW}, {"x": ROW, "z": 1}]}, "instance 1 does not name the same"),
        ({"instances": [{"x": ROW}, {"x": ROW}, {}]}, "instance 2 does not name the same"),
        ({"instances": [{"x": ROW}, ROW]}, "instance 1 does not name the same"),
        ({"inputs": 7}, "expected [-1,4], got []"),
        ({"inputs": None}, "expected [-1,4], got []"),
        ({"inputs": []}, "expected [-1,4], got [0]"),
        ({"inputs": {}}, "missing: 'x'"),
        ({"inputs": {"x": [ROW], "z": [1]}}, "unexpected inference input 'z'"),
        ({"inputs": [ROW], "other": nested(101)}, "deeper than 100 levels"),
        ({"inputs": nested(120)}, "input 'x' nests deeper than 8 levels"),
        ({"instances": [{"b64": "AA=="}]}, "unexpected inference input 'b64'"),
        ({"instances": [{"x": {"b64": "AA=="}}]}, "input 'x' takes FP32, got strings"),
        ({"inputs": {"b64": "AA=="}}, "unexpected inference input 'b64'"),
        ({"instances": ["abc"]}, "input 'x' takes FP32, got strings"),
        (b'{"instances":', "malformed JSON at byte 13"),
    ],
)
def test_refusals(document, message):
    assert message in refusal(document)


def test_several_inputs_must_be_named():
    message = "must name the inputs of this model: 'ids', 'mask'"
    assert message in refusal({"instances": [[1], [2]]}, PAIR)
    assert message in refusal({"inputs": [[1], [2]]}, PAIR)


@pytest.mark.parametrize("datatype", BINARY_ONLY, ids=lambda t: t.name)
def test_binary_only_datatypes(datatype):
    against = signature([spec("x", datatype.name, "N")])
    assert "use binary data" in refusal({"instances": [1.0]}, against)
    with pytest.raises(InvalidRequest, match="use binary data"):
        encode_predict(DIGITS, True, [output("y", datatype.name, [[1, 2]])])


def test_tokens_in():
    call, _ = parse_predict(b'{"instances":[[NaN,Infinity,-Infinity,0]]}', DIGITS)
    assert math.isnan(call.inputs[0].data[0][0])


@pytest.mark.parametrize(("row", "key"), [(True, "predictions"), (False, "outputs")])
def test_one_output_drops_its_name(row, key):
    array = [[1.5, 2, 3, 4], [5, 6, 7, 8]]
    assert orjson.loads(encode_predict(DIGITS, row, [output("y", "FP32", array)])) == {key: array}
    assert orjson.loads(encode_predict(SCALAR, row, [output("y", "FP32", [1, 2])])) == {key: [1, 2]}


PAIR_OUTPUTS = [output("label", "INT64", [3, 4]), output("score", "FP32", [[0, 1, 2], [3, 4, 5]])]


def test_several_outputs_in_rows():
    assert orjson.loads(encode_predict(PAIR, True, PAIR_OUTPUTS)) == {
        "predictions": [{"label": 3, "score": [0, 1, 2]}, {"label": 4, "score": [3, 4, 5]}]
    }


def test_several_outputs_in_columns():
    assert orjson.loads(encode_predict(PAIR, False, PAIR_OUTPUTS)) == {
        "outputs": {"label": [3, 4], "score": [[0, 1, 2], [3, 4, 5]]}
    }


def test_tokens_out():
    array = [[math.nan, 0.1], [math.inf, -math.inf]]
    assert encode_predict(DIGITS, True, [output("y", "FP32", array)]) == (
        b'{"predictions":[[NaN,0.1],[Infinity,-Infinity]]}'
    )
    outputs = [output("a", "FP64", [math.nan, 1]), output("b", "FP32", array)]
    assert encode_predict(PAIR, True, outputs) == (
        b'{"predictions":[{"a":NaN,"b":[NaN,0.1]},{"a":1.0,"b":[Infinity,-Infinity]}]}'
    )


@pytest.mark.parametrize("rank", range(1, 9))
def test_every_rank(rank):
    array = np.arange(2**rank, dtype="i4").reshape((2,) * rank)
    for row in (True, False):
        (value,) = orjson.loads(encode_predict(DIGITS, row, [output("y", "INT32", array)])).values()
        assert value == array.tolist()


def test_booleans_out():
    body = encode_predict(DIGITS, True, [output("y", "BOOL", [True, False])])
    assert body == b'{"predictions":[true,false]}'


LINES = signature([spec("s", "BYTES", "N")], [spec("t", "BYTES", "N")])
"""One string a row."""

B64 = {"b64": "/wA="}


def taken(document, against):
    """Shape and elements of each input of strings."""
    call, _ = parse(document, against)
    return {t.name: (t.shape, elements(t.data)) for t in call.inputs}


@pytest.mark.parametrize(
    "document",
    [
        {"instances": ["é", B64]},
        {"instances": [{"s": "é"}, {"s": B64}]},
        {"instances": [{"inputs": {"s": "é"}}, {"inputs": {"s": B64}}]},
        {"inputs": ["é", B64]},
        {"inputs": {"s": ["é", B64]}},
    ],
)
def test_strings(document):
    assert taken(document, LINES) == {"s": ((2,), ["é".encode(), b"\xff\0"])}


def test_base64_first_is_a_value_and_no_map_of_inputs():
    for instances in ([B64, "é"], [{"inputs": B64}, {"inputs": B64}]):
        ((shape, found),) = taken({"instances": instances}, LINES).values()
        assert (shape, found[0]) == ((2,), b"\xff\0")
    assert taken({"inputs": B64}, ANY_WORDS) == {"s": ((), [b"\xff\0"])}
    with_scale = whole([unranked("s", "BYTES"), optional("o", "FP32")])
    assert taken({"inputs": B64}, with_scale) == {"s": ((), [b"\xff\0"])}


def test_an_input_that_is_named_b64():
    named = signature([spec("b64", "BYTES", "N")])
    assert taken({"instances": [{"b64": "AA=="}]}, named) == {"b64": ((1,), [b"AA=="])}
    assert taken({"inputs": {"b64": ["AA=="]}}, named) == {"b64": ((1,), [b"AA=="])}


def test_base64_among_several_inputs():
    two = signature([spec("s", "BYTES", "N"), spec("k", "INT64", "N")])
    call, _ = parse({"instances": [{"s": B64, "k": 1}, {"k": 2, "s": "b"}]}, two)
    assert elements(call.inputs[0].data) == [b"\xff\0", b"b"]
    assert "unexpected inference input 'b64'" in refusal({"instances": [B64]}, two)
    assert "unexpected inference input 'b64'" in refusal({"inputs": B64}, two)


def test_nested_strings():
    call = {"instances": [["a", B64], [{"b64": ""}, "\0"]]}
    assert taken(call, WORDS) == {"s": ((2, 2), [b"a", b"\xff\0", b"", b"\0"])}
    assert taken({"inputs": [[], []]}, ANY_WORDS) == {"s": ((2, 0), [])}
    assert taken({"inputs": "a"}, ANY_WORDS) == {"s": ((), [b"a"])}


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ([["a", "b"], ["c"]], "element [1]: expected a list of 2, got 1 elements"),
        ([["a", "b"], ["c", "d", "e"]], "element [1]: expected a list of 2, got 3 elements"),
        ([["a", "b"], "c"], "element [1]: expected a list of 2, got a string"),
        ([["a", "b"], ["c", ["d"]]], "element [1,1]: expected a string, got a list"),
        ([["a", "b"], ["c", 1]], "element [1,1]: expected a string, got an integer"),
        ([[1, 2]], "element [0,0]: expected a string, got an integer"),
        ([["a", {"b64": "AA==", "x": 1}]], "element [0,1]: expected a string, got an object"),
        ([["a", {"b64": 7}]], "element [0,1]: 'b64' must be a string, got an integer"),
        ([["a", {"b64": "AA"}]], "element [0,1]: 'b64' is not base64 with padding"),
        ([["a", {"b64": "A-_="}]], "element [0,1]: 'b64' is not base64 with padding"),
        ([["a", {"b64": "AA==\n"}]], "element [0,1]: 'b64' is not base64 with padding"),
        ([["a", {"b64": "é==="}]], "element [0,1]: 'b64' is not base64 with padding"),
    ],
)
def test_strings_that_are_refused(instances, message):
    assert refusal({"instances": instances}, WORDS) == f"input 's': {message}"


@pytest.mark.parametrize(
    "document",
    [
        {"inputs": [""] * (MAX_STRINGS + 1)},
        {"inputs": [[]] * (MAX_STRINGS + 1)},
        {"instances": [{"s": ""}] * (MAX_STRINGS + 1)},
        {"inputs": {"s": [""] * MAX_STRINGS, "t": [""]}},
    ],
    ids=["columns", "lists", "rows", "two inputs"],
)
def test_a_request_of_too_many_strings(document):
    two = whole([unranked("s", "BYTES"), optional("t", "BYTES", "N")])
    with pytest.raises(TooLarge, match=f"the limit is {MAX_STRINGS}"):
        parse_predict(orjson.dumps(document), two)


def test_as_many_strings_as_a_request_may_hold():
    body = orjson.dumps({"instances": [{"s": ""}] * MAX_STRINGS})
    call, _ = parse_predict(body, ANY_WORDS)
    check_call(call, ANY_WORDS, MAX_BYTES)
    assert call.inputs[0].data == bytes(4 * MAX_STRINGS)


def test_strings_of_another_shape():
    assert refusal({"instances": ["a"]}, WORDS) == (
        "unexpected shape for input 's': expected [-1,2], got [1]"
    )
    assert refusal({"inputs": 7}, ANY_WORDS) == "input 's': data: expected a string, got an integer"
    body = b'{"instances":[["a","\\ud800"]],"note":NaN}'
    assert refusal(body, WORDS) == "input 's': element [0,1]: a string must be Unicode text"


def test_whole_models():
    model = whole([spec("x", "FP32", 3)], [spec("y", "FP32", 3)])
    for document in ({"inputs": [1, 2, 3]}, {"instances": [1, 2, 3]}):
        call, _ = parse(document, model)
        assert (call.rows, call.inputs[0].shape) == (1, (3,))
    assert "expected [3], got [1,3]" in refusal({"inputs": [[1, 2, 3]]}, model)


@pytest.mark.parametrize("document", [{"inputs": 7}, {"inputs": {"x": 7}}])
def test_a_number_without_dims(document):
    call, _ = parse(document, whole([spec("x", "FP32")]))
    assert (call.inputs[0].shape, call.inputs[0].data, call.inputs[0].strict) == ((), [7], False)


def test_optional_inputs():
    model = signature([spec("x", "FP32", "N"), optional("by", "FP32")])
    assert tensors(parse({"instances": [1.0, 2.0]}, model)[0]) == {"x": ("FP32", (2,), [1.0, 2.0])}
    call, _ = parse({"inputs": {"x": [1.0, 2.0], "by": 3.0}}, model)
    assert tensors(call)["by"] == ("FP32", (), [3.0])
    assert refusal({"instances": [{"x": 1.0, "by": 3.0}]}, model) == (
        "input 'by' is not given row by row: use 'inputs' in place of 'instances'"
    )
    assert "unexpected inference input 'z'" in refusal({"instances": [{"x": 1.0, "z": 1}]}, model)
    assert tensors(parse({"inputs": 7}, whole([optional("by", "FP32")]))[0]) == {
        "by": ("FP32", (), [7])
    }


@pytest.mark.parametrize("row", [True, False])
def test_strings_out(row):
    (answer,) = orjson.loads(
        encode_predict(WORDS, row, [strings("t", (2, 2), b"a", b"\xff", "é".encode(), b"")])
    ).values()
    assert answer == [["a", {"b64": "/w=="}], ["é", ""]]


def test_outputs_named_bytes_are_base64():
    model = signature(
        [spec("x", "FP32", "N")], [spec("a_bytes", "BYTES", "N"), spec("b", "BYTES", "N")]
    )
    outputs = [strings("a_bytes", (2,), b"a", b""), strings("b", (2,), b"a", b"null")]
    a, b = [{"b64": "YQ=="}, {"b64": ""}], ["a", "null"]
    assert orjson.loads(encode_predict(model, False, outputs)) == {
        "outputs": {"a_bytes": a, "b": b}
    }
    assert orjson.loads(encode_predict(model, True, outputs)) == {
        "predictions": [{"a_bytes": a[0], "b": b[0]}, {"a_bytes": a[1], "b": b[1]}]
    }


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (0, 2), (2, 1, 3), (1,) * 8])
def test_shapes_of_strings_out(shape):
    count = math.prod(shape)
    expected = np.array([str(n) for n in range(count)], object).reshape(shape).tolist()
    made = strings("t", shape, *(str(n).encode() for n in range(count)))
    (answer,) = orjson.loads(encode_predict(ANY_WORDS, False, [made])).values()
    assert answer == expected


def test_outputs_without_dims():
    model = whole([], [spec("y", "FP32"), spec("k", "INT64")])
    outputs = [output("y", "FP32", np.array(math.nan)), output("k", "INT64", np.array(3))]
    assert encode_predict(model, False, outputs) == b'{"outputs":{"y":NaN,"k":3}}'


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        ([output("y", "FP32", np.array(1.0))], "y"),
        ([output("y", "FP32", [1, 2]), output("k", "INT64", np.array(3))], "k"),
        ([output("y", "FP32", [1, 2]), output("k", "INT64", [3])], "k"),
        ([strings("t", (), b"a")], "t"),
    ],
)
def test_outputs_without_rows_for_a_request_in_rows(outputs, name):
    model = whole([], [spec(o.name, o.datatype.name, *o.shape) for o in outputs])
    with pytest.raises(InvalidRequest) as caught:
        encode_predict(model, True, outputs)
    assert caught.value.message == (
        f"output '{name}' has no row for each prediction: use 'inputs' in place of 'instances'"
    )
    encode_predict(model, False, outputs)


def test_model_status():
    assert model_status(
        [VersionStatus("1", "AVAILABLE"), VersionStatus("2", "END", "INTERNAL", "broken")]
    ) == {
        "model_version_status": [
            {
                "version": "1",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            },
            {
                "version": "2",
                "state": "END",
                "status": {"error_code": "INTERNAL", "error_message": "broken"},
            },
        ]
    }


def test_metadata():
    document = metadata("m", "3", DIGITS)
    assert document["model_spec"] == {"name": "m", "signature_name": "", "version": "3"}
    default = document["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert default["method_name"] == "tensorflow/serving/predict"
    assert default["inputs"] == {
        "x": {
            "dtype": "DT_FLOAT",
            "tensor_shape": {
                "dim": [{"size": "-1", "name": ""}, {"size": "4", "name": ""}],
                "unknown_rank": False,
            },
            "name": "x",
        }
    }
    assert list(default["outputs"]) == ["y"]


def test_metadata_of_whole_models():
    model = whole([unranked("x", "BYTES"), spec("k", "INT64")])
    document = metadata("m", "3", model)["metadata"]["signature_def"]["signature_def"]
    inputs = document["serving_default"]["inputs"]
    assert inputs["x"]["dtype"] == "DT_STRING"
    assert inputs["x"]["tensor_shape"] == {"dim": [], "unknown_rank": True}
    assert inputs["k"]["tensor_shape"] == {"dim": [], "unknown_rank": False}
