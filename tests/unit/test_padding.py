"""Padding: what stands around a request's data in its slot, and what of the outputs is cut off."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocols.call import InputTensor
from gateway.serving import geometry
from gateway.serving.padding import Padder
from gateway.tensors import DATATYPES, Padding, Signature, TensorSpec

FP32, INT64 = DATATYPES["FP32"], DATATYPES["INT64"]
RIGHT = Padding("length", (4, 8), True, (("ids", 7), ("mask", 0)))
LEFT = Padding("length", (4, 8), False, ())


def signature(*inputs, outputs=(), padding=(RIGHT,), rows=8):
    return Signature(inputs, tuple(outputs), rows, (), padding)


IDS = TensorSpec("ids", INT64, ("n", "length"))
MASK = TensorSpec("mask", INT64, ("n", "length"))
IMAGE = TensorSpec("image", FP32, ("n", "height", 2, "width"))
TWO = (
    Padding("height", (4,), False, (("image", -1),)),
    Padding("width", (3, 6), True, ()),
)


def written(signature, array, spec=None, *, dtype=None):
    """What lies in the slot for one input; what lay there before was 0xEE throughout."""
    spec = spec or signature.inputs[0]
    has_rows = geometry.has_rows(signature, spec)
    dims = tuple(
        (array.shape[has_rows:] if s is spec else None if s.optional else ())
        for s in signature.inputs
    )
    dims, _ = Padder(signature).raise_dims(dims)
    rows = len(array) if has_rows else 1
    shape = geometry.shape_of(signature, dims, rows, is_described=True)
    (p,) = (p for p in shape.inputs if p.spec is spec)
    at = p.offset + 64
    buffer = bytearray(b"\xee" * (at + rows * p.row_bytes + 64))
    tensor = InputTensor(spec.name, spec.datatype, array.shape, memoryview(array.tobytes()))
    Padder(signature).write(buffer, at, tensor, p)
    end = at + rows * p.row_bytes
    assert set(buffer[:at] + buffer[end:]) == {0xEE}
    return np.frombuffer(buffer[at:end], dtype or array.dtype).reshape(p.dims(rows))


@pytest.mark.parametrize(
    ("length", "padded"), [(0, 4), (1, 4), (4, 4), (5, 8), (8, 8), (9, 9), (100, 100)]
)
def test_a_length_is_raised_to_its_bucket_or_kept_beyond_the_last(length, padded):
    dims, lengths = Padder(signature(IDS, MASK)).raise_dims(((length,), (length,)))
    assert dims == ((padded,), (padded,))
    assert lengths == ({} if padded == length else {"length": length})


def test_only_the_dims_that_bear_the_symbol_are_raised():
    x = TensorSpec("x", FP32, ("n", 3, "length", "other", None))
    extra = TensorSpec("extra", FP32, ("length",), optional=True)
    unranked = TensorSpec("any", FP32, None, optional=True)
    padder = Padder(signature(x, extra, unranked))
    dims, lengths = padder.raise_dims(((3, 2, 2, 2), (2,), (2, 2)))
    assert dims == ((3, 4, 2, 2), (4,), (2, 2))
    assert lengths == {"length": 2}
    dims, _ = padder.raise_dims(((3, 2, 2, 2), None, None))
    assert dims == ((3, 4, 2, 2), None, None)


def test_several_dims_are_raised_each_to_its_own_bucket():
    dims, lengths = Padder(signature(IMAGE, padding=TWO)).raise_dims(((2, 2, 5),))
    assert (dims, lengths) == (((4, 2, 6),), {"height": 2, "width": 5})
    dims, lengths = Padder(signature(IMAGE, padding=TWO)).raise_dims(((4, 2, 5),))
    assert (dims, lengths) == (((4, 2, 6),), {"width": 5})


def test_without_padding_nothing_is_raised():
    assert Padder(signature(IDS, padding=())).raise_dims(((3,),)) == (((3,),), {})


def test_padding_stands_behind_the_data_or_in_front_with_each_input_s_own_value():
    ids = np.array([[1, 2], [3, 4]])
    model = signature(IDS, TensorSpec("mask", INT64, ("n", "length")))
    np.testing.assert_array_equal(written(signature(IDS), ids), [[1, 2, 7, 7], [3, 4, 7, 7]])
    np.testing.assert_array_equal(
        written(signature(IDS, padding=(LEFT,)), ids), [[0, 0, 1, 2], [0, 0, 3, 4]]
    )
    mask = np.ones((2, 3), np.int64)
    lengths = Padder(model).raise_dims(((3,), (3,)))[0]
    p = geometry.shape_of(model, lengths, 2).inputs[1]
    buffer = bytearray(p.offset + 2 * p.row_bytes)
    tensor = InputTensor("mask", INT64, mask.shape, memoryview(mask.tobytes()))
    Padder(model).write(buffer, p.offset, tensor, p)
    np.testing.assert_array_equal(
        np.frombuffer(buffer, np.int64, 8, p.offset).reshape(2, 4), [[1, 1, 1, 0]] * 2
    )


def test_several_dims_are_padded_at_once():
    image = np.arange(2 * 2 * 2 * 2, dtype=np.float32).reshape(2, 2, 2, 2)
    expected = np.full((2, 4, 2, 3), -1, np.float32)
    expected[..., 2:] = 0  # each dim has a value of its own
    expected[:, 2:, :, :2] = image
    np.testing.assert_array_equal(written(signature(IMAGE, padding=TWO), image), expected)


def test_a_dim_that_is_not_padded_lends_no_value():
    image = np.arange(2 * 4 * 2 * 2, dtype=np.float32).reshape(2, 4, 2, 2)  # the height is a bucket
    expected = np.zeros((2, 4, 2, 3), np.float32)
    expected[..., :2] = image
    np.testing.assert_array_equal(written(signature(IMAGE, padding=TWO), image), expected)


def test_data_without_elements_are_padding_throughout():
    np.testing.assert_array_equal(
        written(signature(IDS), np.empty((2, 0), np.int64)), np.full((2, 4), 7)
    )


@pytest.mark.parametrize(
    ("datatype", "value", "dtype", "element"),
    [
        ("BOOL", 1, np.bool_, True),
        ("INT8", -128, np.int8, -128),
        ("UINT64", (1 << 64) - 1, np.uint64, (1 << 64) - 1),
        ("INT64", -(1 << 63), np.int64, -(1 << 63)),
        ("INT32", 5.0, np.int32, 5),
        ("FP16", -0.5, np.float16, -0.5),
        ("FP32", float("-inf"), np.float32, float("-inf")),
        ("FP32", float("nan"), np.float32, float("nan")),
        ("FP64", 0.1, np.float64, 0.1),
        ("BF16", -1.5, np.uint16, int(ml_dtypes.bfloat16(-1.5).view(np.uint16))),
        ("BF16", float("-inf"), np.uint16, 0xFF80),
    ],
)
def test_every_datatype_is_padded_with_its_own_kind_of_value(datatype, value, dtype, element):
    spec = TensorSpec("x", DATATYPES[datatype], ("n", "length"))
    padding = (Padding("length", (4,), True, (("x", value),)),)
    x = np.array([[1, 0, 1]], dtype)
    got = written(signature(spec, padding=padding), x)
    np.testing.assert_array_equal(got, np.array([[1, 0, 1, element]], dtype))


def test_inputs_without_rows_are_padded_too():
    extra = TensorSpec("extra", FP32, ("length", 2), optional=True)
    x = np.ones((3, 2), np.float32)
    got = written(signature(TensorSpec("x", FP32, ("n",)), extra), x, extra)
    np.testing.assert_array_equal(got, [[1, 1], [1, 1], [1, 1], [0, 0]])
    whole = TensorSpec("x", FP32, ("length", 2))
    np.testing.assert_array_equal(
        written(signature(whole, rows=0, padding=(LEFT,)), x), [[0, 0], [1, 1], [1, 1], [1, 1]]
    )


def cut(signature, array, lengths, *, rows=True):
    """What a request of these lengths gets of an output of the padded dims."""
    (spec,) = signature.outputs
    inner = array.shape[1:] if rows else array.shape
    p = geometry.Placement(spec, inner, 0, 0, rows)
    given = memoryview(array.tobytes())
    data, dims = Padder(signature).cut(given, array.shape, p, lengths)
    return data, dims, given


@pytest.mark.parametrize(("padding", "part"), [(RIGHT, slice(0, 3)), (LEFT, slice(1, 4))])
def test_outputs_that_bear_the_symbol_are_cut_back(padding, part):
    y = TensorSpec("y", FP32, ("n", "length", 2, "length"))
    model = signature(IDS, outputs=(y,), padding=(padding,))
    array = np.arange(2 * 4 * 2 * 4, dtype=np.float32).reshape(2, 4, 2, 4)
    data, dims, _ = cut(model, array, {"length": 3})
    assert dims == (2, 3, 2, 3)
    got = np.frombuffer(data, np.float32).reshape(dims)
    np.testing.assert_array_equal(got, array[:, part][..., part])


def test_a_request_without_a_length_of_its_own_gets_an_empty_output():
    model = signature(IDS, outputs=(TensorSpec("y", FP32, ("n", "length")),))
    data, dims, _ = cut(model, np.ones((2, 4), np.float32), {"length": 0})
    assert (bytes(data), dims) == (b"", (2, 0))


@pytest.mark.parametrize(
    ("declared", "actual"),
    [
        (("n", 4), (2, 4)),  # another dim, as large by chance
        (("n", "other"), (2, 4)),
        (("n", None), (2, 4)),
        (None, (2, 4)),
        (("n", "length"), (2, 5)),  # not what it was padded to: the model shortens it
        (("n", "length"), (2, 0)),
    ],
)
def test_what_does_not_bear_the_padding_stays_as_it_is_uncopied(declared, actual):
    model = signature(IDS, outputs=(TensorSpec("y", FP32, declared),))
    data, dims, given = cut(model, np.ones(actual, np.float32), {"length": 3})
    assert dims == actual
    assert data is given


def test_an_output_of_fewer_dims_than_it_declares_is_cut_where_it_has_them():
    model = signature(IDS, outputs=(TensorSpec("y", FP32, ("n", "length", "length")),))
    _, dims, _ = cut(model, np.ones((2, 4), np.float32), {"length": 3})
    assert dims == (2, 3)


def test_a_dim_whose_length_was_not_padded_is_not_cut():
    model = signature(
        IMAGE, outputs=(TensorSpec("y", FP32, ("n", "height", "width")),), padding=TWO
    )
    array = np.arange(4 * 6, dtype=np.float32).reshape(1, 4, 6)
    data, dims, _ = cut(model, array, {"width": 5})
    assert dims == (1, 4, 5)
    np.testing.assert_array_equal(np.frombuffer(data, np.float32).reshape(dims), array[..., :5])


def test_outputs_of_whole_models_are_cut():
    model = signature(
        TensorSpec("x", FP32, ("length",)),
        outputs=(TensorSpec("y", FP32, ("length",)),),
        rows=0,
        padding=(LEFT,),
    )
    data, dims, _ = cut(model, np.arange(8, dtype=np.float32), {"length": 6}, rows=False)
    assert dims == (6,)
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), np.arange(2, 8))


lengths = st.integers(0, 12)


@given(
    rows=st.integers(1, 4), height=lengths, width=lengths, ends=st.tuples(st.booleans(), st.booleans())
)  # fmt: skip
def test_what_was_padded_and_cut_is_what_it_was(rows, height, width, ends):
    image = TensorSpec("image", FP32, ("n", "height", "width"))
    padding = (
        Padding("height", (3, 8), ends[0], (("image", 9),)),
        Padding("width", (5, 10), ends[1], ()),
    )
    model = signature(image, outputs=(image,), padding=padding)
    array = np.random.default_rng(0).standard_normal((rows, height, width)).astype(np.float32)
    padded = written(model, array)
    _, own = Padder(model).raise_dims((array.shape[1:],))
    data, dims, _ = cut(model, padded, own)
    assert dims == array.shape
    assert bytes(data) == array.tobytes()
