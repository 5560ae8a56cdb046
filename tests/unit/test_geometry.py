"""Where rows lie, and what is believed of what a worker wrote."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving import geometry
from gateway.tensors import DATATYPES, Signature, TensorSpec

FP32, INT8, FP64 = DATATYPES["FP32"], DATATYPES["INT8"], DATATYPES["FP64"]


def signature(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...], rows: int = 8) -> Signature:
    return Signature(inputs, outputs, rows)


DYNAMIC = signature(
    TensorSpec("a", FP32, ("n", "length")),
    TensorSpec("b", INT8, ("n", 3)),
    outputs=(TensorSpec("y", FP64, ("n", "length", 2)),),
)


@given(length=st.integers(0, 500), capacity=st.integers(1, 64))
def test_tensors_of_a_slot_never_overlap_and_are_aligned(length, capacity):
    shape = geometry.shape_of(DYNAMIC, ((length,), (3,)), capacity)
    end = 0
    for placement in shape.inputs:
        assert placement.offset % geometry.LINE == 0
        assert placement.offset >= end
        end = placement.offset + placement.row_bytes * capacity
    assert end <= shape.input_bytes
    (y,) = shape.outputs
    assert y.inner == (length, 2)
    assert y.offset >= geometry.head_bytes(1)
    assert y.offset + y.row_bytes * capacity <= shape.output_bytes


def test_a_fixed_model_gets_exact_slots_and_a_dynamic_one_size_classes():
    fixed = signature(
        TensorSpec("x", FP32, ("n", 16)), outputs=(TensorSpec("y", FP32, ("n", 4)),), rows=64
    )
    shape = geometry.shape_of(fixed, ((16,),), 64)
    spec = geometry.lane_spec(fixed, shape, 1 << 26)
    assert spec.input_slot_bytes == 64 * 16 * 4
    assert spec.slot_count == geometry.MAX_SLOT_COUNT
    specs = set()
    for length in range(1, 3000):
        shape = geometry.shape_of(DYNAMIC, ((length,), (3,)), 8)
        spec = geometry.lane_spec(DYNAMIC, shape, 1 << 26)
        assert shape.input_bytes <= spec.input_slot_bytes
        assert shape.output_bytes <= spec.output_slot_bytes
        specs.add(spec)
    assert len(specs) <= 6


def test_very_large_rows_make_smaller_batches():
    assert geometry.capacity_of(DYNAMIC, ((10,), (3,)), 1 << 20) == 8
    assert geometry.capacity_of(DYNAMIC, ((1 << 16,), (3,)), 1 << 20) == 1  # outputs of 1 MiB
    assert geometry.capacity_of(DYNAMIC, ((1 << 17,), (3,)), 1 << 20) == 0


def test_an_output_dim_that_no_input_binds_is_only_known_after_the_run():
    data_dependent = signature(
        TensorSpec("x", FP32, ("n", 4)), outputs=(TensorSpec("y", FP32, ("n", "found")),)
    )
    assert geometry.shape_of(data_dependent, ((4,),), 8).outputs is None
    unnamed = signature(
        TensorSpec("x", FP32, ("n", None)), outputs=(TensorSpec("y", FP32, ("n", None)),)
    )
    assert geometry.shape_of(unnamed, ((4,),), 8).outputs is None


@given(flat=st.lists(st.integers(0, 99), min_size=2, max_size=2))
def test_dims_survive_the_record(flat):
    assert geometry.split_dims(DYNAMIC, flat) == ((flat[0],), (flat[1],))


def test_error_texts_are_cut_and_never_trusted():
    region = memoryview(bytearray(geometry.head_bytes(1)))
    geometry.write_error(region, "ü" * 1000)
    assert 0 < len(geometry.read_error(region)) <= geometry.ERROR_BYTES
    region[:4] = b"\xff\xff\xff\xff"
    assert len(geometry.read_error(region).encode()) <= 3 * geometry.ERROR_BYTES


def test_descriptors_round_trip():
    region = memoryview(bytearray(4096))
    geometry.write_descriptors(region, [((2, 5, 2), 1024, 160)])
    (placement,) = geometry.read_descriptors(region, DYNAMIC, rows=2)
    assert (placement.inner, placement.row_bytes, placement.offset) == ((5, 2), 80, 1024)


@pytest.mark.parametrize(
    ("dims", "offset", "nbytes"),
    [
        ((3, 5, 2), 1024, 240),  # another number of rows
        ((2, 5, 2), 1024, 161),  # bytes that do not fit the dims
        ((2, 5, 2), 4000, 160),  # past the end
        ((2, -5, -2), 1024, 160),  # negative dims
        ((2, 1 << 62, 1 << 62), 0, 0),  # a product beyond 64 bits
        ((), 1024, 8),  # no batch
    ],
)
def test_a_worker_that_describes_nonsense_is_not_believed(dims, offset, nbytes):
    region = memoryview(bytearray(4096))
    geometry.write_descriptors(region, [(dims, offset, nbytes)])
    assert geometry.read_descriptors(region, DYNAMIC, rows=2) is None


@given(noise=st.binary(max_size=100), rows=st.integers(1, 64))
def test_noise_in_the_head_is_never_an_error(noise, rows):
    region = memoryview(noise.ljust(4096, b"\0"))
    placements = geometry.read_descriptors(region, DYNAMIC, rows)
    for placement in placements or []:
        assert placement.offset + placement.row_bytes * rows <= len(region)
    geometry.read_error(region)


def test_numpy_agrees_on_sizes():
    for datatype in DATATYPES.values():
        if datatype.numpy is not None:
            assert datatype.itemsize == np.dtype(datatype.numpy).itemsize
