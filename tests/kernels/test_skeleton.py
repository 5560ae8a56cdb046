from __future__ import annotations

import ctypes
import json
import math
import mmap
import random
import re
import struct
from types import ModuleType
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway._kernels import decode
from gateway.errors import GatewayError
from gateway.protocols import messagepack, v2_infer
from gateway.protocols.call import InferCall
from gateway.protocols.jsontext import loads
from gateway.tensors import DATATYPES, Signature
from tests.kernels.builds import BUILDS, IMPLEMENTATIONS, load
from tests.twins import skeleton as twin
from tests.twins.skeleton import ID_MARK, MARK, MSGPACK_ID_MARK, SPAN_BIN, SPAN_ID, SPAN_NUMBERS

ROOM = 4096
FUZZ = settings(deadline=None, max_examples=100)
FP32, FP64 = DATATYPES["FP32"].index, DATATYPES["FP64"].index
SIGNATURE = Signature((), (), 0)
FIRST_PROBE = 1_000_000  # above every number in the generated bodies but the largest


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def skeleton(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "skeleton")


@pytest.fixture(scope="module", params=BUILDS)
def compiled(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "skeleton")


def cut(body: bytes, spans: list[tuple[int, int, int, int]]) -> list[bytes]:
    """What the spans of a body hold."""
    return [body[begin:end] for begin, end, *_ in spans]


def restored(text: bytes, spans: list[bytes]) -> bytes:
    """A JSON body of this skeleton."""
    pieces = text.replace(ID_MARK, MARK).split(MARK)
    return b"".join(piece + span for piece, span in zip(pieces, [*spans, b""], strict=True))


# -- JSON bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected", "held"),
    [
        (b'{"data":[1, 2.5,-3e4]}', b'{"data":\1}', [b"[1, 2.5,-3e4]"]),
        (b'{"a":[[1],[2,3]],"b":[4]}', b'{"a":\1,"b":\1}', [b"[[1],[2,3]]", b"[4]"]),
        (b'{"a" : [ 1 ]\n}', b'{"a" : \1\n}', [b"[ 1 ]"]),
        (b'[{"a":[1]},{"a":[2]}]', b'[{"a":\1},{"a":\1}]', [b"[1]", b"[2]"]),
        (b"[[],[0]]", b"\1", [b"[[],[0]]"]),
        (b'{"shape":[1,2],"x":[1]}', b'{"shape":[1,2],"x":\1}', [b"[1]"]),
        (b'{"shape" :\t[1,2]}', b'{"shape" :\t[1,2]}', []),
        (b'{"shape":{"a":[1]}}', b'{"shape":{"a":\1}}', [b"[1]"]),
        (b'["shape",[1]]', b'["shape",\1]', [b"[1]"]),
        (b'{"a":[],"b":[[ ],[]],"c":5}', b'{"a":[],"b":[[ ],[]],"c":5}', []),
        (b'{"a":["[1]","\\"[2]"]}', b'{"a":["[1]","\\"[2]"]}', []),
        (b'{"[1]":[true,null]}', b'{"[1]":[true,null]}', []),
        (b'{"id":"a b","x":[1]}', b'{"id":"\2","x":\1}', [b"a b", b"[1]"]),
        (b'{"id" : ""}', b'{"id" : "\2"}', [b""]),
        (b'{"id":"' + b"i" * 256 + b'"}', b'{"id":"\2"}', [b"i" * 256]),
        (b'{"x":{"id":"a"},"y":["id"]}', b'{"x":{"id":"a"},"y":["id"]}', []),
        ('{"é":"ü"}'.encode(), '{"é":"ü"}'.encode(), []),
        (b"{}", b"{}", []),
        (b"[" * 32 + b"]" * 32, b"[" * 32 + b"]" * 32, []),
    ],
)
def test_json_parts(skeleton: ModuleType, body: bytes, expected: bytes, held: list[bytes]) -> None:
    text, spans = skeleton.json_parts(body, ROOM)
    assert text == expected
    assert cut(body, spans) == held
    assert restored(text, held) == body
    for (begin, _, count, kind), span in zip(spans, held, strict=True):
        assert kind == (SPAN_ID if body[begin - 1 : begin] == b'"' else SPAN_NUMBERS)
        assert count == (span.count(b",") + 1 if kind == SPAN_NUMBERS else 0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[1,2}',
        b'{"a":[1,2',
        b'{"a":"b}',
        b'{"a":"b\\"}',
        b'{"a":"b\\',
        b"{",
        b"}",
        b"[]]",
        b'{"a":[1,true]}',
        b'{"a":[1,"x"]}',
        b'{"a":[1,NaN]}',
        b'{"a":"\1"}',
        b'{"a":"\\\1"}',
        b'{"a":\1}',
        b'{"a":\0}',
        b'{"sh\\u0061pe":[1]}',
        b'{"\\u0069d":"a"}',
        b'{"shape":[[1]]}',
        b'{"shape":["[1]"]}',
        b'{"shape":[\x01]}',
        b'{"shape":[1',
        b'{"id":5}',
        b'{"id":["a"]}',
        b'{"id":"a","id":"b"}',
        b'{"id":"a\\n"}',
        b'{"id":"\xc3\xa9"}',
        b'{"id":"\x7f"}',
        b'{"id":',
        b'{"id":"a',
        b'{"id":"' + b"i" * 257 + b'"}',
        b"[" * 33 + b"]" * 33,
        b"[" + b",".join([b'{"a":[1]}'] * 17) + b"]",
        b"[\0]",
    ],
)
def test_json_that_goes_the_general_way(skeleton: ModuleType, body: bytes) -> None:
    assert skeleton.json_parts(body, ROOM) is None


def test_sixteen_spans_are_the_most(skeleton: ModuleType) -> None:
    body = b"[" + b",".join([b'{"a":[1]}'] * 16) + b"]"
    text, spans = skeleton.json_parts(body, ROOM)
    assert (text.count(MARK), len(spans)) == (16, 16)


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"abc","data":[1,2,3],"x":5}',
        b'{"data":[1,2,3]}',
        b"[[], [ ], {}]",
        b'{"a":"' + b"long" * 50 + b'"}',
        b'{"shape":[' + b"1," * 50 + b"1]}",
        b"[" + b" " * 200 + b"]",
        b'{"id":"' + b"i" * 100 + b'"}',
    ],
)
def test_a_skeleton_keeps_to_its_room(skeleton: ModuleType, body: bytes) -> None:
    parts = skeleton.json_parts(body, ROOM)
    size = len(parts[0])
    assert skeleton.json_parts(body, size) == parts
    for room in range(size):
        assert skeleton.json_parts(body, room) is None


def test_a_large_array_is_cut_at_any_alignment(skeleton: ModuleType) -> None:
    for count in [*range(1, 40), 1000]:
        for wrap in (b"[%s]", b"[[%s]]", b"[[[1],2],%s]"):
            numbers = wrap % b",".join(b"%d" % i for i in range(count))
            for lead in range(0, 70, 23):
                body = b" " * lead + b'{"a":' + numbers + b',"b":"]"}'
                text, spans = skeleton.json_parts(body, ROOM)
                assert cut(body, spans) == [numbers]
                assert spans[0][2] == numbers.count(b",") + 1
                assert text == body.replace(numbers, MARK)


@pytest.mark.parametrize("room", [-1, -(1 << 62)])
def test_room_is_not_negative(skeleton: ModuleType, room: int) -> None:
    for parts in (skeleton.json_parts, skeleton.msgpack_parts):
        with pytest.raises(ValueError, match=r"^room: must not be negative$"):
            parts(b"{}", room)


# -- soundness of JSON -------------------------------------------------------------------------------

number_texts = st.one_of(
    st.integers(-300, 300).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(
        ["-0", "1E5", "18446744073709551616", "0.10", "1e-7", "12345678901234567890.5"]
    ),
)
spaces = st.sampled_from(["", "", "", " ", "\n", "\t "])


@st.composite
def arrays(draw: st.DrawFn, depth: int = 3) -> str:
    """The text of an array of numbers that has at least one."""
    items = draw(st.lists(number_texts, min_size=1, max_size=4))
    if depth and draw(st.booleans()):
        items += draw(st.lists(arrays(depth - 1), max_size=2))  # type: ignore[arg-type]
    space = draw(spaces)
    return f"[{space}{f'{space},{space}'.join(items)}{space}]"


words = st.sampled_from(
    ['"x"', '"[1]"', '"\\""', '"\\\\"', '"\\u0001"', '"é"', "true", "null", "NaN", "[]", "{}", "5"]
)
keys = st.sampled_from(
    ["data", "data", "shape", "id", "name", "datatype", "inputs", "x", "é", "[", ""]
)


def as_object(pairs: list[tuple[str, str]]) -> str:
    """The text of an object; keys may be there twice."""
    return "{" + ", ".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}"


json_values = st.recursive(
    st.one_of(words, arrays()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.lists(st.tuples(keys, inner), max_size=4).map(as_object),
    ),
    max_leaves=8,
)


@st.composite
def v2_bodies(draw: st.DrawFn) -> str:
    """Requests of the Open Inference Protocol that the parser takes, or nearly."""
    entries = []
    for index in range(draw(st.integers(0, 3))):
        fields = [
            ("name", f'"in{index}"'),
            ("shape", draw(st.sampled_from(["[2]", "[ 1,2 ]", "[]", "[0]"]))),
            ("datatype", draw(st.sampled_from(['"FP32"', '"INT64"', '"BOOL"', '"BYTES"']))),
            ("data", draw(st.one_of(arrays(), arrays(), words, st.just('["a","[1]"]')))),
        ]
        fields += draw(st.lists(st.tuples(keys, json_values), max_size=1))
        entries.append(as_object(draw(st.permutations(fields))))
    pairs = [("inputs", f"[{','.join(entries)}]")]
    pairs += draw(st.lists(st.sampled_from([("id", '"a"'), ("outputs", "[]")]), max_size=2))
    pairs += draw(st.lists(st.tuples(keys, json_values), max_size=1))
    return as_object(draw(st.permutations(pairs)))


@st.composite
def changed(draw: st.DrawFn, body: str) -> bytes:
    """A body with a few of its bytes replaced, taken out or put in."""
    text = bytearray(body.encode())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 2))] = draw(
            st.sampled_from(
                [b"", b"1", b"-", b",", b"[", b"]", b'"', b"\\", b" ", b"e", b"\1", b"}"]
            )
        )
    return bytes(text)


def general(body: bytes) -> InferCall | None:
    """What the general parser makes of a v2 body."""
    try:
        return v2_infer.parse_infer(body, None, SIGNATURE)
    except GatewayError:
        return None


def is_numbers(value: Any) -> bool:
    """Whether a value is a number or nested lists of numbers."""
    if type(value) is list:
        return all(map(is_numbers, value))
    return type(value) in (int, float)


def alike(one: Any, other: Any, key: str = "", depth: int = 0) -> bool:
    """Whether two values differ in arrays of numbers alone, but for dims, and in the id."""
    if type(one) is not type(other):
        return False
    if type(one) is list and key != "shape" and is_numbers(one) and re.search(r"\d", repr(one)):
        return is_numbers(other)
    if type(one) is list:
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(alike(a, b, "", depth + 1) for a, b in pairs)
    if type(one) is dict:
        return list(one) == list(other) and all(
            alike(one[name], other[name], name, depth + 1) for name in one
        )
    return (key == "id" and depth == 1 and type(one) is str) or repr(one) == repr(other)


def without_numbers(call: InferCall) -> Any:
    """All of a call but its numbers and the id."""
    inputs = []
    for tensor in call.inputs:
        data = tensor.data
        shown = bytes(data) if isinstance(data, memoryview) else is_numbers(data) or repr(data)
        inputs.append((tensor.name, tensor.datatype, tensor.shape, shown))
    return inputs, call.outputs, call.binary_outputs, call.timeout_us, call.priority, type(call.id)


def check_sound(skeleton: ModuleType, one: bytes, other: bytes) -> None:
    """Hold two bodies to it: if the skeletons are equal and one is good, then so is the other."""
    parts, others = skeleton.json_parts(one, ROOM), skeleton.json_parts(other, ROOM)
    if parts is None or others is None or parts[0] != others[0]:
        return
    assert restored(others[0], cut(other, others[1])) == other
    for begin, end, count, kind in others[1]:
        span = other[begin:end]
        if kind == SPAN_NUMBERS and skeleton.numbers(span, FP64, count, None) is None:
            return
    try:
        document = loads(one)
    except GatewayError:
        return
    assert alike(document, loads(other))
    call, answer = general(one), general(other)
    if call is not None:
        assert answer is not None
        assert without_numbers(answer) == without_numbers(call)


@settings(FUZZ, max_examples=200)
@given(data=st.data(), body=st.one_of(v2_bodies(), json_values))
def test_equal_skeletons_mean_the_same(compiled: ModuleType, data: Any, body: str) -> None:
    one = body.encode()
    check_sound(compiled, one, data.draw(changed(body)))
    parts = compiled.json_parts(one, ROOM)
    if parts is None:
        return
    news = [
        (data.draw(arrays()) if kind == SPAN_NUMBERS else data.draw(st.text("ab [1]", max_size=9)))
        for *_, kind in parts[1]
    ]
    other = restored(parts[0], [new.encode() for new in news])
    assert compiled.json_parts(other, ROOM)[0] == parts[0]
    check_sound(compiled, one, other)


@FUZZ
@given(body=v2_bodies())
def test_the_marks_tell_which_tensor_a_span_belongs_to(compiled: ModuleType, body: str) -> None:
    one = body.encode()
    parts, call = compiled.json_parts(one, ROOM), general(one)
    if parts is None or call is None or "NaN" in body:
        return
    probes = [
        b"a" if kind == SPAN_ID else b"[%d]" % (FIRST_PROBE + index)
        for index, (*_, kind) in enumerate(parts[1])
    ]
    probe = general(restored(parts[0], probes))
    assert probe is not None
    for tensor, probed in zip(call.inputs, probe.inputs, strict=True):
        if is_numbers(tensor.data) and tensor.data != probed.data:
            (number,) = probed.data
            assert loads(cut(one, parts[1])[number - FIRST_PROBE]) == tensor.data


# -- msgpack bodies ----------------------------------------------------------------------------------


def packed(value: Any) -> bytes:
    body: bytes = msgpack.packb(value)
    return body


def test_msgpack_parts(skeleton: ModuleType) -> None:
    body = packed({"id": "ab", "inputs": [{"data": b"12345678", "shape": [2]}], "x": b"y"})
    text, spans = skeleton.msgpack_parts(body, ROOM)
    assert cut(body, spans) == [b"ab", b"12345678"]
    assert [span[2:] for span in spans] == [(0, SPAN_ID), (0, SPAN_BIN)]
    expected = packed({"id": "ab", "inputs": [{"data": b"12345678", "shape": [2]}], "x": b"y"})
    expected = expected.replace(packed("ab"), MSGPACK_ID_MARK).replace(b"12345678", b"")
    assert text == expected


@pytest.mark.parametrize("size", [1, 255, 256, 65_535, 65_536])
def test_msgpack_payloads_of_any_size(skeleton: ModuleType, size: int) -> None:
    body = packed({"inputs": [{"data": bytes(size)}]})
    text, spans = skeleton.msgpack_parts(body, ROOM)
    assert text == body[: len(body) - size]
    assert spans == [(len(body) - size, len(body), 0, SPAN_BIN)]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"data": b""},
        {"data": [b"12", b"3"], "bin": b"45"},
        {"data": "text", "a": None, "b": True, "c": -1, "d": -200, "e": 1 << 63, "f": 0.5},
        {"x": {"id": "a"}, "long": "l" * 300, "many": list(range(70)), "map": dict.fromkeys("abc")},
        {"m" + str(i): [[[i]]] for i in range(20)},
    ],
)
def test_msgpack_without_spans_is_its_own_skeleton(skeleton: ModuleType, value: Any) -> None:
    assert skeleton.msgpack_parts(packed(value), ROOM) == (packed(value), [])


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        packed([{"data": b"1"}]),
        packed("text"),
        packed(5),
        packed({"a": 1}) + b"\x01",
        packed({"a": 1})[:-1],
        packed({"data": b"1234"})[:-1],
        packed({1: 2}),
        packed({b"data": b"12"}),
        packed({1.5: 2}),
        packed({"id": 2}),
        packed({"id": None}),
        packed({"id": ["a"]}),
        packed({"id": {"a": "b"}}),
        packed({"id": "é"}),
        packed({"id": 'a"'}),
        packed({"id": "\\"}),
        packed({"id": "\n"}),
        packed({"id": "i" * 257}),
        packed({"a": deep(32)}),
        packed({"a": [{"data": b"1"}] * 17}),
        b"\x81\xa1a\xc1",
        b"\x81\xa1a\xd4\x00\x00",
        b"\x81\xa1a\xc7\x01\x00\x00",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xdd\xff\xff\xff\xff\x01",
        b"\x81\xa1a\xc6\xff\xff\xff\xff\x01",
    ],
)
def test_msgpack_that_goes_the_general_way(skeleton: ModuleType, body: bytes) -> None:
    assert skeleton.msgpack_parts(body, ROOM) is None


def test_msgpack_may_be_as_deep_as_json(skeleton: ModuleType) -> None:
    body = packed({"a": deep(31)})
    assert skeleton.msgpack_parts(body, ROOM) == (body, [])


def test_a_msgpack_skeleton_keeps_to_its_room(skeleton: ModuleType) -> None:
    body = packed({"id": "abc", "inputs": [{"data": b"12345678", "name": "n" * 40}], "x": [1] * 9})
    parts = skeleton.msgpack_parts(body, ROOM)
    size = len(parts[0])
    assert skeleton.msgpack_parts(body, size) == parts
    for room in range(size):
        assert skeleton.msgpack_parts(body, room) is None


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=40),
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["data", "id", "name", "x"]), inner, max_size=4),
    ),
    max_leaves=12,
)
maps = st.dictionaries(st.sampled_from(["data", "id", "inputs", "x", "é"]), values, max_size=4)


@FUZZ
@given(data=st.data(), value=maps)
def test_equal_msgpack_skeletons_mean_the_same(compiled: ModuleType, data: Any, value: Any) -> None:
    """A body with other bytes in its spans is read with those in their place, and nothing else."""
    body = packed(value)
    parts = compiled.msgpack_parts(body, ROOM)
    if parts is None:
        return
    other = bytearray(body)
    for begin, end, _, kind in reversed(parts[1]):
        size = end - begin
        if kind == SPAN_BIN:
            other[begin:end] = data.draw(st.binary(min_size=size, max_size=size))
    others = compiled.msgpack_parts(bytes(other), ROOM)
    assert others == parts
    original, copy = messagepack._load(body), messagepack._load(bytes(other))
    assert original == value or repr(original) == repr(value)
    assert masked(copy) == masked(original)


def masked(value: Any, key: str = "") -> str:
    """A value with its raw tensors shown by their lengths alone."""
    if type(value) is dict:
        return repr({name: masked(item, name) for name, item in value.items()})
    if type(value) is list:
        return repr([masked(item) for item in value])
    return f"{len(value)} bytes" if type(value) is bytes and key == "data" else repr(value)


# -- against the twin --------------------------------------------------------------------------------


@FUZZ
@given(data=st.data(), body=st.one_of(v2_bodies(), json_values), room=st.integers(0, 300))
def test_json_as_the_twin(compiled: ModuleType, data: Any, body: str, room: int) -> None:
    for text in (body.encode(), data.draw(changed(body))):
        for most in (room, ROOM):
            assert compiled.json_parts(text, most) == twin.json_parts(text, most)


@FUZZ
@given(text=st.text('[]{}",:\\ \n1e-.shapeid\x01', max_size=60))
@example('{"id":"a')
def test_odd_json_as_the_twin(compiled: ModuleType, text: str) -> None:
    assert compiled.json_parts(text.encode(), ROOM) == twin.json_parts(text.encode(), ROOM)


@FUZZ
@given(value=maps, at=st.integers(0, 200), byte=st.integers(0, 255), room=st.integers(0, 100))
def test_msgpack_as_the_twin(
    compiled: ModuleType, value: Any, at: int, byte: int, room: int
) -> None:
    body = packed(value)
    bent = body[: at % len(body)] + bytes([byte]) + body[at % len(body) + 1 :]
    for text in (body, bent, body[: at % len(body)]):
        for most in (room, ROOM):
            assert compiled.msgpack_parts(text, most) == twin.msgpack_parts(text, most)


# -- numbers -----------------------------------------------------------------------------------------


def double(skeleton: ModuleType, text: str) -> bytes | None:
    """The bytes of one FP64."""
    found: bytes | None = skeleton.numbers(f"[{text}]".encode(), FP64, 1, None)
    return found


HARD = [
    "0.1",
    "0.3",
    "1.5",
    "-0",
    "-0.0",
    "-0e5",
    "0e99999999",
    "9007199254740993",
    "9007199254740993.0",
    "9007199254740992.9999999999999999999999",
    "9007199254740993.0000000000000000000000000000000000001",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "-9223372036854775809",
    "18446744073709551615",
    "18446744073709551616",
    "18446744073709551615.0",
    "1.8446744073709551615",
    "1.8446744073709551616",
    "9999999999999999999",
    "99999999999999999999",
    "10000000000000000000",
    "123456789012345678901234567890",
    "1.7976931348623157e308",
    "1.7976931348623158e308",
    "179769313486231570" + "0" * 291,
    "2.2250738585072014e-308",
    "2.2250738585072011e-308",
    "2.225073858507201136057409796709131975934819546351645648023426109724822222e-308",
    "4.9e-324",
    "5e-324",
    "2.4703282292062327e-324",
    "2.4703282292062328e-324",
    "2.47032822920623272088284396434110686182e-324",
    "2.47032822920623272088284396434110686183e-324",
    "1e-400",
    "-1e-400",
    "1e22",
    "1e23",
    "8.988465674311580e307",
    "6929495644600919.5",
    "3.7455744005952583e15",
    "1448997445238699",
    "0.000000000000000000000000000000000000001234567890123456789",
    "0." + "0" * 330 + "1e10",
    "0." + "0" * 400 + "1e400",
    "1" + "0" * 309 + "e-5",
    "1" + "0" * 800 + "e-800",
    "7." + "1234567890" * 100,
    "0." + "0" * 30,
    "1.00000000000000011102230246251565404236316680908203125",
    "1.00000000000000011102230246251565404236316680908203124",
    "1.00000000000000011102230246251565404236316680908203126",
    "7.3177701707893310e15",
]


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_numbers(skeleton: ModuleType, text: str) -> None:
    value = orjson.loads(text)
    assert double(skeleton, text) == struct.pack("<d", value)
    assert struct.pack("<d", value) == struct.pack("<d", float(text) or float(value))


@pytest.mark.parametrize(
    "text", ["1e309", "-1.7976931348623159e308", "1" + "0" * 310, "1e99999999"]
)
def test_numbers_too_large_for_a_double(skeleton: ModuleType, text: str) -> None:
    assert double(skeleton, text) is None


NO_NUMBERS = """
    - +1 01 -01 00 .5 1. 1.e5 1e 1e+ 1e1.5 --1 1- 0x1 1_0 1/2 1, ,1 1,,2 NaN nan Infinity inf true "1"
    1] ][ 1f e5 -e5 1ee5 1E+-5 1e123456789
"""


@pytest.mark.parametrize("text", [*NO_NUMBERS.split(), "", "1 2", "1\0", "1\v", "\xa01"])
def test_what_is_no_number(skeleton: ModuleType, text: str) -> None:
    for index in range(len(DATATYPES)):
        for count in (0, 1, 2):
            if text or count:
                body = f"[{text}]".encode("latin-1")
                assert skeleton.numbers(body, index, count, None) is None


def test_doubles_near_every_power(compiled: ModuleType) -> None:
    """Every entry of the table of powers, with digits that use all of its bits."""
    source = random.Random(5)
    texts = [
        f"{source.randrange(10**18, 10**19)}e{power}"
        for power in range(-342, 290)
        for _ in range(9)
    ]
    texts += [f"{source.randrange(1, 10**9)}e{power}" for power in range(-330, 300)]
    body = f"[{','.join(texts)}]".encode()
    expected = np.array([float(text) for text in texts]).tobytes()
    assert compiled.numbers(body, FP64, len(texts), None) == expected


def test_halfway_doubles(compiled: ModuleType) -> None:
    """Decimal numbers that lie between two doubles, and just beside."""
    source = random.Random(6)
    texts = []
    for _ in range(2000):
        exponent = source.randrange(-30, 12)
        middle = source.randrange(1 << 53, 1 << 54) | 1  # an odd 54th bit is a tie
        scaled = middle << exponent if exponent >= 0 else middle * 5**-exponent
        for digits in (scaled - 1, scaled, scaled + 1):
            texts.append(f"{digits}e{min(exponent, 0)}")
    body = f"[{','.join(texts)}]".encode()
    expected = np.array([float(text) for text in texts]).tobytes()
    assert compiled.numbers(body, FP64, len(texts), None) == expected


@FUZZ
@given(bits=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=30))
def test_every_double_is_read_back(compiled: ModuleType, bits: list[int]) -> None:
    doubles = struct.unpack(f"<{len(bits)}d", struct.pack(f"<{len(bits)}Q", *bits))
    values = [value for value in doubles if math.isfinite(value)]
    for text in (json.dumps(values), "[" + ", ".join(f"{v:.30e}" for v in values) + "]"):
        found = compiled.numbers(text.encode(), FP64, len(values), None)
        assert found == struct.pack(f"<{len(values)}d", *values)


def test_fp32_is_rounded_twice_as_python_does(skeleton: ModuleType) -> None:
    values = [
        0.1,
        1 + 2**-24,
        1 + 2**-24 + 2**-50,
        1e-45,
        1e-46,
        3.4028235677973362e38,
        -0.0,
        16777217,
    ]
    expected = np.array(values).astype(np.float32).tobytes()
    assert skeleton.numbers(json.dumps(values).encode(), FP32, len(values), None) == expected
    for bad in ("3.4028235677973366e38", "-1e39", "1e39", "1" + "0" * 39, "1e400"):
        assert skeleton.numbers(f"[0, {bad}]".encode(), FP32, 2, None) is None


WHOLE = [t for t in DATATYPES.values() if t.name.startswith(("INT", "UINT"))]


@pytest.mark.parametrize("datatype", WHOLE, ids=lambda t: t.name)
def test_integers_take_their_range(skeleton: ModuleType, datatype: Any) -> None:
    info = np.iinfo(datatype.dtype)
    good = [int(info.min), int(info.max), 0, 1, int(info.max) // 3]
    text = json.dumps(good).replace(" 0,", " -0,").encode()
    expected = np.array(good, datatype.dtype).tobytes()
    assert skeleton.numbers(text, datatype.index, 5, None) == expected
    for bad in (info.min - 1, info.max + 1, 1 << 64, 2 << 64, 10**30, -(1 << 64), "1.0", "1e0"):
        assert skeleton.numbers(f"[{bad}]".encode(), datatype.index, 1, None) is None


def test_bools_are_zero_and_one(skeleton: ModuleType) -> None:
    index = DATATYPES["BOOL"].index
    assert skeleton.numbers(b"[0,1,-0]", index, 3, None) == b"\0\1\0"
    for bad in (b"[2]", b"[-1]", b"[1.0]", b"[true]"):
        assert skeleton.numbers(bad, index, 1, None) is None


@pytest.mark.parametrize("name", ["FP16", "BF16", "BYTES"])
def test_types_without_a_json_form(skeleton: ModuleType, name: str) -> None:
    assert skeleton.numbers(b"[]", DATATYPES[name].index, 0, None) is None
    assert skeleton.numbers(b"[1]", DATATYPES[name].index, 1, None) is None


@pytest.mark.parametrize(
    ("text", "count", "dims", "good"),
    [
        (b"[[1,2],[3,4]]", 4, (2, 2), True),
        (b" [1]", 1, (1,), False),
        (b"[\n[1 ,2] , [3,\t4]\r]", 4, (2, 2), True),
        (b"[[1,2],[3,4]]", 4, (4,), False),
        (b"[1,2,3,4]", 4, (2, 2), False),
        (b"[[1,2],[3]]", 4, (2, 2), False),
        (b"[[1,2],[3,4,5]]", 4, (2, 2), False),
        (b"[[1,2],[3,4],[]]", 4, (2, 2), False),
        (b"[[1,2],3]", 3, (2, 2), False),
        (b"[[1,2],[3,[4]]]", 4, (2, 2), False),
        (b"[[[1],[2]]]", 2, (1, 2, 1), True),
        (b"[[],[]]", 0, (2, 0), True),
        (b"[[]]", 0, (2, 0), False),
        (b"[]", 0, (0,), True),
        (b"[1]", 1, (), False),
        (b"[" * 8 + b"1" + b"]" * 8, 1, (1,) * 8, True),
        (b"[" * 9 + b"1" + b"]" * 9, 1, (1,) * 9, False),
        (b"[[1,2],[3,[4],[]],[]]", 4, None, True),
        (b"[1,2,3]", 4, None, False),
        (b"[1,2,3,4,5]", 4, None, False),
        (b"[[],[ ]]", 0, None, True),
        (b"[" * 100 + b"1" + b"]" * 100, 1, None, True),
        (b"[" * 101 + b"1" + b"]" * 101, 1, None, False),
        (b"[[1]", 1, None, False),
        (b"[1]]", 1, None, False),
        (b"[1][2]", 2, None, False),
        (b"[[1][2]]", 2, None, False),
        (b"[[1],]", 1, None, False),
        (b"[,[1]]", 1, None, False),
        (b"[[1]2]", 2, None, False),
        (b"[1[2]]", 2, None, False),
        (b"1", 1, None, False),
        (b"[", 0, None, False),
        (b"]", 0, None, False),
        (b"][", 0, None, False),
        (b"", 0, None, False),
    ],
)
def test_nesting(
    skeleton: ModuleType, text: bytes, count: int, dims: tuple[int, ...] | None, good: bool
) -> None:
    found = skeleton.numbers(text, DATATYPES["INT8"].index, count, dims)
    assert found == (bytes(range(1, count + 1)) if good else None)


def test_bad_arguments(skeleton: ModuleType) -> None:
    for index in (-1, 14):
        with pytest.raises(ValueError, match=r"^datatype_index: expected 0 to 13$"):
            skeleton.numbers(b"[1]", index, 1, None)
    with pytest.raises(ValueError, match=r"^count: must not be negative$"):
        skeleton.numbers(b"[1]", FP32, -1, None)
    assert skeleton.numbers(b"[1]", FP32, 1 << 60, None) is None


@settings(FUZZ, max_examples=200)
@given(
    data=st.data(),
    text=st.one_of(arrays(), st.text("[], 0123456789.eE+-", max_size=30).map("[{}]".format)),
    index=st.sampled_from([t.index for t in DATATYPES.values()]),
)
def test_numbers_as_the_twin_and_the_decode_kernel(
    compiled: ModuleType, data: Any, text: str, index: int
) -> None:
    body = text.encode()
    count = data.draw(st.sampled_from([body.count(b",") + 1, 0, 1, 2]))
    dims = data.draw(
        st.one_of(st.none(), st.just((count,)), st.just((1, count)), st.just((count, 1)))
    )
    found = compiled.numbers(body, index, count, dims)
    assert found == twin.numbers(body, index, count, dims)
    if found is not None:
        dst = bytearray(len(found))
        shape = (count,) if dims is None else dims
        decode.fill(dst, 0, index, shape, loads(body), dims is not None)
        assert found == dst


# -- bounds ------------------------------------------------------------------------------------------


class Guarded:
    """Puts bytes at the end of a page behind which no memory can be read: doing it kills the test."""

    def __init__(self) -> None:
        self._pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        self._view = (ctypes.c_char * len(self._pages)).from_buffer(self._pages)
        libc = ctypes.CDLL(None, use_errno=True)
        guard = ctypes.c_void_p(ctypes.addressof(self._view) + mmap.PAGESIZE)
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def put(self, body: bytes) -> memoryview:
        begin = mmap.PAGESIZE - len(body)
        self._pages[begin : mmap.PAGESIZE] = body
        return memoryview(self._pages)[begin : mmap.PAGESIZE]


def test_nothing_is_read_behind_the_text(compiled: ModuleType) -> None:
    guarded = Guarded()
    whole = (
        b'{"id":"ab","shape":[1],"\xc3\xa9":"\\"","data":[[1.5,-2e-5],[12345678901234567890.1,3]]}'
    )
    spans = [b"[1.25e-10, 12345678, -0]", b"[[1],[123456789012345678901234567890]]", b"[-", b"[1e"]
    for size in range(len(whole) + 1):
        parts = compiled.json_parts(guarded.put(whole[:size]), ROOM)
        assert parts == twin.json_parts(whole[:size], ROOM)
    body = packed({"id": "ab", "inputs": [{"data": b"12", "f": 0.5, "g": -70000}], "x": "y" * 40})
    for size in range(len(body) + 1):
        parts = compiled.msgpack_parts(guarded.put(body[:size]), ROOM)
        assert parts == twin.msgpack_parts(body[:size], ROOM)
    for span in spans:
        for size in range(len(span) + 1):
            for text in (span[:size], span[:size] + b"]"):
                for count in (1, 2, 3):
                    found = compiled.numbers(guarded.put(text), FP64, count, None)
                    assert found == twin.numbers(text, FP64, count, None)
