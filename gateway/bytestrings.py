"""Strings as bytes in a row: the form that BYTES tensors have wherever they are raw.

Each element is its length, 4 bytes little-endian, and its bytes, which may be anything; elements follow
each other in row-major order. It is the binary tensor data extension's form, and the one in which they
lie in shared memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

_LENGTH = struct.Struct("<I")

PREFIX_BYTES = _LENGTH.size
"""Bytes that an element takes besides its own."""


def serialise(elements: Iterable[bytes]) -> bytes:
    """The elements in a row. ValueError: one is over 2^32-1 bytes."""
    pieces: list[bytes] = []
    for element in elements:
        if len(element) >> 32:
            raise ValueError("a string is over 4 GiB")
        pieces += (_LENGTH.pack(len(element)), element)
    return b"".join(pieces)


def skip(data: memoryview, count: int, start: int = 0) -> int:
    """Where the next ``count`` elements from ``start`` on end. ValueError: the data end before."""
    at, end, unpack = start, len(data), _LENGTH.unpack_from
    for found in range(count):
        if at + PREFIX_BYTES > end:
            if at == end:
                raise ValueError(f"the data end after {found}")
            raise ValueError(f"the data end within a {'string' if at > end else 'length'}")
        at += PREFIX_BYTES + unpack(data, at)[0]
    if at > end:
        raise ValueError("the data end within a string")
    return at


def elements(data: memoryview) -> list[bytes]:
    """Every element. ValueError: the data end within one."""
    found = []
    at, end, unpack = 0, len(data), _LENGTH.unpack_from
    while at < end:
        if at + PREFIX_BYTES > end:
            raise ValueError("the data end within a length")
        begin = at + PREFIX_BYTES
        at = begin + unpack(data, at)[0]
        if at > end:
            raise ValueError("the data end within a string")
        found.append(bytes(data[begin:at]))
    return found
