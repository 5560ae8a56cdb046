"""A call's tensors as bytes, wherever they are to lie."""

from __future__ import annotations

import numpy as np
import pytest

from gateway import bytestrings
from gateway.errors import InvalidRequest
from gateway.protocols.call import InferCall, InputTensor
from gateway.serving import packing
from gateway.tensors import DATATYPES

FP32, INT8, BYTES = DATATYPES["FP32"], DATATYPES["INT8"], DATATYPES["BYTES"]


@pytest.mark.parametrize("strict", [False, True])
def test_lists_and_bytes_are_written_alike(strict):
    expected = np.arange(6, dtype=np.float32)
    nested = InputTensor("x", FP32, (2, 3), expected.reshape(2, 3).tolist(), strict)
    ready = InputTensor("x", FP32, (2, 3), memoryview(expected.tobytes()))
    for tensor in (nested, ready):
        buffer = bytearray(b"\xee" * 40)
        packing.write_tensor(buffer, 8, tensor)
        assert buffer == b"\xee" * 8 + expected.tobytes() + b"\xee" * 8


@pytest.mark.parametrize(
    "data",
    [[1, 2, 300], [1, 2], [1, 2, 3, 4], [1, 2, "3"], [1, None, 3], [1.5, 2, 3]],
    ids=["out of range", "too few", "too many", "text", "null", "a fraction"],
)
def test_a_list_that_does_not_decode_names_its_input_and_no_value(data):
    with pytest.raises(InvalidRequest, match=r"^input 'x': ") as caught:
        packing.write_tensor(bytearray(8), 0, InputTensor("x", INT8, (3,), data))
    assert "300" not in caught.value.message


def test_a_tensor_that_has_to_wait_becomes_bytes_once():
    tensor = InputTensor("x", INT8, (2, 2), [[1, 2], [3, -4]], True)
    with pytest.raises(TypeError):
        packing.raw(tensor)
    packing.materialise(tensor)
    first = packing.raw(tensor)
    assert bytes(first) == b"\1\2\3\xfc"
    packing.materialise(tensor)
    assert packing.raw(tensor) is first
    with pytest.raises(InvalidRequest, match="'x'"):
        packing.materialise(InputTensor("x", INT8, (2,), [1]))


def test_a_scalar_and_a_tensor_without_elements_become_bytes():
    scalar = InputTensor("x", INT8, (), [5])
    empty = InputTensor("x", INT8, (3, 0), [])
    for tensor, expected in ((scalar, b"\5"), (empty, b"")):
        packing.materialise(tensor)
        assert bytes(packing.raw(tensor)) == expected


def test_the_heap_of_a_call_is_its_strings():
    text = bytestrings.serialise([b"a", b"longer"])
    call = InferCall(
        [
            InputTensor("s", BYTES, (2,), memoryview(text)),
            InputTensor("x", FP32, (2,), [1, 2]),
            InputTensor("t", BYTES, (2,), memoryview(text)),
        ]
    )
    assert packing.string_bytes(call) == 2 * len(text)
