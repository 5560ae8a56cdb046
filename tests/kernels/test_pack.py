from __future__ import annotations

import array
import ctypes
import mmap
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.builds import BUILDS, IMPLEMENTATIONS, load
from tests.twins import pack as twin

HUGE = 1 << 70
LARGE_BYTES = 1 << 20  # from here on the kernel lets go of the GIL
FUZZ = settings(deadline=None, max_examples=120)
DTYPES = [
    np.dtype(d)
    for d in ("?", "i1", "<u2", ">i2", "<f2", "<i4", ">f4", "<f8", "<c8", "<c16", "S3", "V5")
] + [np.dtype([("a", "u1"), ("b", "<f4")]), np.dtype([("a", "u1"), ("b", "<f8")], align=True)]


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def pack(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "pack")


@pytest.fixture(scope="module", params=BUILDS)
def compiled(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param, "pack")


def counted(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new array whose bytes count up, so that a misplaced one shows."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return (np.arange(size) % 251).astype(np.uint8).view(dtype).reshape(shape)


def raw(tensor: Any) -> bytes:
    """The bytes in C order; unlike NumPy's tobytes, with the padding inside records."""
    return memoryview(tensor).tobytes()


@st.composite
def views(draw: st.DrawFn) -> np.ndarray:
    """A writable view with any order of dims and steps of either sign."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    view = counted(shape, draw(st.sampled_from(DTYPES)))
    view = view.transpose(draw(st.permutations(range(view.ndim))))
    steps = st.sampled_from([1, 1, 2, 3, -1, -2])
    return view[(..., *(slice(None, None, draw(steps)) for _ in shape))]


@st.composite
def broadcasts(draw: st.DrawFn) -> np.ndarray:
    """A read-only view, some of whose dims have a stride of 0."""
    view = draw(views())
    return np.broadcast_to(view, (*draw(st.lists(st.integers(0, 4), max_size=3)), *view.shape))


def outcome(call: Any, *args: Any) -> Any:
    """What a call returned, or the type and message of its error."""
    try:
        return call(*args)
    except (ValueError, TypeError) as error:
        return type(error), str(error)


# -- copies ------------------------------------------------------------------------------------------


@FUZZ
@given(src=st.one_of(views(), broadcasts()), before=st.integers(0, 9), after=st.integers(0, 9))
def test_copy_in_writes_c_order_and_nothing_else(
    pack: ModuleType, src: np.ndarray, before: int, after: int
) -> None:
    dst = bytearray(b"\xee" * (before + src.nbytes + after))
    assert pack.copy_in(dst, before, src) == src.nbytes
    assert dst == b"\xee" * before + raw(src) + b"\xee" * after


@FUZZ
@given(dst=views(), before=st.integers(0, 9), after=st.integers(0, 9))
def test_copy_out_fills_each_element_and_nothing_else(
    pack: ModuleType, dst: np.ndarray, before: int, after: int
) -> None:
    owner = dst
    while owner.base is not None:
        owner = owner.base
    outside = np.ones(owner.nbytes, bool)
    start = dst.ctypes.data - owner.ctypes.data
    for index in np.ndindex(dst.shape):
        at = start + sum(i * stride for i, stride in zip(index, dst.strides, strict=True))
        outside[at : at + dst.itemsize] = False
    untouched = owner[outside]
    items = bytes((i * 7 + 3) % 251 for i in range(dst.nbytes))
    assert pack.copy_out(b"\xee" * before + items + b"\xee" * after, before, dst) == dst.nbytes
    assert raw(dst) == items
    assert np.array_equal(owner[outside], untouched)


@FUZZ
@given(src=st.one_of(views(), broadcasts()))
def test_round_trip(pack: ModuleType, src: np.ndarray) -> None:
    flat = bytearray(src.nbytes)
    pack.copy_in(flat, 0, src)
    copy = np.empty(src.shape[::-1], src.dtype).T
    pack.copy_out(flat, 0, copy)
    assert raw(copy) == raw(src)


@pytest.mark.parametrize("item", [1, 2, 3, 4, 8, 16])
def test_large_copies(pack: ModuleType, item: int) -> None:
    rows = LARGE_BYTES // (item * 64) + 1
    contiguous = counted((rows, 64), f"V{item}")
    for tensor in (
        contiguous,
        contiguous.T,
        contiguous[::-1],
        counted((rows, 128), f"V{item}")[:, ::2],
    ):
        assert tensor.nbytes >= LARGE_BYTES
        flat = bytearray(tensor.nbytes + 1)
        assert pack.copy_in(flat, 1, tensor) == tensor.nbytes
        assert flat[1:] == raw(tensor)
        back = np.zeros((*tensor.shape[::-1], 2), tensor.dtype)[..., 1].T
        assert pack.copy_out(flat, 1, back) == tensor.nbytes
        assert raw(back) == raw(tensor)


@pytest.mark.parametrize(
    "src",
    [
        b"abcdef",
        array.array("d", [1.5, -2.0]),
        (ctypes.c_int16 * 3 * 2)(),
        ctypes.c_double(0.5),
        memoryview(b"abcdef")[::-2],
        np.float32(3.25),
        np.array(7, np.int64),
        np.zeros((0, 3)),
        np.zeros((3, 0))[::-1],
        np.zeros((1 << 40, 0))[::-1],
        np.lib.stride_tricks.sliding_window_view(counted((9,), np.int16)[::2], 3),
        counted((1, 2, 1, 2, 1, 2, 1, 2), np.int16)[..., ::-1],
    ],
    ids=lambda src: f"{type(src).__name__}{getattr(src, 'shape', '')}",
)
def test_any_exporter(pack: ModuleType, src: Any) -> None:
    expected = raw(src)
    dst = np.zeros((len(expected) + 3,), np.uint8)
    assert pack.copy_in(dst, 2, src) == len(expected)
    assert dst.tobytes() == b"\0\0" + expected + b"\0"


@pytest.mark.parametrize("strided", [False, True])
def test_copy_out_into_any_exporter(pack: ModuleType, strided: bool) -> None:
    for dst in (
        array.array("i", [0] * 6),
        (ctypes.c_int32 * 6)(),
        bytearray(24),
        mmap.mmap(-1, 24),
    ):
        view = memoryview(dst).cast("B")
        target = view[::2] if strided else dst
        items = bytes(range(1, len(view[::2]) + 1)) if strided else bytes(range(1, 25))
        assert pack.copy_out(items, 0, target) == len(items)
        assert bytes(view[::2] if strided else view) == items
        assert not strided or not any(view[1::2])


# -- move --------------------------------------------------------------------------------------------


@FUZZ
@given(content=st.binary(max_size=64), data=st.data())
def test_move_is_a_slice_assignment(pack: ModuleType, content: bytes, data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(0, len(content)))
    starts = st.integers(0, len(content) - nbytes)
    to, start = data.draw(starts), data.draw(starts)
    buffer, expected = bytearray(content), bytearray(content)
    expected[to : to + nbytes] = content[start : start + nbytes]
    assert pack.move(buffer, to, start, nbytes) is None
    assert buffer == expected


@pytest.mark.parametrize("shift", [1, -1])
def test_large_moves_overlap(pack: ModuleType, shift: int) -> None:
    buffer = counted((LARGE_BYTES + 2,), np.uint8)
    expected = buffer[1:-1].copy()
    pack.move(buffer, 1 + shift, 1, LARGE_BYTES)
    assert np.array_equal(buffer[1 + shift :][:LARGE_BYTES], expected)


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, -HUGE, 9, 13, HUGE, (1 << 63) - 1, (1 << 63) - 8])
def test_a_range_outside_is_refused(pack: ModuleType, offset: int) -> None:
    flat, item = bytearray(b"\xee" * 12), np.array([1.5, 2.5], np.float32)
    word = "negative" if offset < 0 else "leaves the buffer of 12 bytes"
    with pytest.raises(ValueError, match=f"dst_offset: .*{word}"):
        pack.copy_in(flat, offset, item)
    with pytest.raises(ValueError, match=f"src_offset: .*{word}"):
        pack.copy_out(flat, offset, item)
    with pytest.raises(ValueError, match=f"dst_offset: .*{word}"):
        pack.move(flat, offset, 0, 4)
    with pytest.raises(ValueError, match=f"src_offset: .*{word}"):
        pack.move(flat, 0, offset, 4)
    assert flat == b"\xee" * 12
    assert item.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("nbytes", [-1, 13, HUGE, -HUGE, (1 << 63) - 1])
def test_a_size_outside_is_refused(pack: ModuleType, nbytes: int) -> None:
    with pytest.raises(ValueError, match="negative" if nbytes < 0 else "leaves the buffer"):
        pack.move(bytearray(12), 0, 0, nbytes)


def test_the_end_of_a_buffer_is_inside(pack: ModuleType) -> None:
    flat = bytearray(8)
    assert pack.copy_in(flat, 8, b"") == 0
    assert pack.copy_in(flat, 0, b"12345678") == 8
    pack.move(flat, 8, 8, 0)
    assert flat == b"12345678"


def test_rank_over_the_limit(pack: ModuleType) -> None:
    deep = np.zeros((2,) * 9, np.uint8)
    with pytest.raises(ValueError, match="src: rank 9 is over the limit of 8"):
        pack.copy_in(bytearray(512), 0, deep)
    with pytest.raises(ValueError, match="dst: rank 9 is over the limit of 8"):
        pack.copy_out(bytearray(512), 0, deep)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.array([{}, []], object), "Python objects"),
        (np.zeros(2, [("n", "i4"), ("o", "O")]), "Python objects"),
        ((ctypes.py_object * 2)(None, None), "Python objects"),
        (5, "bytes-like object is required, not 'int'"),
        (None, "bytes-like object is required, not 'NoneType'"),
        ("text", "bytes-like object is required, not 'str'"),
        ([1, 2], "bytes-like object is required, not 'list'"),
    ],
    ids=["objects", "record", "py_object", "int", "None", "str", "list"],
)
def test_what_is_not_bytes_is_refused_anywhere(pack: ModuleType, bad: Any, words: str) -> None:
    flat = bytearray(64)
    for call, args in (
        (pack.copy_in, (flat, 0, bad)),
        (pack.copy_in, (bad, 0, b"x")),
        (pack.copy_out, (flat, 0, bad)),
        (pack.copy_out, (bad, 0, bytearray(1))),
        (pack.move, (bad, 0, 0, 1)),
    ):
        with pytest.raises(TypeError, match=words):
            call(*args)
    flat.append(0)  # BufferError if a view of it were still held


def test_unfit_targets_are_refused(pack: ModuleType) -> None:
    strided = np.zeros(16, np.uint8)[::2]
    frozen = np.zeros(8, np.uint8)
    frozen.flags.writeable = False
    for target in (b"12345678", frozen, memoryview(bytearray(8)).toreadonly()):
        for call, args in (
            (pack.copy_in, (target, 0, b"x")),
            (pack.copy_out, (b"12345678", 0, target)),
            (pack.move, (target, 0, 1, 1)),
        ):
            with pytest.raises(TypeError, match="expected a writable buffer, got a read-only one"):
                call(*args)
    for call, args in (
        (pack.copy_in, (strided, 0, b"x")),
        (pack.copy_out, (strided, 0, bytearray(1))),
        (pack.move, (strided, 0, 1, 1)),
    ):
        with pytest.raises(TypeError, match="expected a C-contiguous buffer"):
            call(*args)


def test_suboffsets_are_refused(pack: ModuleType) -> None:
    testbuffer = pytest.importorskip("_testbuffer", reason="CPython was built without its tests")
    flags = testbuffer.ND_PIL | testbuffer.ND_WRITABLE
    indirect = testbuffer.ndarray([1, 2, 3, 4], shape=[2, 2], format="B", flags=flags)
    with pytest.raises(TypeError, match="src: an indirect buffer"):
        pack.copy_in(bytearray(4), 0, indirect)
    with pytest.raises(TypeError, match="dst: an indirect buffer"):
        pack.copy_out(bytearray(4), 0, indirect)


@pytest.mark.parametrize("offset", [0, -1, 5, "0", None, 0.0])
def test_every_buffer_is_released(compiled: ModuleType, offset: Any) -> None:
    flat, tensor = bytearray(8), bytearray(4)
    for call, args in (
        (compiled.copy_in, (flat, offset, tensor)),
        (compiled.copy_in, (flat, offset, memoryview(tensor)[::2])),
        (compiled.copy_in, (flat, offset, np.zeros((1,) * 9, np.uint8))),
        (compiled.copy_in, (flat, 0, 5)),
        (compiled.copy_out, (flat, offset, tensor)),
        (compiled.copy_out, (flat, 0, b"read-only")),
        (compiled.move, (flat, offset, 0, 4)),
        (compiled.move, (memoryview(flat)[::2], 0, 0, 1)),
    ):
        outcome(call, *args)
    del call, args
    flat.append(0)  # BufferError if a view of it were still held
    tensor.append(0)


# -- against the twin --------------------------------------------------------------------------------


@FUZZ
@given(tensor=st.one_of(views(), broadcasts()), size=st.integers(0, 200), data=st.data())
def test_same_as_the_twin(
    compiled: ModuleType, tensor: np.ndarray, size: int, data: st.DataObject
) -> None:
    numbers = st.one_of(st.integers(-2, size + 2), st.just(0), st.sampled_from([HUGE, -HUGE]))
    a, b, c = (data.draw(numbers) for _ in range(3))
    mine, other = bytearray(range(size)), bytearray(range(size))
    assert outcome(compiled.copy_in, mine, a, tensor) == outcome(twin.copy_in, other, a, tensor)
    assert outcome(compiled.move, mine, a, b, c) == outcome(twin.move, other, a, b, c)
    assert mine == other
    results = []
    for call in (compiled.copy_out, twin.copy_out):
        if tensor.flags.writeable:
            tensor.view(f"V{tensor.itemsize}")[...] = np.void(b"\xee" * tensor.itemsize)
        results.append((outcome(call, mine, a, tensor), raw(tensor)))
    assert results[0] == results[1]
