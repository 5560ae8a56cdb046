"""A call's tensors as bytes: decoded where they are to lie, or before, where they have to wait."""

from __future__ import annotations

from mmap import mmap

from gateway._kernels import decode, pack
from gateway.errors import InvalidRequest
from gateway.protocols.call import InferCall, InputTensor
from gateway.tensors import element_count


def write_tensor(buffer: mmap | bytearray, at: int, tensor: InputTensor) -> None:
    """Write a tensor's elements row-major at a byte offset.

    Raises:
        InvalidRequest: a list that does not decode; names the input, quotes no value.
    """
    if isinstance(tensor.data, memoryview):
        pack.copy_in(buffer, at, tensor.data)
        return
    try:
        decode.fill(buffer, at, tensor.datatype.index, tensor.shape, tensor.data, tensor.strict)
    except ValueError as error:
        raise InvalidRequest(f"input '{tensor.name}': {error}") from None


def raw(tensor: InputTensor) -> memoryview:
    """A tensor's bytes, which it has: strings always do."""
    if not isinstance(tensor.data, memoryview):
        raise TypeError(f"'{tensor.name}' has not been decoded")
    return tensor.data


def string_bytes(call: InferCall) -> int:
    """Bytes of heap that a call's strings take."""
    return sum(len(raw(t)) for t in call.inputs if t.datatype.numpy is None)


def materialise(tensor: InputTensor) -> None:
    """Decode a tensor's list into private bytes: a request that has to queue is validated first."""
    if not isinstance(tensor.data, memoryview):
        private = bytearray(tensor.datatype.itemsize * element_count(tensor.shape))
        write_tensor(private, 0, tensor)
        tensor.data = memoryview(private)
