import math
import struct

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gateway.errors import InvalidRequest
from gateway.protocols import jsontext
from gateway.tensors import DATATYPES

from .support import BINARY_ONLY, IN_JSON, nested


@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_loads_plain_json(wrap):
    assert jsontext.loads(wrap(b'{"a":[1,2.5,"\xc3\xa9",null,true]}')) == {
        "a": [1, 2.5, "é", None, True]
    }


@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_loads_accepts_the_tokens(wrap):
    values = jsontext.loads(wrap(b'{"d":[NaN,Infinity,-Infinity,1,0.5]}'))["d"]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 1, 0.5]


@pytest.mark.parametrize(
    ("body", "offset"),
    [
        (b"", 0),
        (b"{", 1),
        (b'{"a":1}x', 7),
        (b'{"secret":x}', 10),
        ('["é",x]'.encode(), 6),
        ('["é",NaN,x]'.encode(), 10),
        (b'{"NaN":x}', 7),
        (b'["\xff"]', 2),
        (b'["NaN","\xff"]', 8),
        (b"\xef\xbb\xbf{}", 0),
        (b'"\\ud800"', 1),
        (b"[1e999]", 1),
    ],
)
def test_malformed_json_is_located_and_not_echoed(body, offset):
    with pytest.raises(InvalidRequest) as caught:
        jsontext.loads(body)
    assert caught.value.message == f"malformed JSON at byte {offset}"


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"9" * 5000])
def test_numbers_too_large_are_refused_beside_a_token_too(number):
    with pytest.raises(InvalidRequest, match="a number is too large"):
        jsontext.loads(b"[NaN," + number + b"]")


@pytest.mark.parametrize("prefix", [b"[", b"[NaN,", b'{"a":', b'{"Infinity":'])
def test_250_000_levels_are_refused(prefix):
    with pytest.raises(InvalidRequest, match="deeper than 100 levels"):
        jsontext.loads(prefix + b"[" * 250_000 + b"]" * 250_000 + b"]")


def test_ignored_fields_are_walked_for_depth():
    jsontext.check_ignored({"a": nested(100), "b": 1, "c": {"d": [{}]}}, ())
    with pytest.raises(InvalidRequest, match="deeper than 100 levels"):
        jsontext.check_ignored({"a": nested(101)}, ())
    jsontext.check_ignored({"a": nested(101)}, {"a"})


def test_ignored_fields_are_walked_through_objects():
    value = {}
    for _ in range(100):
        value = {"k": [value]}
    with pytest.raises(InvalidRequest, match="deeper than 100 levels"):
        jsontext.check_ignored({"a": value}, ())


def test_ignored_fields_hold_plain_types_only():
    with pytest.raises(InvalidRequest, match="unsupported type"):
        jsontext.check_ignored({"a": [1, object()]}, ())
    with pytest.raises(InvalidRequest, match="unsupported type"):
        jsontext.check_ignored({"a": object()}, ())


@pytest.mark.parametrize("datatype", IN_JSON, ids=lambda t: t.name)
def test_tensor_data_of_every_datatype(datatype):
    array = np.array([0, 1, 1, 0], datatype.dtype)
    text = jsontext.dumps_tensors(jsontext.tensor_data(datatype, memoryview(array.tobytes())))
    assert orjson.loads(text) == array.tolist()


@pytest.mark.parametrize("datatype", BINARY_ONLY, ids=lambda t: t.name)
def test_tensor_data_without_a_json_form(datatype):
    with pytest.raises(InvalidRequest, match=f"{datatype.name} has no JSON.*use binary data"):
        jsontext.tensor_data(datatype, memoryview(b"\0\0"))


def test_integers_are_exact_at_their_limits():
    for name in ("INT64", "UINT64", "INT8", "UINT32"):
        limits = np.iinfo(DATATYPES[name].dtype)
        array = np.array([limits.min, limits.max], DATATYPES[name].dtype)
        text = jsontext.dumps_tensors(
            jsontext.tensor_data(DATATYPES[name], memoryview(array.tobytes()))
        )
        assert orjson.loads(text) == [limits.min, limits.max]


def test_fp32_is_written_as_short_as_it_reads_back():
    data = memoryview(np.array([0.1, 1 / 3, 16777216], "f4").tobytes())
    text = jsontext.dumps_tensors(jsontext.tensor_data(DATATYPES["FP32"], data))
    assert text == b"[0.1,0.33333334,16777216.0]"


@pytest.mark.parametrize("name", ["FP32", "FP64"])
def test_what_is_not_finite_becomes_a_token(name):
    dtype = DATATYPES[name].dtype
    array = np.array([[np.nan, 1.5], [np.inf, -np.inf]], dtype)
    value = jsontext.tensor_data(DATATYPES[name], memoryview(array.tobytes()), (2, 2))
    document = {"id": "null", "a": value, "b": None, "c": value[0][0], "d": value[1]}
    assert jsontext.dumps_tensors(document) == (
        b'{"id":"null","a":[[NaN,1.5],[Infinity,-Infinity]],"b":null,"c":NaN,'
        b'"d":[Infinity,-Infinity]}'
    )


def test_empty_tensors_keep_their_shape():
    for shape, text in (((0,), b"[]"), ((2, 0), b"[[],[]]"), ((0, 2), b"[]")):
        value = jsontext.tensor_data(DATATYPES["FP32"], memoryview(b""), shape)
        assert jsontext.dumps_tensors(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("FP32", 0.1, b"0.1"),
        ("FP64", math.nan, b"NaN"),
        ("INT64", -(2**63), b"-9223372036854775808"),
        ("UINT8", 255, b"255"),
        ("BOOL", True, b"true"),
    ],
)
def test_tensors_without_dims_are_scalars(name, value, text):
    data = memoryview(np.array(value, DATATYPES[name].dtype).tobytes())
    assert jsontext.dumps_tensors(jsontext.tensor_data(DATATYPES[name], data, ())) == text
    flat = jsontext.dumps_tensors(jsontext.tensor_data(DATATYPES[name], data))
    assert flat == b"[" + text + b"]"


def test_dumps_plain_values():
    assert jsontext.dumps({"a": (1, None), "b": "é"}) == '{"a":[1,null],"b":"é"}'.encode()


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_fp32_survives_the_way_there_and_back(array):
    data = memoryview(array.tobytes())
    text = jsontext.dumps_tensors(jsontext.tensor_data(DATATYPES["FP32"], data))
    back = np.array(jsontext.loads(text), np.float32)
    np.testing.assert_array_equal(back, array)
    assert [struct.pack("f", v) for v in back if v == 0] == [
        struct.pack("f", v) for v in array if v == 0
    ]
