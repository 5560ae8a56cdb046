from __future__ import annotations

import enum
import math
import sys
from collections import namedtuple
from decimal import Decimal
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tensors import DATATYPES, MAX_RANK
from tests.kernels.builds import BUILDS, IMPLEMENTATIONS, load
from tests.twins import decode as twin

HUGE = 1 << 70
FUZZ = settings(deadline=None, max_examples=150)
INTEGERS = [t for t in DATATYPES.values() if t.name.startswith(("INT", "UINT"))]
FLOATS = [DATATYPES["FP32"], DATATYPES["FP64"]]
NUMERIC = [DATATYPES["BOOL"], *INTEGERS, *FLOATS]
BINARY = [DATATYPES[name] for name in ("FP16", "BF16", "BYTES")]
WORDS = {"a string": "1", "null": None, "an object": {}, "binary data": b"\1", "a list": [[1]]}
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TIE = 3.4028235677973366e38  # the least double that rounds to infinity


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def decode(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "decode")


@pytest.fixture(scope="module", params=BUILDS)
def compiled(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "decode")


def filled(
    decode: ModuleType, datatype: str, shape: tuple[int, ...], data: Any, strict: bool = False
) -> list[Any]:
    """The elements that `fill` wrote, read back by NumPy; the bytes around them are checked."""
    kind = DATATYPES[datatype]
    nbytes = math.prod(shape) * kind.itemsize
    dst = bytearray(b"\xee" * (nbytes + 10))
    assert decode.fill(dst, 3, kind.index, shape, data, strict) == nbytes
    assert dst[:3] + dst[3 + nbytes :] == b"\xee" * 10
    little = kind.dtype.newbyteorder("<")
    return np.frombuffer(dst, little, count=math.prod(shape), offset=3).tolist()


def refusal(
    decode: ModuleType, datatype: str, shape: tuple[int, ...], data: Any, strict: bool = False
) -> str:
    """The message of the ValueError that `fill` raised; the bytes around are checked."""
    kind = DATATYPES[datatype]
    nbytes = math.prod(shape) * kind.itemsize
    dst = bytearray(b"\xee" * (nbytes + 10))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the caller compares the message)
        decode.fill(dst, 3, kind.index, shape, data, strict)
    assert dst[:3] + dst[3 + nbytes :] == b"\xee" * 10
    assert type(caught.value) is ValueError
    dst.append(0)  # BufferError if a view of it were still held
    return str(caught.value)


def nested(levels: int, data: Any) -> Any:
    for _ in range(levels):
        data = [data]
    return data


# -- elements ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", INTEGERS, ids=lambda t: t.name)
def test_integers_take_their_range(decode: ModuleType, datatype: Any) -> None:
    info = np.iinfo(datatype.dtype)
    good = [0, 1, int(info.max), int(info.min), int(info.max) // 2]
    assert filled(decode, datatype.name, (5,), good) == good
    for bad in (info.max + 1, info.min - 1, 1 << 63, 1 << 64, -(1 << 63) - 1, HUGE, -HUGE):
        if not info.min <= bad <= info.max:
            words = f"element 2: out of range for {datatype.name}"
            assert refusal(decode, datatype.name, (3,), [0, 1, int(bad)]) == words


@pytest.mark.parametrize("datatype", INTEGERS, ids=lambda t: t.name)
def test_integers_take_only_ints(decode: ModuleType, datatype: Any) -> None:
    for got, bad in {**WORDS, "a float": 1.0, "a boolean": True}.items():
        words = f"element 1: expected an integer, got {got}"
        assert refusal(decode, datatype.name, (2,), [1, bad], True) == words


def test_bools(decode: ModuleType) -> None:
    assert filled(decode, "BOOL", (4,), [True, 0, False, 1]) == [True, False, False, True]
    for bad in (2, -1, HUGE, -HUGE):
        assert refusal(decode, "BOOL", (1,), [bad]) == "element 0: out of range for BOOL"
    for got, bad in {**WORDS, "a float": 1.0}.items():
        words = f"element 0: expected a boolean, got {got}"
        assert refusal(decode, "BOOL", (1,), [bad], True) == words


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_floats(decode: ModuleType, datatype: str) -> None:
    good = [0.5, -0.0, 3, -(1 << 53), math.inf, -math.inf, FLOAT32_MAX, -FLOAT32_MAX, 0, 1.5]
    written = filled(decode, datatype, (len(good),), good)
    assert written == good
    assert math.copysign(1, written[1]) == -1
    assert all(map(math.isnan, filled(decode, datatype, (2,), [math.nan, -math.nan])))
    for bad in (1 << 1024, -(1 << 1024), 10**400):
        words = f"element 1: out of range for {datatype}"
        assert refusal(decode, datatype, (2,), [0.0, bad]) == words
    for got, bad in {**WORDS, "a boolean": True}.items():
        words = f"element 1: expected a number, got {got}"
        assert refusal(decode, datatype, (2,), [0.0, bad], True) == words


def test_fp32_refuses_what_rounds_to_infinity(decode: ModuleType) -> None:
    assert filled(decode, "FP32", (1,), [math.nextafter(FLOAT32_TIE, 0)]) == [FLOAT32_MAX]
    for bad in (FLOAT32_TIE, -FLOAT32_TIE, 1e39, sys.float_info.max, 10**39, -(10**39)):
        assert refusal(decode, "FP32", (2,), [0.0, bad]) == "element 1: out of range for FP32"
        assert filled(decode, "FP64", (1,), [bad]) == [float(bad)]


def test_ints_round_to_the_nearest_float(decode: ModuleType) -> None:
    numbers = [(1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 10**30, -(10**30)]
    assert filled(decode, "FP64", (6,), numbers) == [float(n) for n in numbers]


def test_subclasses_of_numbers_are_numbers(decode: ModuleType) -> None:
    small = enum.IntEnum("small", [("TWO", 2)])
    assert filled(decode, "INT8", (1,), [small.TWO]) == [2]
    assert filled(decode, "FP32", (2,), [small.TWO, np.float64(0.5)]) == [2.0, 0.5]


@pytest.mark.parametrize(
    "bad",
    [np.int64(1), np.float32(1), Decimal(1), 1j, object(), range(1), {1}, iter([1])],
    ids=lambda bad: type(bad).__name__,
)
def test_lookalikes_are_refused(decode: ModuleType, bad: Any) -> None:
    words = "element 0: expected a number, got an unsupported value"
    assert refusal(decode, "FP64", (1,), [bad]) == words


@pytest.mark.parametrize("datatype", BINARY, ids=lambda t: t.name)
def test_binary_only_types(decode: ModuleType, datatype: Any) -> None:
    with pytest.raises(ValueError, match=f"^{datatype.name} is taken as binary data only$"):
        decode.fill(bytearray(8), 0, datatype.index, (1,), [1.0], False)


@pytest.mark.parametrize("index", [-1, len(DATATYPES), HUGE, -HUGE])
def test_unknown_types(decode: ModuleType, index: int) -> None:
    with pytest.raises(ValueError, match=r"^datatype_index: expected 0 to 13$"):
        decode.fill(bytearray(8), 0, index, (1,), [1.0], False)


# -- nesting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", NUMERIC, ids=lambda t: t.name)
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (1, 2, 1, 2, 1, 2, 1, 2)]
)
def test_round_trip(decode: ModuleType, datatype: Any, shape: tuple[int, ...]) -> None:
    array = (np.arange(math.prod(shape)) % 2).astype(datatype.dtype).reshape(shape)
    for data in (array.tolist(), array.ravel().tolist(), tuple(array.ravel().tolist())):
        assert filled(decode, datatype.name, shape, data) == array.ravel().tolist()
    assert filled(decode, datatype.name, shape, array.tolist(), True) == array.ravel().tolist()


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ((2, 3), [[1, 2, 3], [4, 5]], "element [1]: expected a list of 3, got 2 elements"),
        ((2, 3), [[1, 2, 3], [4]], "element [1]: expected a list of 3, got 1 element"),
        ((2, 3), [[1, 2, 3]], "data: expected a list of 2, got 1 element"),
        ((2, 3), [[1, 2, 3], 4], "element [1]: expected a list of 3, got an integer"),
        ((2, 3), [1, 2, 3, 4, 5, 6], "data: expected a list of 2, got 6 elements"),
        ((1, 2, 1), [[[1], None]], "element [0,1]: expected a list of 1, got null"),
        ((1, 2, 1), [[[1], [2, 3]]], "element [0,1]: expected a list of 1, got 2 elements"),
        ((2,), [1, [2]], "element 1: expected a number, got a list"),
        ((2,), [[1, 2]], "data: expected a list of 2, got 1 element"),
        ((), [1], "element 0: expected a number, got a list"),
        ((3,), "abc", "data: expected a list of 3, got a string"),
        ((1,), 1.0, "data: expected a list of 1, got a float"),
        ((0,), [1], "data: expected a list of 0, got 1 element"),
        ((2, 2), [[1, 2], [3, "x"]], "element 3: expected a number, got a string"),
    ],
)
def test_strict_refusals(
    decode: ModuleType, shape: tuple[int, ...], data: Any, message: str
) -> None:
    assert refusal(decode, "FP32", shape, data, True) == message


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ((2, 3), [1, 2, 3, 4, 5], "expected 6 elements (shape [2,3]), got 5"),
        ((2, 3), [[1, 2, 3], [4, 5, 6, 7], [8]], "expected 6 elements (shape [2,3]), got 8"),
        ((1,), [], "expected 1 element (shape [1]), got 0"),
        ((), [], "expected 1 element (shape []), got 0"),
        ((0, 2), [[], [1]], "expected 0 elements (shape [0,2]), got 1"),
        ((1,), [1, "surplus is counted, not judged"], "expected 1 element (shape [1]), got 2"),
        ((1,), 1, "data: expected a list, got an integer"),
        ((1,), {"a": 1}, "data: expected a list, got an object"),
        ((), "1", "element 0: expected a number, got a string"),
        ((3,), [[1], [[2]], [None]], "element 2: expected a number, got null"),
    ],
)
def test_free_refusals(decode: ModuleType, shape: tuple[int, ...], data: Any, message: str) -> None:
    assert refusal(decode, "FP32", shape, data) == message


def test_free_nesting_needs_only_the_count(decode: ModuleType) -> None:
    for data in ([[1, 2, 3], [4, 5, 6]], [[[1]], 2, (3, [4, []]), (), 5, 6], [1, 2, 3, 4, 5, [6]]):
        assert filled(decode, "INT16", (3, 2), data) == [1, 2, 3, 4, 5, 6]
    for data in (5, [5], [[5]], (5,)):
        assert filled(decode, "UINT8", (), data) == [5]


@pytest.mark.parametrize("shape", [(1,), (0,)])
def test_depth_is_bounded(decode: ModuleType, shape: tuple[int, ...]) -> None:
    innermost = list(range(math.prod(shape)))
    message = "data: nested over the limit of 100 levels"
    assert filled(decode, "INT32", shape, nested(99, innermost)) == innermost
    for levels in (100, 250_000):
        data = nested(levels, innermost)
        assert refusal(decode, "INT32", shape, data) == message
    strict = refusal(decode, "INT32", (1, 1), nested(250_000, innermost), True)
    assert strict in (
        "element 0: expected an integer, got a list",
        "element [0]: expected a list of 1, got 0 elements",
    )


@pytest.mark.parametrize("strict", [False, True])
def test_list_lookalikes_are_not_walked(decode: ModuleType, strict: bool) -> None:
    class Hostile(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError

    pair = namedtuple("pair", "a b")
    for bad in (Hostile([1, 2]), pair(1, 2), range(2), np.arange(2)):
        message = refusal(decode, "INT32", (2,), bad, strict)
        assert message.startswith("data: expected a list")
        assert message.endswith("got an unsupported value")


# -- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, -HUGE, 5, 13, HUGE, (1 << 63) - 1, (1 << 63) - 8])
def test_a_range_outside_is_refused(decode: ModuleType, offset: int) -> None:
    dst = bytearray(b"\xee" * 12)
    word = "negative" if offset < 0 else "leaves the buffer of 12 bytes"
    with pytest.raises(ValueError, match=f"dst_offset: .*{word}"):
        decode.fill(dst, offset, DATATYPES["FP32"].index, (2,), [1.0, 2.0], False)
    assert dst == b"\xee" * 12
    dst.append(0)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((1,) * (MAX_RANK + 1), ValueError, "shape: rank 9 is over the limit of 8"),
        ((-1,), ValueError, "shape: dims must not be negative"),
        ((-HUGE, 0), ValueError, "shape: dims must not be negative"),
        ((HUGE,), ValueError, "shape: more elements than memory can hold"),
        ((1 << 61,), ValueError, "shape: more elements than memory can hold"),
        ((1 << 32, 1 << 32), ValueError, "shape: more elements than memory can hold"),
        ((1 << 40,), ValueError, "dst_offset: the range leaves the buffer of 64 bytes"),
        ((1.0,), TypeError, "shape: dims must be ints"),
        (("1",), TypeError, "shape: dims must be ints"),
    ],
)
def test_bad_shapes(
    decode: ModuleType, shape: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        decode.fill(bytearray(64), 0, DATATYPES["FP32"].index, shape, [1.0], False)
    assert str(caught.value) == message


def test_an_empty_shape_may_have_huge_dims(decode: ModuleType) -> None:
    assert filled(decode, "FP32", (0, 1 << 62, 1 << 62), [], True) == []
    assert filled(decode, "FP32", (1 << 62, 1 << 62, 0), []) == []


@pytest.mark.parametrize(
    ("dst", "words"),
    [
        (b"12345678", "dst: expected a writable buffer, got a read-only one"),
        (np.zeros(8, np.float32)[::2], "dst: expected a C-contiguous buffer"),
        (np.zeros((2, 2), np.float32).T, "dst: expected a C-contiguous buffer"),
        (np.zeros(4, object), "dst: a buffer of Python objects cannot be filled"),
        (None, "a bytes-like object is required, not 'NoneType'"),
        ([0, 0], "a bytes-like object is required, not 'list'"),
    ],
    ids=["bytes", "strided", "transposed", "objects", "None", "list"],
)
def test_unfit_targets_are_refused(decode: ModuleType, dst: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        decode.fill(dst, 0, DATATYPES["FP32"].index, (1,), [1.0], False)


def test_suboffsets_are_refused(decode: ModuleType) -> None:
    testbuffer = pytest.importorskip("_testbuffer", reason="CPython was built without its tests")
    flags = testbuffer.ND_PIL | testbuffer.ND_WRITABLE
    indirect = testbuffer.ndarray([1, 2, 3, 4], shape=[2, 2], format="B", flags=flags)
    with pytest.raises(TypeError, match="dst: an indirect buffer"):
        decode.fill(indirect, 0, DATATYPES["UINT8"].index, (4,), [1, 2, 3, 4], False)


def test_no_reference_is_kept_or_lost(compiled: ModuleType) -> None:
    number, text = 123456.789, "".join(["te", "xt"])
    data = [number, [number, (number, text)]]
    watched = (number, text, data, data[1], data[1][1])
    before = [sys.getrefcount(value) for value in watched]
    dst = bytearray(64)
    for strict in (False, True):
        for shape in ((2,), (3,), (4,), (8,), (2, 2)):
            for datatype in (DATATYPES["FP64"], DATATYPES["INT8"]):
                with pytest.raises(ValueError, match="expected"):
                    compiled.fill(dst, 0, datatype.index, shape, data, strict)
    assert [sys.getrefcount(value) for value in watched] == before


# -- properties --------------------------------------------------------------------------------------

numbers = st.one_of(
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from(
        [s * (1 << b) + d for s in (1, -1) for b in (7, 8, 16, 32, 63, 64) for d in (-1, 0)]
    ),
    st.integers(),
    st.sampled_from([1 << 128, 1 << 1024, -(1 << 2000)]),
    st.floats(),
    st.sampled_from([FLOAT32_MAX, FLOAT32_TIE, -FLOAT32_TIE]),
)
junk = st.sampled_from([None, "text", b"bytes", {}, {"a": 1}, object(), 1j])
leaves = st.one_of(numbers, numbers, numbers, junk)


def lists(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(children, max_size=5), st.lists(children, max_size=5).map(tuple))


anything = st.recursive(leaves, lists, max_leaves=20)
shapes = st.lists(st.integers(-1, 4), max_size=4).map(tuple)


@st.composite
def shaped(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    """A shape and data that has it, but for a few elements."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    good = draw(
        st.sampled_from([st.booleans(), st.integers(0, 1), st.integers(-2, 9), st.floats()])
    )
    flaw = draw(st.sampled_from([good, good, leaves, anything]))

    def build(dims: tuple[int, ...]) -> Any:
        if draw(st.integers(0, 30)) == 0:
            return draw(flaw)
        return [build(dims[1:]) for _ in range(dims[0])] if dims else draw(good)

    return shape, build(shape)


@settings(FUZZ, max_examples=500)
@given(
    case=st.one_of(shaped(), st.tuples(shapes, anything)),
    index=st.one_of(st.sampled_from([t.index for t in NUMERIC]), st.integers(-1, 14)),
    strict=st.booleans(),
    offset=st.one_of(st.integers(0, 3), st.integers(-1, 130)),
)
def test_same_as_the_twin(
    compiled: ModuleType, case: tuple[tuple[int, ...], Any], index: int, strict: bool, offset: int
) -> None:
    results = []
    for fill in (compiled.fill, twin.fill):
        dst = bytearray(128)
        try:
            results.append((fill(dst, offset, index, *case, strict), bytes(dst)))
        except (ValueError, TypeError) as error:
            results.append((type(error), str(error)))
        dst.append(0)  # BufferError if a view of it were still held
    assert results[0] == results[1]


@FUZZ
@given(data=st.lists(st.one_of(st.integers(10**6), st.floats(1e6), st.text("xyz", min_size=9))))
def test_messages_never_hold_a_value(compiled: ModuleType, data: list[Any]) -> None:
    for strict in (False, True):
        message = refusal(compiled, "INT8", (9,), data, strict)
        assert not any(str(value) in message for value in data)
