import math

import numpy as np
import orjson
import pytest

from gateway.errors import InvalidRequest
from gateway.protocols.call import check_call
from gateway.protocols.tfserving import (
    VersionStatus,
    encode_predict,
    metadata,
    model_status,
    parse_predict,
)

from .support import BINARY_ONLY, DIGITS, MAX_BYTES, PAIR, nested, output, signature, spec

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
        ({"instances": [{"b64": "AA=="}]}, "'x': BYTES tensors are not supported"),
        ({"instances": [{"x": {"b64": "AA=="}}]}, "'x': BYTES tensors are not supported"),
        ({"inputs": {"b64": "AA=="}}, "'x': BYTES tensors are not supported"),
        ({"instances": ["abc"]}, "'x': BYTES tensors are not supported"),
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
