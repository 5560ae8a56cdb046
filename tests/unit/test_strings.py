"""Strings on the worker's side: arrays of bytes from and to their serialised and native forms."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from gateway import bytestrings
from gateway.serving import strings
from gateway.serving.geometry import STRINGS, Placement
from gateway.tensors import DATATYPES, TensorSpec

ODD = [b"", b"plain", "zürich".encode(), b"\0", b"a\0b", b"\xff\xfe", b"x" * 300]


def placement(inner, offset, *, has_rows=True):
    spec = TensorSpec("s", DATATYPES["BYTES"], None)
    return Placement(spec, inner, STRINGS.size, offset, has_rows)


def slot(rows, records_at, heap_at):
    """An input region: records of the rows, and their strings behind each other in the heap."""
    region = bytearray(2048)
    for i, row in enumerate(rows):
        data = bytestrings.serialise(row)
        region[heap_at : heap_at + len(data)] = data
        STRINGS.pack_into(region, records_at + i * STRINGS.size, heap_at, len(data))
        heap_at += len(data)
    return memoryview(region)


def test_rows_are_read_from_where_their_records_say():
    region = slot([ODD[:2], ODD[2:4], ODD[4:6]], records_at=64, heap_at=500)
    array = strings.read_rows(region, placement((2,), 64), 3)
    assert array.shape == (3, 2)
    assert array.reshape(-1).tolist() == ODD[:6]


def test_records_may_lie_in_any_order_as_after_a_cancellation():
    region = slot([[b"first"], [b"gone"], [b"last"]], records_at=0, heap_at=300)
    moved = bytearray(region)
    moved[STRINGS.size : 2 * STRINGS.size] = moved[2 * STRINGS.size : 3 * STRINGS.size]
    array = strings.read_rows(memoryview(moved), placement((1,), 0), 2)
    assert array.tolist() == [[b"first"], [b"last"]]


@pytest.mark.parametrize(("inner", "row"), [((), [b"one"]), ((2, 1), [b"a", b"b"]), ((0, 3), [])])
def test_a_tensor_without_rows_is_one_record(inner, row):
    region = slot([row], records_at=0, heap_at=100)
    array = strings.read_rows(region, placement(inner, 0, has_rows=False), 5)
    assert array.shape == inner
    assert array.reshape(-1).tolist() == row


def test_text_and_bytes_are_each_other_s_inverse():
    array = strings.as_array(["", "zürich", "nul\0", "😀"], (2, 2))
    encoded = strings.as_bytes(array)
    assert encoded[0, 1] == "zürich".encode()
    np.testing.assert_array_equal(strings.as_text(encoded), array)
    with pytest.raises(UnicodeDecodeError):
        strings.as_text(strings.as_array([b"fine", b"\xff"], (2,)))


@pytest.mark.parametrize(
    ("elements", "dims"),
    [(ODD[:1], ()), (ODD[:6], (2, 3)), ([], (0,)), ([], (3, 0)), (ODD, (7, 1))],
)
def test_the_constant_is_what_onnx_itself_reads(elements, dims):
    array = strings.as_array(elements, dims)
    model = onnx.load_from_string(strings.constant_graph(array))
    (node,) = model.graph.node
    got = helper.get_attribute_value(node.attribute[0])
    assert tuple(got.dims) == dims
    assert list(got.string_data) == elements
    assert [output.name for output in model.graph.output] == ["s"]


@given(st.lists(st.binary(max_size=300), max_size=200))
def test_any_bytes_make_a_constant(elements):
    array = strings.as_array(elements, (len(elements),))
    model = onnx.load_from_string(strings.constant_graph(array))
    assert list(model.graph.node[0].attribute[0].t.string_data) == elements
    # NumPy drops the NULs that text ends with.
    if elements and all(_is_text(e) and not e.endswith(b"\0") for e in elements):
        read = numpy_helper.to_array(model.graph.node[0].attribute[0].t)
        assert [text.encode() for text in read.tolist()] == elements


def _is_text(element):
    try:
        element.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_native_strings_are_read_by_address_and_length():
    """Two words of libstdc++'s four: the others are its capacity or the short string itself."""
    kept = [ctypes.create_string_buffer(element, len(element) + 1) for element in ODD[:6]]
    words = np.zeros((6, 4), np.uint64)
    for i, (buffer, element) in enumerate(zip(kept, ODD, strict=False)):
        words[i, :2] = ctypes.addressof(buffer), len(element)
    array = strings.read_native(words.ctypes.data, (3, 2))
    assert array.shape == (3, 2)
    assert array.reshape(-1).tolist() == ODD[:6]
    assert strings.read_native(0, (0,)).shape == (0,)
