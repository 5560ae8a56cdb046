"""Where rows lie in a lane, computed alike by front end and worker."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving import geometry
from gateway.serving.geometry import LINE
from gateway.tensors import DATATYPES, MAX_RANK, Signature, TensorSpec

FP32, INT8, FP64 = DATATYPES["FP32"], DATATYPES["INT8"], DATATYPES["FP64"]
BYTES, INT64 = DATATYPES["BYTES"], DATATYPES["INT64"]


def signature(*inputs: TensorSpec, outputs=(), rows: int = 8, **more) -> Signature:
    return Signature(inputs, tuple(outputs), rows, **more)


DYNAMIC = signature(
    TensorSpec("a", FP32, ("n", "length")),
    TensorSpec("b", INT8, ("n", 3)),
    outputs=(TensorSpec("y", FP64, ("n", "length", 2)),),
)
WITH_DEFAULTS = signature(
    TensorSpec("x", FP32, ("n", "length")),
    TensorSpec("scale", FP32, (), optional=True),
    TensorSpec("mask", INT8, ("length", 2), optional=True),
    TensorSpec("bias", FP32, None, optional=True),
    outputs=(TensorSpec("y", FP32, ("n", "length")),),
)
SCALAR = signature(
    TensorSpec("x", FP32, ()), outputs=(TensorSpec("y", FP32, (2, 3)),), rows=0
)  # fmt: skip
ANY_RANK = signature(
    TensorSpec("x", FP32, None), outputs=(TensorSpec("y", FP32, None),), rows=0
)  # fmt: skip

some_dims = st.lists(st.integers(0, 1 << 40), max_size=MAX_RANK).map(tuple)


def assert_apart(placements, capacity, begin, end):
    for p in placements:
        assert p.offset % LINE == 0
        assert p.offset >= begin
        begin = p.offset + p.row_bytes * (capacity if p.has_rows else 1)
    assert begin <= end


@given(length=st.integers(0, 500), capacity=st.integers(1, 64))
def test_tensors_of_a_slot_never_overlap_and_are_aligned(length, capacity):
    shape = geometry.shape_of(DYNAMIC, ((length,), (3,)), capacity)
    assert_apart(shape.inputs, capacity, 0, shape.input_bytes)
    assert_apart(shape.outputs, capacity, geometry.head_bytes(1), shape.output_bytes)
    assert shape.outputs[0].inner == (length, 2)
    assert shape.outputs[0].row_bytes == length * 2 * 8


@given(length=st.integers(0, 50), capacity=st.integers(1, 64), bias=st.none() | some_dims)
def test_an_input_without_rows_is_there_once_whatever_the_rows(length, capacity, bias):
    bias = None if bias is None else tuple(dim % 4 for dim in bias)
    shape = geometry.shape_of(WITH_DEFAULTS, ((length,), None, (length, 2), bias), capacity)
    names = [p.spec.name for p in shape.inputs]
    assert names == (["x", "mask"] if bias is None else ["x", "mask", "bias"])
    assert_apart(shape.inputs, capacity, 0, shape.input_bytes)
    x, mask, *_ = shape.inputs
    assert (x.has_rows, mask.has_rows) == (True, False)
    assert x.dims(5) == (5, length)
    assert mask.dims(5) == (length, 2)
    assert mask.offset == geometry.align(capacity * length * 4)
    assert shape.outputs[0].inner == (length,)


def test_only_required_inputs_of_batched_models_have_rows():
    x, scale, *_ = WITH_DEFAULTS.inputs
    assert geometry.has_rows(WITH_DEFAULTS, x)
    assert not geometry.has_rows(WITH_DEFAULTS, scale)
    assert not geometry.has_rows(SCALAR, SCALAR.inputs[0])
    assert geometry.inner_of(WITH_DEFAULTS, x) == ("length",)
    assert geometry.inner_of(WITH_DEFAULTS, WITH_DEFAULTS.inputs[2]) == ("length", 2)


def test_a_whole_model_has_slots_of_one_row_which_is_the_tensor():
    shape = geometry.slot_shape(SCALAR, ((),), 1 << 20)
    assert shape.capacity == 1
    (x,), (y,) = shape.inputs, shape.outputs
    assert (x.dims(1), x.row_bytes, x.span(0, 1)) == ((), 4, (0, 4))
    assert (y.dims(1), y.row_bytes) == ((2, 3), 24)


@pytest.mark.parametrize("dims", [(0,), (3, 0, 2), (1,) * MAX_RANK])
def test_tensors_of_any_dims_have_a_place_also_without_elements(dims):
    shape = geometry.slot_shape(ANY_RANK, (dims,), 1 << 20)
    (x,) = shape.inputs
    assert x.dims(1) == dims
    assert x.row_bytes == 4 * int(np.prod(dims))
    spec = geometry.lane_spec(ANY_RANK, shape, 0, 1 << 20)
    assert spec.input_slot_bytes >= max(LINE, shape.input_bytes)
    assert spec.output_slot_bytes >= shape.output_bytes


def test_a_lane_of_nothing_but_empty_tensors_still_has_memory():
    empty = signature(
        TensorSpec("x", FP32, ("n", 0)), outputs=(TensorSpec("y", FP32, ("n", 0)),)
    )  # fmt: skip
    shape = geometry.slot_shape(empty, ((0,),), 1 << 20)
    assert shape.capacity == 8
    assert geometry.lane_spec(empty, shape, 0, 1 << 20).input_slot_bytes == LINE


def test_a_fixed_model_gets_exact_slots_and_a_dynamic_one_size_classes():
    fixed = signature(
        TensorSpec("x", FP32, ("n", 16)), outputs=(TensorSpec("y", FP32, ("n", 4)),), rows=64
    )
    shape = geometry.slot_shape(fixed, ((16,),), 1 << 26)
    spec = geometry.lane_spec(fixed, shape, 0, 1 << 26)
    assert spec.input_slot_bytes == 64 * 16 * 4
    assert spec.slot_count == geometry.MAX_SLOT_COUNT
    specs = set()
    for length in range(1, 3000):
        shape = geometry.slot_shape(DYNAMIC, ((length,), (3,)), 1 << 26)
        spec = geometry.lane_spec(DYNAMIC, shape, 0, 1 << 26)
        assert shape.input_bytes <= spec.input_slot_bytes
        assert shape.output_bytes <= spec.output_slot_bytes
        specs.add(spec)
    assert len(specs) <= 6


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("x", FP32, ("n", "k")),
        TensorSpec("x", FP32, ("n", None)),
        TensorSpec("x", FP32, None),
        TensorSpec("x", BYTES, ("n", 2)),
        TensorSpec("x", FP32, (2,), optional=True),
    ],
    ids=["symbol", "unknown dim", "unknown rank", "strings", "optional"],
)
def test_whatever_varies_makes_a_model_variable(spec):
    fixed = TensorSpec("f", FP32, ("n", 4))
    assert geometry.has_fixed_dims(signature(fixed, outputs=(fixed,)))
    assert not geometry.has_fixed_dims(signature(fixed, spec, outputs=(fixed,)))
    assert geometry.has_fixed_dims(signature(TensorSpec("x", FP32, (2, 3)), rows=0))
    assert not geometry.has_fixed_dims(signature(TensorSpec("x", FP32, ("n", 3)), rows=0))


def capacity(signature, dims, lane_bytes=1 << 20):
    shape = geometry.slot_shape(signature, dims, lane_bytes)
    return None if shape is None else shape.capacity


def test_very_large_rows_make_smaller_batches():
    assert capacity(DYNAMIC, ((10,), (3,))) == 8
    assert capacity(DYNAMIC, ((1 << 14,), (3,))) == 4  # outputs of 256 KiB a row
    assert capacity(DYNAMIC, ((1 << 16,), (3,))) == 1  # of 1 MiB
    assert capacity(DYNAMIC, ((1 << 18,), (3,))) is None  # inputs over 1 MiB


def test_outputs_of_which_not_one_row_fits_are_left_to_the_worker():
    shape = geometry.slot_shape(DYNAMIC, ((1 << 17,), (3,)), 1 << 20)
    assert shape.capacity == 1
    assert shape.outputs is None
    assert shape.output_bytes == geometry.head_bytes(1) + geometry.DESCRIBED_OUTPUT_BYTES


@given(length=st.integers(0, 1 << 17))
def test_allowed_batch_sizes_round_the_capacity_down(length):
    sizes = (2, 6, 8)
    padded = signature(*DYNAMIC.inputs, outputs=DYNAMIC.outputs, allowed_batch_sizes=sizes)
    free = capacity(DYNAMIC, ((length,), (3,)))
    fitting = [size for size in sizes if size <= free]
    assert capacity(padded, ((length,), (3,))) == (max(fitting) if fitting else None)


def test_strings_have_a_heap_of_their_own():
    texts = signature(
        TensorSpec("s", BYTES, ("n", 5)), outputs=(TensorSpec("y", FP32, ("n", 1)),)
    )  # fmt: skip
    shape = geometry.slot_shape(texts, ((5,),), 1 << 20)
    assert shape.capacity == 8
    assert shape.inputs[0].row_bytes == geometry.STRINGS.size  # a record, whatever the row holds
    heap = geometry.string_heap(200, shape.capacity, 1 << 20)
    assert heap == 8 * 256
    spec = geometry.lane_spec(texts, shape, heap, 1 << 20)
    assert spec.input_slot_bytes >= shape.input_bytes + heap


@given(rows=st.integers(1, 64), total=st.integers(0, 1 << 26))
def test_the_strings_of_one_request_always_fit_the_heap(rows, total):
    heap = geometry.string_heap(-(-total // rows), 64, 1 << 26)
    assert total <= heap <= 1 << 26


@given(nbytes=st.integers(0, 1 << 40), smallest=st.sampled_from([256, 4096]))
def test_a_size_class_holds_what_it_is_for_and_not_much_more(nbytes, smallest):
    size = geometry.size_class(nbytes, smallest)
    assert nbytes <= size
    assert size == smallest or size < 4 * nbytes


@pytest.mark.parametrize(
    "output",
    [
        TensorSpec("y", FP32, ("n", "found")),
        TensorSpec("y", FP32, ("n", None)),
        TensorSpec("y", FP32, None),
    ],
    ids=["symbol of no input", "unknown dim", "unknown rank"],
)
def test_an_output_dim_that_no_input_binds_is_only_known_after_the_run(output):
    x = TensorSpec("x", FP32, ("n", 4))
    rows = 0 if output.shape is None else 8
    dims = ((4,),) if rows else ((2, 4),)
    assert geometry.shape_of(signature(x, outputs=(output,), rows=rows), dims, 1).outputs is None


def test_a_symbol_of_an_optional_input_that_is_left_out_is_not_known():
    y = TensorSpec("y", FP32, ("n", "k"))
    x, extra = TensorSpec("x", FP32, ("n", 4)), TensorSpec("e", FP32, ("k",), optional=True)
    both = signature(x, extra, outputs=(y,))
    assert geometry.shape_of(both, ((4,), None), 8).outputs is None
    assert geometry.shape_of(both, ((4,), (7,)), 8).outputs[0].inner == (7,)


def test_outputs_are_described_where_the_signature_or_the_slot_says_so():
    described = signature(*DYNAMIC.inputs, outputs=DYNAMIC.outputs, describes_outputs=True)
    dims = ((4,), (3,))
    assert geometry.shape_of(DYNAMIC, dims, 8).outputs is not None
    assert geometry.shape_of(described, dims, 8).outputs is None
    assert geometry.shape_of(DYNAMIC, dims, 8, is_described=True).outputs is None


def round_trip(signature, dims, *, is_described=False):
    shape = geometry.shape_of(signature, dims, 1, is_described=is_described)
    flat = geometry.flatten(signature, shape)
    assert len(flat) == geometry.record_dims(signature)
    return geometry.unflatten(signature, flat)


@given(length=st.integers(0, 99), is_described=st.booleans())
def test_dims_survive_the_record(length, is_described):
    dims = ((length,), (3,))
    assert round_trip(DYNAMIC, dims, is_described=is_described) == (is_described, dims)


@given(
    length=st.integers(0, 1 << 40),
    has_scale=st.booleans(),
    has_mask=st.booleans(),
    bias=st.none() | some_dims,
)
def test_optional_inputs_survive_the_record_or_their_absence_does(
    length, has_scale, has_mask, bias
):
    dims = ((length,), () if has_scale else None, (length, 2) if has_mask else None, bias)
    assert round_trip(WITH_DEFAULTS, dims) == (False, dims)


@given(dims=some_dims)
def test_any_rank_survives_the_record(dims):
    assert round_trip(ANY_RANK, (dims,)) == (True, (dims,))  # its output is always described


def test_a_scalar_and_a_model_without_inputs_survive_the_record():
    assert round_trip(SCALAR, ((),)) == (False, ((),))
    assert round_trip(signature(outputs=SCALAR.outputs, rows=0), ()) == (False, ())


def test_a_lane_s_geometry_survives_the_wire():
    spec = geometry.LaneSpec(8, 64, 4096, 3)
    assert geometry.LaneSpec.from_wire(spec.to_wire()) == spec


def test_numpy_agrees_on_sizes():
    for datatype in DATATYPES.values():
        if datatype.numpy is not None:
            assert datatype.itemsize == np.dtype(datatype.numpy).itemsize
