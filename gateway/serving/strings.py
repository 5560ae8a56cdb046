"""Strings on the worker's side: object arrays of bytes, from and to their serialised form.

ONNX Runtime holds strings as bytes, but its Python wrapper takes and gives only text. What is not UTF-8
therefore goes in as the constant of a small graph, whose file format has bytes (`constant_graph`), and
comes out by reading its array of C++ strings (`read_native`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from gateway import bytestrings
from gateway.serving.geometry import STRINGS, Placement
from gateway.tensors import element_count

Strings = npt.NDArray[np.object_]

_NATIVE_BYTES = 32
"""sizeof(std::string) in libstdc++: address, length, 16 bytes for short ones."""


def read_rows(inputs: memoryview, p: Placement, rows: int) -> Strings:
    """A batch's strings out of a slot's input region, as an array of bytes objects."""
    records = inputs[p.offset : p.offset + (rows if p.has_rows else 1) * STRINGS.size]
    found: list[bytes] = []
    for at, nbytes in STRINGS.iter_unpack(records):
        found += bytestrings.elements(inputs[at : at + nbytes])
    return as_array(found, p.dims(rows))


def as_array(elements: Iterable[bytes | str], dims: tuple[int, ...]) -> Strings:
    """An object array of these dims."""
    array = np.empty(element_count(dims), object)
    array[:] = list(elements)
    return array.reshape(dims)


def as_text(array: Strings) -> Strings:
    """Bytes to text. UnicodeDecodeError: not UTF-8."""
    flat = [element.decode() for element in array.reshape(-1)]
    return as_array(flat, array.shape)


def as_bytes(array: Strings) -> Strings:
    """Text to bytes."""
    return as_array((element.encode() for element in array.reshape(-1)), array.shape)


def read_native(address: int, dims: tuple[int, ...]) -> Strings:
    """The elements of ONNX Runtime's own string tensor: libstdc++'s ``std::string``, in a row."""
    found = []
    for i in range(element_count(dims)):
        words = (ctypes.c_uint64 * 2).from_address(address + i * _NATIVE_BYTES)
        found.append(ctypes.string_at(words[0], words[1]))
    return as_array(found, dims)


def constant_graph(array: Strings) -> bytes:
    """A model without inputs whose one output, ``s``, is this array.

    Written field by field (onnx.proto's numbers), because the base install has no protobuf.
    """
    tensor = b"".join(_number(1, dim) for dim in array.shape)
    tensor += _number(2, 8) + b"".join(_bytes(6, element) for element in array.reshape(-1))
    attribute = _bytes(1, b"value") + _number(20, 4) + _bytes(5, tensor)
    node = _bytes(2, b"s") + _bytes(4, b"Constant") + _bytes(5, attribute)
    output = _bytes(1, b"s") + _bytes(2, _bytes(1, _number(1, 8)))
    graph = _bytes(1, node) + _bytes(2, b"g") + _bytes(12, output)
    return _number(1, 8) + _bytes(8, _number(2, 17)) + _bytes(7, graph)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
