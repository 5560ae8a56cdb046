"""JSON text to Python values and tensors to JSON text, with the NaN and Infinity tokens.

orjson reads and writes nearly everything. It refuses the tokens NaN, Infinity and -Infinity, which
both APIs allow, and writes ``null`` for such values, so each direction has a second, slower way
that is taken only when the first one shows that it is needed.

Depth. orjson stops at 1,024 levels by itself and the standard library's parser at the recursion
limit, so no body can exhaust the stack. Our own limit of `MAX_DEPTH` is held where a value is read:
fields are checked for plain types, the decode kernel counts the levels of tensor data, and
`check_ignored` walks what nobody reads. Rejected: scanning every body for its depth, because bytes
inside strings have to be told from brackets and every good request would pay for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from gateway.errors import InvalidRequest
from gateway.protocols.call import no_json_form
from gateway.tensors import DATATYPES, DataType

MAX_DEPTH = 100
"""Most levels of arrays and objects in a value of a request."""

_DTYPES = {t.name: t.dtype for t in DATATYPES.values() if t.numpy is not None}

_LEAVES = frozenset({str, bytes, int, float, bool, type(None)})


def loads(body: bytes | memoryview) -> Any:
    """The value of a JSON text in UTF-8, the tokens NaN, Infinity and -Infinity included.

    Raises:
        InvalidRequest: malformed, with the offset of the first bad byte; or nested too deep.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        problem, text, position = error.msg, error.doc, error.pos
    if "depth limit" in problem or "Recursion limit" in problem:  # newer and older orjson
        raise _too_deep()
    if not text:  # orjson shows no text when it is not UTF-8
        raise _malformed(_utf8_length(body))
    if "NaN" in text or "Infinity" in text:
        return _loads_with_tokens(text)
    raise _malformed(len(text[:position].encode()))


def _loads_with_tokens(text: str) -> Any:
    """A second try by the standard library, whose parser knows the tokens."""
    try:
        return json.loads(text, parse_float=_finite)
    except json.JSONDecodeError as error:
        position = error.pos
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of thousands of digits, or a float that overflows
        raise InvalidRequest("malformed JSON: a number is too large") from None
    raise _malformed(len(text[:position].encode()))


def _finite(text: str) -> float:
    """A float that was written in digits. ValueError where it overflows, as orjson refuses it."""
    value = float(text)
    if math.isinf(value):
        raise ValueError
    return value


def _utf8_length(body: bytes | memoryview) -> int:
    """How many bytes of the body are UTF-8 before the first that is not."""
    try:
        str(body, "utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _malformed(offset: int) -> InvalidRequest:
    return InvalidRequest(f"malformed JSON at byte {offset}")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the request nests deeper than {MAX_DEPTH} levels")


def check_ignored(fields: dict[str, Any], known: Collection[str]) -> None:
    """Hold the values of the fields that nobody reads to `MAX_DEPTH` and to plain types.

    Levels are counted from each field.

    Raises:
        InvalidRequest: nested too deep, or of a type that JSON does not have (msgpack timestamps).
    """
    level = [value for key, value in fields.items() if key not in known]
    for _ in range(MAX_DEPTH + 1):
        level = [value for value in level if type(value) not in _LEAVES]
        if not level:
            return
        below: list[Any] = []
        for value in level:
            if type(value) not in (list, dict):
                raise InvalidRequest("the request holds a value of an unsupported type")
            items = value if type(value) is list else value.values()
            if not _LEAVES.issuperset(set(map(type, items))):  # fast: they may be millions
                below += items
        level = below
    raise _too_deep()


def dumps(document: Any) -> bytes:
    """The JSON text of plain values (dicts, lists, tuples, strings, numbers, booleans, None)."""
    return orjson.dumps(document)


def tensor_data(
    datatype: DataType, data: memoryview, shape: tuple[int, ...] | None = None
) -> npt.NDArray[Any] | np.generic:
    """What stands for a raw tensor of numbers in a document for `dumps_tensors`.

    An array over its bytes, which are little-endian and row-major and are not copied. Without ``shape``
    it is flat; for shape () it is the one number. Strings are for `gateway.protocols.strings`.

    Raises:
        InvalidRequest: the datatype has no JSON form (FP16, BF16).
    """
    if not datatype.in_json:
        raise no_json_form("the answer", datatype)
    array = np.frombuffer(data, _DTYPES[datatype.name])
    if shape is None:
        return array
    if not shape:  # orjson knows NumPy's scalars, but no array without dims
        one: np.generic = array[0]
        return one
    return array.reshape(shape)


def dumps_tensors(document: Any) -> bytes:
    """The JSON text of plain values with arrays among them, which become lists of their shape.

    FP32 is written with the shortest text that reads back as the same FP32; values that are not
    finite become the tokens NaN, Infinity and -Infinity.
    """
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson writes null for a value that is not finite. Looking for the word in the text costs less
    # than np.isfinite on every array, and finding it elsewhere costs only the second pass.
    if b"null" in text:
        return orjson.dumps(document, default=_array_text)
    return text


def _array_text(array: Any) -> orjson.Fragment:
    """The JSON text of an array or of a NumPy scalar, with tokens for what is not finite."""
    text = orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    pieces = text.split(b"null")
    if len(pieces) == 1:
        return orjson.Fragment(text)
    values = np.asarray(array)
    parts = [pieces[0]]
    for value, piece in zip(values[~np.isfinite(values)].tolist(), pieces[1:], strict=True):
        parts.append(b"NaN" if math.isnan(value) else b"Infinity" if value > 0 else b"-Infinity")
        parts.append(piece)
    return orjson.Fragment(b"".join(parts))
