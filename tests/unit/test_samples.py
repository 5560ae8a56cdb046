"""Made-up inputs: what is tried with a model of which only the signature is known."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gateway.serving.samples import (
    DIM_CHOICES,
    KINDS,
    MAX_SAMPLE_ELEMENTS,
    UNKNOWN_RANK_SHAPES,
    Sample,
    candidates,
)
from gateway.tensors import DATATYPES, Padding, Signature, TensorSpec

FP32 = DATATYPES["FP32"]


def signature(*inputs: TensorSpec, rows: int = 8, padding=()) -> Signature:
    return Signature(inputs, (), rows, (), padding)


def dims_of(signature: Signature) -> list:
    """The dims of a row that are tried, in order, each with every kind of values."""
    tried = list(candidates(signature))
    assert [sample.kind for sample in tried] == list(KINDS) * (len(tried) // len(KINDS))
    return [sample.dims for sample in tried[:: len(KINDS)]]


def test_dims_that_vary_are_tried_with_each_choice_and_fixed_ones_stay():
    found = dims_of(signature(TensorSpec("x", FP32, ("n", "k", 3, None))))
    assert found == [((size, 3, size),) for size in DIM_CHOICES]


def test_where_nothing_varies_there_is_one_to_try():
    assert dims_of(signature(TensorSpec("x", FP32, ("n", 3)))) == [((3,),)]
    assert dims_of(signature(TensorSpec("x", FP32, ()), rows=0)) == [((),)]
    assert dims_of(signature(rows=0)) == [()]


def test_every_input_gets_the_same_size_for_one_symbol():
    both = signature(TensorSpec("a", FP32, ("n", "k")), TensorSpec("b", FP32, ("n", 2, "k")))
    assert dims_of(both)[0] == ((4,), (2, 4))


def test_an_unknown_rank_is_tried_with_several():
    found = {dims for (dims,) in dims_of(signature(TensorSpec("x", FP32, None), rows=0))}
    assert found == set(UNKNOWN_RANK_SHAPES)


def test_optional_inputs_are_left_out():
    (first, *_) = candidates(
        signature(TensorSpec("x", FP32, ("n",)), TensorSpec("o", FP32, (), optional=True))
    )
    assert first.arrays(2).keys() == {"x"}


def test_a_padded_dim_has_the_smallest_length_that_it_will_have():
    padded = signature(
        TensorSpec("x", FP32, ("n", "length")), padding=(Padding("length", (48, 99), True, ()),)
    )
    assert dims_of(padded) == [((48,),)]


def test_what_would_take_too_much_memory_is_not_tried():
    found = dims_of(signature(TensorSpec("x", FP32, ("n", "a", "b", "c", "d"))))
    assert ((4, 4, 4, 4),) in found
    assert all(np.prod(dims) <= MAX_SAMPLE_ELEMENTS for (dims,) in found)
    assert dims_of(signature(TensorSpec("x", FP32, ("n", MAX_SAMPLE_ELEMENTS + 1)))) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(), (2, 3), (0,)])
@pytest.mark.parametrize("name", DATATYPES)
def test_every_datatype_has_values_of_every_kind(name, dims, kind):
    spec = TensorSpec("x", DATATYPES[name], dims)
    array = Sample((spec,), (dims,), kind, has_rows=False).arrays(1)["x"]
    assert isinstance(array, np.ndarray)
    assert array.shape == dims
    if name == "BYTES":
        assert {type(element) for element in array.reshape(-1)} <= {bytes}
        return
    assert array.dtype == DATATYPES[name].dtype
    values = array.view(ml_dtypes.bfloat16).astype(np.float32) if name == "BF16" else array
    if kind != "random":
        assert (values == (kind == "ones")).all()
    elif array.dtype.kind in "iub" and name != "BF16":
        assert set(values.reshape(-1).tolist()) <= {0, 1}
    else:
        assert np.isfinite(values).all()


def test_rows_differ_from_each_other_and_do_not_depend_on_their_number():
    spec = TensorSpec("x", FP32, ("n", 4))
    sample = Sample((spec,), ((4,),), "random", has_rows=True)
    x = sample.arrays(5)["x"]
    assert len(np.unique(x)) == x.size
    np.testing.assert_array_equal(sample.arrays(2)["x"], x[:2])
