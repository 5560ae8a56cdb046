"""Protobuf's wire format, as far as it takes to walk through an ONNX file without copying it.

A field of an unexpected wire type has an unexpected key here, so that it passes for an unknown field, as
in protobuf itself. What no writer of ONNX writes and parsers may read in different ways is refused:
groups, numbers of more than 64 bits, a field given twice that may be there once (protobuf merges
messages, and takes the last value of an enum that it knows).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from gateway.errors import LoadError

INT64_MAX = (1 << 63) - 1
UINT32_MAX = (1 << 32) - 1


def fields(
    data: mmap.mmap, at: int, end: int, once: frozenset[int] = frozenset()
) -> Iterator[tuple[int, int, int]]:
    """The fields of the message in ``data[at:end]``.

    Gives:
        The key (8 * number + wire type) with, for wire type 2, the value's first and one-past-last
        byte; for wire type 0, the unsigned value and 0. Fields of fixed width are passed over.

    Raises:
        LoadError: the bytes are no message, or a key of `once` comes twice.
    """
    seen: set[int] = set()
    while at < end:
        key = data[at]
        at += 1
        if key >= 0x80:
            key, at = varint(data, at - 1, end)
        if not 8 <= key <= UINT32_MAX:
            raise _malformed()
        if key in once:
            if key in seen:
                raise LoadError("the model file gives a field twice that may be there once")
            seen.add(key)
        wire = key & 7
        if wire in (0, 2):
            value = data[at] if at < end else 0x80
            if value < 0x80:
                at += 1
            else:
                value, at = varint(data, at, end)
            if wire == 0:
                yield key, value, 0
                continue
            stop = at + value
            if stop > end:
                raise _truncated(data, stop)
            yield key, at, stop
            at = stop
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            if at > end:
                raise _truncated(data, at)
        else:
            raise _malformed()


def varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The unsigned number of up to 64 bits at a byte, and the byte after it; LoadError as `fields`."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _truncated(data, at + 1)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise _malformed()


def signed(value: int) -> int:
    """An int64 from its varint."""
    return value - (1 << 64) if value > INT64_MAX else value


def text_of(value: bytes) -> str:
    """A string field's text; bytes that are not UTF-8 are escaped, so that it never fails."""
    return value.decode("utf-8", "backslashreplace")


def _malformed() -> LoadError:
    return LoadError("the model file is not an ONNX model (no protobuf), or it is damaged")


def _truncated(data: mmap.mmap, stop: int) -> LoadError:
    """For a field that ends at `stop`, which is past the end of the message that holds it."""
    if stop <= len(data):
        return _malformed()
    return LoadError(
        f"the model file is truncated, or not an ONNX model: it has {len(data)} bytes and names "
        f"{stop} or more"
    )
