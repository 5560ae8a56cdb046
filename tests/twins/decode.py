"""Plain Python twin of kernels/decode.pyx: same signature, results, errors and messages.

A generator finds the elements and `convert` judges them one by one, in place of the kernel's runs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from gateway.tensors import DATATYPES, DataType
from tests.twins.pack import as_bytes, check_range, flat

MAX_RANK = 8
MAX_DEPTH = 100
BY_INDEX = {t.index: t for t in DATATYPES.values()}


def fill(
    dst: Any, dst_offset: int, datatype_index: int, shape: tuple[int, ...], data: Any, strict: bool
) -> int:
    datatype = find_datatype(datatype_index)
    total = count(shape, datatype.itemsize)
    nbytes = total * datatype.itemsize
    with flat(dst, "dst", "filled", writable=True) as view:
        check_range("dst", dst_offset, nbytes, view.nbytes)
        if not strict and shape and type(data) not in (list, tuple):
            raise ValueError(f"data: expected a list, got {kind_of(data)}")
        found = 0
        written = bytearray()
        for item in match(data, shape, ()) if strict else flatten(data, 0):
            if found < total:
                written += convert(datatype, found, item)
            found += 1
        if found != total:
            raise ValueError(f"expected {elements(total)} (shape {brief(shape)}), got {found}")
        as_bytes(view)[dst_offset : dst_offset + nbytes] = np.frombuffer(written, np.uint8)
    return nbytes


def find_datatype(index: int) -> DataType:
    if index not in BY_INDEX:
        raise ValueError(f"datatype_index: expected 0 to {max(BY_INDEX)}")
    if BY_INDEX[index].name in {"FP16", "BF16", "BYTES"}:
        raise ValueError(f"{BY_INDEX[index].name} is taken as binary data only")
    return BY_INDEX[index]


def count(shape: tuple[int, ...], itemsize: int) -> int:
    if len(shape) > MAX_RANK:
        raise ValueError(f"shape: rank {len(shape)} is over the limit of {MAX_RANK}")
    for dim in shape:
        if not isinstance(dim, int):
            raise TypeError("shape: dims must be ints")
        if dim < 0:
            raise ValueError("shape: dims must not be negative")
    if math.prod(shape) * itemsize >= 1 << 63:
        raise ValueError("shape: more elements than memory can hold")
    return math.prod(shape)


def match(data: Any, dims: tuple[int, ...], path: tuple[int, ...]) -> Iterator[Any]:
    """The elements of data that is nested exactly as `dims`; ValueError where it is not."""
    if not dims:
        yield data
        return
    where = f"element {brief(path)}" if path else "data"
    if type(data) not in (list, tuple):
        raise ValueError(f"{where}: expected a list of {dims[0]}, got {kind_of(data)}")
    if len(data) != dims[0]:
        raise ValueError(f"{where}: expected a list of {dims[0]}, got {elements(len(data))}")
    for i, part in enumerate(data):
        yield from match(part, dims[1:], (*path, i))


def flatten(data: Any, depth: int) -> Iterator[Any]:
    """The elements of data of any nesting; ValueError where it is too deep."""
    if type(data) not in (list, tuple):
        yield data
        return
    if depth == MAX_DEPTH:
        raise ValueError(f"data: nested over the limit of {MAX_DEPTH} levels")
    for part in data:
        yield from flatten(part, depth + 1)


def convert(datatype: DataType, position: int, item: Any) -> bytes:
    """The bytes of one element."""
    kind = datatype.dtype.kind
    wanted = {"f": "a number", "b": "a boolean"}.get(kind, "an integer")
    types = (int, float) if kind == "f" else int
    if not isinstance(item, types) or (isinstance(item, bool) and kind != "b"):
        raise ValueError(f"element {position}: expected {wanted}, got {kind_of(item)}")
    try:
        if kind == "f":
            return struct.pack(f"<{datatype.dtype.char}", item)
        if kind == "b" and item not in (0, 1):
            raise OverflowError
        return int(item).to_bytes(datatype.itemsize, "little", signed=kind == "i")
    except (OverflowError, struct.error):
        raise ValueError(f"element {position}: out of range for {datatype.name}") from None


def brief(numbers: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, numbers))}]"


def elements(number: int) -> str:
    return "1 element" if number == 1 else f"{number} elements"


def kind_of(item: Any) -> str:
    if type(item) in (list, tuple):
        return "a list"
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a float",
        str: "a string",
        type(None): "null",
        dict: "an object",
        bytes: "binary data",
        bytearray: "binary data",
        memoryview: "binary data",
    }
    return next((kinds[t] for t in type(item).__mro__ if t in kinds), "an unsupported value")
