"""Strings in parsed bodies to raw BYTES tensors, and BYTES tensors to what an answer holds.

Requests have them as text, as ``bin`` in msgpack, or as ``{"b64": …}`` in TensorFlow Serving's API.
Text is UTF-8 on its way in and out; bytes that are not have no form in JSON but base64.

Messages name positions and types, never a value.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

from gateway import bytestrings
from gateway.errors import InvalidRequest, TooLarge
from gateway.protocols.call import OutputTensor, show_number, show_shape
from gateway.protocols.jsontext import MAX_DEPTH
from gateway.tensors import MAX_RANK

MAX_STRINGS = 1 << 18
"""Most strings that a request may hold; bounds the time in which they are packed and no one else is
served (some 0.2 s)."""

_KINDS = {
    list: "a list",
    dict: "an object",
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    type(None): "null",
    str: "a string",
    bytes: "binary data",
}
"""What a client would call the types of parsed values."""


def count_strings(shape: tuple[int, ...], before: int) -> int:
    """Hold a request to `MAX_STRINGS`, before the BYTES tensor of this shape is packed.

    A zero in a shape counts as a one: the lists around it take time, too.

    Args:
        shape: of the tensor.
        before: what this gave for the tensors of the request before it; 0 for the first.

    Raises:
        TooLarge: there are more with this tensor's.
        InvalidRequest: a dim is negative.
    """
    if any(dim < 0 for dim in shape):
        raise InvalidRequest("'shape' has a negative dim")
    total = before + _room(shape)
    if total > MAX_STRINGS:
        raise TooLarge(
            f"the request holds {show_number(total)} strings or more, the limit is {MAX_STRINGS}: "
            "send it in parts"
        )
    return total


def _room(shape: tuple[int, ...]) -> int:
    """Most items that one level of lists of a shape can have."""
    return math.prod(dim or 1 for dim in shape)


def pack_flat(data: list[Any], shape: tuple[int, ...]) -> memoryview:
    """The raw form of strings that are nested in any way, in row-major order.

    They are as many as the elements of ``shape``, which `count_strings` has seen.

    Raises:
        InvalidRequest: there are more or fewer; an element is neither text nor ``bin``; they nest
            deeper than `MAX_DEPTH`, or lie in more lists than any shape of as many elements needs.
    """
    wanted = f"expected {math.prod(shape)} strings for shape {show_shape(shape)}"
    room = _room(shape)
    given = seen = len(data)
    for _ in range(MAX_DEPTH):
        if given > room:  # found before they are looked at: they may be millions
            raise InvalidRequest(f"{wanted}, got {given}")
        if list not in set(map(type, data)):
            break
        if seen > room * MAX_RANK + MAX_DEPTH:  # the second matters to small ones, in odd forms
            raise InvalidRequest(f"{wanted}, got more lists than they need")
        lists = [item if type(item) is list else [item] for item in data]
        given = sum(map(len, lists))
        seen += given
        data = list(chain.from_iterable(lists)) if given <= room else []
    else:
        raise InvalidRequest(f"'data' nests deeper than {MAX_DEPTH} levels")
    if given != math.prod(shape):
        raise InvalidRequest(f"{wanted}, got {given}")
    return _pack(data, _text_or_bin, lambda position: f"element {position}")


def _pack(
    values: list[Any], convert: Callable[[Any], bytes], place: Callable[[int], str]
) -> memoryview:
    """The raw form of strings in a row. ``place``: what a message calls the one of an index."""
    found: list[bytes] = []
    try:
        for value in values:
            found.append(convert(value))
    except InvalidRequest as error:
        raise InvalidRequest(f"{place(len(found))}: {error.message}") from None
    return memoryview(bytestrings.serialise(found))


def _text_or_bin(value: Any) -> bytes:
    if type(value) is str:
        return _utf8(value)
    if type(value) is not bytes:
        raise InvalidRequest(f"expected a string, got {_kind(value)}")
    return value


def is_base64(value: Any) -> bool:
    """Whether a value is TensorFlow Serving's form of bytes."""
    return type(value) is dict and value.keys() == {"b64"}


def pack_nested(data: Any, shape: tuple[int, ...]) -> memoryview:
    """The raw form of strings, text or ``{"b64": …}``, that nest exactly as ``shape`` says.

    Raises:
        InvalidRequest: they do not; the message names the first that differs on the outermost level.
    """
    level = [data]
    for depth, dim in enumerate(shape):
        for position, item in enumerate(level):
            if type(item) is not list or len(item) != dim:
                given = f"{len(item)} elements" if type(item) is list else _kind(item)
                place = _place(position, shape[:depth])
                raise InvalidRequest(f"{place}: expected a list of {dim}, got {given}")
        level = list(chain.from_iterable(level))
    return _pack(level, _text_or_base64_object, lambda position: _place(position, shape))


def _text_or_base64_object(value: Any) -> bytes:
    if type(value) is str:
        return _utf8(value)
    if not is_base64(value):
        raise InvalidRequest(f"expected a string, got {_kind(value)}")
    text = value["b64"]
    if type(text) is not str:
        raise InvalidRequest(f"'b64' must be a string, got {_kind(text)}")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise InvalidRequest("'b64' is not base64 with padding") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        # The standard library's JSON parser lets lone surrogates through; UTF-8 has no form of them.
        raise InvalidRequest("a string must be Unicode text") from None


def _place(position: int, shape: tuple[int, ...]) -> str:
    """What a message calls the element at an index of a shape's row-major order."""
    path: list[int] = []
    for dim in reversed(shape):
        position, index = divmod(position, dim)
        path.insert(0, index)
    return f"element {show_shape(path)}" if path else "data"


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "an unsupported value")


def texts(output: OutputTensor) -> list[str]:
    """The elements of a BYTES output as text. InvalidRequest: one is not UTF-8."""
    found = []
    for position, element in enumerate(bytestrings.elements(output.data)):
        try:
            found.append(element.decode())
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output '{output.name}': element {position} is not UTF-8 and has no JSON form, "
                "use binary data (the v2 binary extension or msgpack)"
            ) from None
    return found


def tensorflow_strings(output: OutputTensor) -> Any:
    """A BYTES output as lists of its shape: text, or ``{"b64": …}`` where that is called for.

    That is every element of an output whose name ends in ``_bytes``, and elsewhere what is not UTF-8.
    """
    found = bytestrings.elements(output.data)
    all_base64 = output.name.endswith("_bytes")
    values: list[Any] = [_base64(e) if all_base64 else _text_or_base64(e) for e in found]
    if not output.shape:
        return values[0]
    for level in range(len(output.shape) - 1, 0, -1):
        dim, lists = output.shape[level], math.prod(output.shape[:level])
        values = [values[i * dim : (i + 1) * dim] for i in range(lists)]
    return values


def _text_or_base64(element: bytes) -> str | dict[str, str]:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return _base64(element)


def _base64(element: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(element).decode()}
