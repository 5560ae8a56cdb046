"""Strings in parsed bodies to raw BYTES tensors, and BYTES tensors to what an answer holds.

Requests have them as text, as ``bin`` in msgpack, or as ``{"b64": …}`` in TensorFlow Serving's API.
Text is UTF-8 on its way in and out; bytes that are not have no form in JSON but base64.

Messages name positions and types, never a value.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from gateway import bytestrings
from gateway.errors import InvalidRequest
from gateway.protocols.call import OutputTensor
from gateway.protocols.jsontext import MAX_DEPTH

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


def pack_flat(data: list[Any]) -> memoryview:
    """The raw form of strings that are nested in any way, in row-major order.

    Raises:
        InvalidRequest: an element is neither text nor ``bin``, or nested deeper than `MAX_DEPTH`.
    """
    found: list[bytes] = []
    _flatten(data, 1, found)
    return memoryview(bytestrings.serialise(found))


def _flatten(data: list[Any], depth: int, found: list[bytes]) -> None:
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"'data' nests deeper than {MAX_DEPTH} levels")
    for item in data:
        if type(item) is str:
            found.append(_utf8(item, len(found)))
        elif type(item) is list:
            _flatten(item, depth + 1, found)
        elif type(item) is bytes:
            found.append(item)
        else:
            raise InvalidRequest(f"element {len(found)}: expected a string, got {_kind(item)}")


def is_base64(value: Any) -> bool:
    """Whether a value is TensorFlow Serving's form of bytes."""
    return type(value) is dict and value.keys() == {"b64"}


def pack_nested(data: Any, shape: tuple[int, ...]) -> memoryview:
    """The raw form of strings, text or ``{"b64": …}``, that nest exactly as ``shape`` says.

    Raises:
        InvalidRequest: they do not; the message names the first that differs.
    """
    found: list[bytes] = []
    _collect(data, shape, (), found)
    return memoryview(bytestrings.serialise(found))


def _collect(data: Any, shape: tuple[int, ...], path: tuple[int, ...], found: list[bytes]) -> None:
    """``shape`` is that of the data here, ``path`` the index taken in each dim above."""
    if not shape:
        found.append(_string(data, path))
        return
    if type(data) is not list or len(data) != shape[0]:
        given = f"{len(data)} elements" if type(data) is list else _kind(data)
        raise InvalidRequest(f"{_place(path)}: expected a list of {shape[0]}, got {given}")
    for position, item in enumerate(data):
        _collect(item, shape[1:], (*path, position), found)


def _string(value: Any, path: tuple[int, ...]) -> bytes:
    if type(value) is str:
        return _utf8(value, path)
    if not is_base64(value):
        raise InvalidRequest(f"{_place(path)}: expected a string, got {_kind(value)}")
    text = value["b64"]
    if type(text) is not str:
        raise InvalidRequest(f"{_place(path)}: 'b64' must be a string, got {_kind(text)}")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidRequest(f"{_place(path)}: 'b64' is not base64 with padding") from None


def _utf8(text: str, place: int | tuple[int, ...]) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        # The standard library's JSON parser lets lone surrogates through; UTF-8 has no form of them.
        at = f"element {place}" if isinstance(place, int) else _place(place)
        raise InvalidRequest(f"{at}: a string must be Unicode text") from None


def _place(path: tuple[int, ...]) -> str:
    return f"element [{','.join(map(str, path))}]" if path else "data"


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
