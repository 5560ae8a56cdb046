"""Arrays to the body of an inference and the body of its answer to arrays.

Protocol: KServe's `open-inference-protocol` in JSON, Triton's binary tensor data extension, and the same
fields as a msgpack map. Tensors are raw, little-endian and row-major, except in JSON. BYTES are bytes or
str (sent as UTF-8) in an array here, an array of ``bin`` in msgpack, and text in JSON.

Arrays of answers are copies: aligned (raw tensors follow a JSON text of any length), writable, and not
holding on to the whole body.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgpack
import numpy as np
import numpy.typing as npt
import orjson

from gateway import bytestrings
from gateway.client.errors import BadAnswer
from gateway.errors import InvalidRequest
from gateway.tensors import DATATYPES, DataType, element_count

Encoding = Literal["binary", "msgpack", "json"]
Array = npt.NDArray[Any]

ENCODINGS: tuple[str, ...] = get_args(Encoding)

HEADER_LENGTH = "Inference-Header-Content-Length"
MSGPACK = "application/msgpack"

_US_PER_S = 1_000_000

_BF16, _BYTES = DATATYPES["BF16"], DATATYPES["BYTES"]

_MAX_PRIORITY = (1 << 64) - 1
"""Largest value of the parameter, as in the protocol (uint64)."""

_BY_DTYPE_NAME = {t.dtype.name: t for t in DATATYPES.values() if t.numpy and t is not _BF16}
_BY_DTYPE_NAME["bfloat16"] = _BF16  # the name that ml_dtypes gives it


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    ``outputs`` holds the caller's own arrays by name, with the dtypes and shapes that the model gives
    (BF16 as ``ml_dtypes.bfloat16`` where ml_dtypes can be imported, else its bits as uint16; BYTES as
    object arrays of bytes).
    ``version`` is in digits, empty where the server names none. ``request_id`` is the caller's, or the
    one by which the server knows the request.
    """

    outputs: dict[str, Array]
    model: str
    version: str
    request_id: str | None


def encode_infer(
    encoding: Encoding,
    inputs: Mapping[str, Array],
    *,
    outputs: Sequence[str] | None = None,
    request_id: str | None = None,
    queue_timeout_s: float | None = None,
    priority: int | None = None,
) -> tuple[bytes, dict[str, str]]:
    """The body of an inference and the headers that say what it is.

    Args:
        encoding: how tensors travel, both ways.
        inputs: arrays of any shape, layout and byte order, of bool, intN, uintN, float16/32/64,
            ml_dtypes.bfloat16, or strings (dtype S or U, or objects that are bytes or str); they are
            copied into the body.
        outputs: names of those wanted, in this order; None or empty: all.
        request_id: repeated in the answer.
        queue_timeout_s: the longest that it may wait for a worker; None: the model's own.
        priority: 1 is the highest; None or 0: the model's default.

    Raises:
        InvalidRequest: an input is no array, has a dtype that cannot be sent (in this encoding), or an
            argument makes no sense.
    """
    tensors = [_Tensor(name, *_wire_form(name, array)) for name, array in inputs.items()]
    document = _request_fields(outputs, request_id, queue_timeout_s, priority)
    if encoding == "msgpack":
        document["inputs"] = [t.entry(data=_msgpack_form(t)) for t in tensors]
        return msgpack.packb(document), {"Content-Type": MSGPACK}
    if encoding == "json":
        document["inputs"] = [t.entry(data=_json_form(t)) for t in tensors]
        text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        return text, {"Content-Type": "application/json"}
    raw = [t.raw for t in tensors]
    sizes = [{"binary_data_size": data.nbytes} for data in raw]
    document["inputs"] = [t.entry(parameters=s) for t, s in zip(tensors, sizes, strict=True)]
    document.setdefault("parameters", {})["binary_data_output"] = True
    text = orjson.dumps(document)
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *raw]), headers


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An input: its shape and, in ``flat``, its elements.

    They are an array (1-d, contiguous, little-endian), for BYTES a list of bytes.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    flat: Array | list[bytes]

    @property
    def raw(self) -> memoryview:
        """The tensor in its binary form."""
        if isinstance(self.flat, list):
            return memoryview(bytestrings.serialise(self.flat))
        return self.flat.view(np.uint8).data

    def entry(self, **fields: Any) -> dict[str, Any]:
        """The input in a request."""
        return {
            "name": self.name,
            "datatype": self.datatype.name,
            "shape": list(self.shape),
            **fields,
        }


def _wire_form(name: str, array: Array) -> tuple[DataType, tuple[int, ...], Array | list[bytes]]:
    """Datatype, shape and elements of an input; numbers are copied only where layout or order need it."""
    if not isinstance(array, np.ndarray):
        raise InvalidRequest(f"input '{name}' must be a NumPy array, got {type(array).__name__}")
    if array.dtype.kind in "OSUT":
        return _BYTES, array.shape, [_string(name, item) for item in array.reshape(-1).tolist()]
    datatype = _BY_DTYPE_NAME.get(array.dtype.name)
    if datatype is None:
        raise InvalidRequest(
            f"input '{name}' has dtype {array.dtype.name}, expected one of "
            f"{', '.join(sorted(_BY_DTYPE_NAME))}, or strings"
        )
    flat = np.asarray(array, order="C").reshape(-1)
    if datatype is _BF16:
        flat = flat.view(np.uint16)
    return datatype, array.shape, np.asarray(flat, datatype.dtype.newbyteorder("<"))


def _string(name: str, item: object) -> bytes:
    """The bytes of an element of an array of strings or objects."""
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str):
        raise InvalidRequest(
            f"input '{name}' holds an object of type {type(item).__name__}: "
            "an array of objects may hold bytes and str only (BYTES)"
        )
    try:
        return item.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"input '{name}' holds a str that is not Unicode text") from None


def _msgpack_form(tensor: _Tensor) -> memoryview | list[bytes]:
    """The elements as ``bin``, for BYTES one for each."""
    return tensor.flat if isinstance(tensor.flat, list) else tensor.raw


def _json_form(tensor: _Tensor) -> Array | orjson.Fragment | list[str]:
    """The elements as orjson takes them; as text where they are not all finite, which orjson lacks."""
    if isinstance(tensor.flat, list):
        try:
            return [item.decode() for item in tensor.flat]
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"input '{tensor.name}': bytes that are not UTF-8 cannot be sent in JSON, "
                'use the encoding "binary" or "msgpack"'
            ) from None
    if not tensor.datatype.in_json:
        raise InvalidRequest(
            f"input '{tensor.name}': {tensor.datatype.name} cannot be sent in JSON, "
            'use the encoding "binary" or "msgpack"'
        )
    if tensor.flat.dtype.kind == "f" and not np.isfinite(tensor.flat).all():
        return orjson.Fragment(json.dumps(tensor.flat.tolist()))
    return tensor.flat


def _request_fields(
    outputs: Sequence[str] | None,
    request_id: str | None,
    queue_timeout_s: float | None,
    priority: int | None,
) -> dict[str, Any]:
    """The fields of a request besides its inputs."""
    if isinstance(outputs, str):
        raise InvalidRequest("'outputs' must be a sequence of names, got one string")
    document: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    if request_id is not None:
        document["id"] = request_id
    if queue_timeout_s is not None:
        if not 0 < queue_timeout_s < float("inf"):
            raise InvalidRequest("'queue_timeout_s' must be a positive number of seconds")
        parameters["timeout"] = max(1, round(queue_timeout_s * _US_PER_S))
    if priority is not None:
        if type(priority) is not int or not 0 <= priority <= _MAX_PRIORITY:
            raise InvalidRequest("'priority' must be a whole number, 1 being the highest")
        parameters["priority"] = priority
    if parameters:
        document["parameters"] = parameters
    if outputs:
        document["outputs"] = [{"name": name} for name in outputs]
    return document


def decode_infer(
    body: bytes, content_type: str, header_length: str | None, request_id: str | None = None
) -> Answer:
    """The answer in a body of status 200.

    Args:
        body: the whole of it.
        content_type: without parameters; says whether it is msgpack.
        header_length: its ``Inference-Header-Content-Length``: the bytes of JSON before raw tensors.
        request_id: stands in where the answer names none.

    Raises:
        BadAnswer: malformed in any way.
    """
    try:
        if content_type == MSGPACK:
            document, binary = msgpack.unpackb(body), memoryview(b"")
        else:
            size = len(body) if header_length is None else int(header_length)
            if not 0 <= size <= len(body):
                raise ValueError(f"{HEADER_LENGTH} is {size}, the body has {len(body)} bytes")
            document, binary = load_json(body[:size]), memoryview(body)[size:]
        return Answer(
            _outputs(document["outputs"], binary),
            str(document["model_name"]),
            str(document.get("model_version", "")),
            document.get("id", request_id),
        )
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise BadAnswer(f"the server's answer is malformed ({error})") from error


def load_json(text: bytes) -> Any:
    """The value of a JSON text, which may hold NaN and Infinity. ValueError: malformed."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _outputs(entries: list[dict[str, Any]], binary: memoryview) -> dict[str, Array]:
    arrays = {}
    for entry in entries:
        name, datatype = entry["name"], DATATYPES[entry["datatype"]]
        shape = tuple(entry["shape"])
        if any(dim < 0 for dim in shape):
            raise ValueError("a dim of a tensor is negative")
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is not None:
            if not 0 <= size <= len(binary):
                raise ValueError(f"expected {size} bytes for a tensor, {len(binary)} are left")
            arrays[name] = _from_raw(binary[:size], datatype, shape)
            binary = binary[size:]
        elif isinstance(entry["data"], bytes):
            arrays[name] = _from_raw(memoryview(entry["data"]), datatype, shape)
        elif datatype is _BYTES:
            arrays[name] = _from_strings(entry["data"]).reshape(shape)
        else:
            arrays[name] = np.array(entry["data"], datatype.dtype).reshape(shape)
    if binary:
        raise ValueError(f"{len(binary)} bytes are left over")
    return arrays


def _from_raw(raw: memoryview, datatype: DataType, shape: tuple[int, ...]) -> Array:
    """A copy of a raw tensor as an array. ValueError: it has another number of bytes or strings."""
    if datatype is _BYTES:
        return _from_strings(bytestrings.elements(raw)).reshape(shape)
    expected = element_count(shape) * datatype.itemsize
    if raw.nbytes != expected:
        raise ValueError(f"expected {expected} bytes for a tensor, got {raw.nbytes}")
    array: Array = np.ndarray(shape, datatype.dtype.newbyteorder("<"), raw).copy()
    return array.view(_bfloat16()) if datatype is _BF16 else array


def _from_strings(items: Any) -> Array:
    """Strings, text or bytes, as an array of bytes. ValueError: they are something else."""
    if not isinstance(items, list) or not all(isinstance(item, str | bytes) for item in items):
        raise ValueError("expected an array of strings for a tensor")
    array = np.empty(len(items), object)
    array[:] = [item.encode() if isinstance(item, str) else item for item in items]
    return array


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    """ml_dtypes' bfloat16 where it can be imported, else uint16."""
    try:
        scalar: type = importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        scalar = np.uint16
    return np.dtype(scalar)
