"""Arrays to the body of an inference and the body of its answer to arrays.

Protocol: KServe's `open-inference-protocol` in JSON, Triton's binary tensor data extension, and the same
fields as a msgpack map. Tensors are raw, little-endian and row-major, except in JSON.

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

from gateway.client.errors import BadAnswer
from gateway.errors import InvalidRequest, NotSupported
from gateway.tensors import DATATYPES, DataType, element_count

Encoding = Literal["binary", "msgpack", "json"]
Array = npt.NDArray[Any]

ENCODINGS: tuple[str, ...] = get_args(Encoding)

HEADER_LENGTH = "Inference-Header-Content-Length"
MSGPACK = "application/msgpack"

_US_PER_S = 1_000_000

_BF16 = DATATYPES["BF16"]

_BY_DTYPE_NAME = {t.dtype.name: t for t in DATATYPES.values() if t.numpy and t is not _BF16}
_BY_DTYPE_NAME["bfloat16"] = _BF16  # the name that ml_dtypes gives it


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    ``outputs`` holds the caller's own arrays by name, with the dtypes and shapes that the model gives
    (BF16 as ``ml_dtypes.bfloat16`` where ml_dtypes can be imported, else its bits as uint16).
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
) -> tuple[bytes, dict[str, str]]:
    """The body of an inference and the headers that say what it is.

    Args:
        encoding: how tensors travel, both ways.
        inputs: arrays of any shape, layout and byte order, of bool, intN, uintN, float16/32/64 or
            ml_dtypes.bfloat16; they are copied into the body.
        outputs: names of those wanted, in this order; None or empty: all.
        request_id: repeated in the answer.
        queue_timeout_s: the longest that it may wait for a worker; None: the model's own.

    Raises:
        InvalidRequest: an input is no array, has a dtype that cannot be sent (in this encoding), or an
            argument makes no sense.
    """
    tensors = [_Tensor(name, *_wire_form(name, array)) for name, array in inputs.items()]
    document = _request_fields(outputs, request_id, queue_timeout_s)
    if encoding == "msgpack":
        document["inputs"] = [t.entry(data=t.raw) for t in tensors]
        return msgpack.packb(document), {"Content-Type": MSGPACK}
    if encoding == "json":
        document["inputs"] = [t.entry(data=_json_form(t)) for t in tensors]
        text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        return text, {"Content-Type": "application/json"}
    document["inputs"] = [t.entry(parameters={"binary_data_size": t.raw.nbytes}) for t in tensors]
    document.setdefault("parameters", {})["binary_data_output"] = True
    text = orjson.dumps(document)
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *(t.raw for t in tensors)]), headers


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An input: its shape and, in ``flat``, its elements (1-d, contiguous, little-endian)."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    flat: Array

    @property
    def raw(self) -> memoryview:
        """The bytes of the elements."""
        return self.flat.view(np.uint8).data

    def entry(self, **fields: Any) -> dict[str, Any]:
        """The input in a request."""
        return {
            "name": self.name,
            "datatype": self.datatype.name,
            "shape": list(self.shape),
            **fields,
        }


def _wire_form(name: str, array: Array) -> tuple[DataType, tuple[int, ...], Array]:
    """Datatype, shape and elements of an input; copied only where layout or byte order need it."""
    if not isinstance(array, np.ndarray):
        raise InvalidRequest(f"input '{name}' must be a NumPy array, got {type(array).__name__}")
    if array.dtype.kind in "OSUT":
        raise InvalidRequest(
            f"input '{name}' holds strings or objects (BYTES), which are not supported yet: "
            "give an array of numbers or booleans"
        )
    datatype = _BY_DTYPE_NAME.get(array.dtype.name)
    if datatype is None:
        raise InvalidRequest(
            f"input '{name}' has dtype {array.dtype.name}, expected one of "
            f"{', '.join(sorted(_BY_DTYPE_NAME))}"
        )
    flat = np.asarray(array, order="C").reshape(-1)
    if datatype is _BF16:
        flat = flat.view(np.uint16)
    return datatype, array.shape, np.asarray(flat, datatype.dtype.newbyteorder("<"))


def _json_form(tensor: _Tensor) -> Array | orjson.Fragment:
    """The elements as orjson takes them; as text where they are not all finite, which orjson lacks."""
    if not tensor.datatype.in_json:
        raise InvalidRequest(
            f"input '{tensor.name}': {tensor.datatype.name} cannot be sent in JSON, "
            'use the encoding "binary" or "msgpack"'
        )
    if tensor.flat.dtype.kind == "f" and not np.isfinite(tensor.flat).all():
        return orjson.Fragment(json.dumps(tensor.flat.tolist()))
    return tensor.flat


def _request_fields(
    outputs: Sequence[str] | None, request_id: str | None, queue_timeout_s: float | None
) -> dict[str, Any]:
    """The fields of a request besides its inputs."""
    if isinstance(outputs, str):
        raise InvalidRequest("'outputs' must be a sequence of names, got one string")
    document: dict[str, Any] = {}
    if request_id is not None:
        document["id"] = request_id
    if queue_timeout_s is not None:
        if not 0 < queue_timeout_s < float("inf"):
            raise InvalidRequest("'queue_timeout_s' must be a positive number of seconds")
        document["parameters"] = {"timeout": max(1, round(queue_timeout_s * _US_PER_S))}
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
        NotSupported: an output is of strings (BYTES).
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
        if datatype.numpy is None:
            raise NotSupported(
                f"output '{name}' holds strings (BYTES), which are not supported yet"
            )
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is not None:
            arrays[name] = _from_raw(binary[:size], datatype, shape)
            binary = binary[size:]
        elif isinstance(entry["data"], bytes):
            arrays[name] = _from_raw(memoryview(entry["data"]), datatype, shape)
        else:
            arrays[name] = np.array(entry["data"], datatype.dtype).reshape(shape)
    if binary:
        raise ValueError(f"{len(binary)} bytes are left over")
    return arrays


def _from_raw(raw: memoryview, datatype: DataType, shape: tuple[int, ...]) -> Array:
    """A copy of a raw tensor as an array. ValueError: it has another number of bytes."""
    expected = element_count(shape) * datatype.itemsize
    if raw.nbytes != expected or any(dim < 0 for dim in shape):
        raise ValueError(f"expected {expected} bytes for a tensor, got {raw.nbytes}")
    array: Array = np.ndarray(shape, datatype.dtype.newbyteorder("<"), raw).copy()
    return array.view(_bfloat16()) if datatype is _BF16 else array


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    """ml_dtypes' bfloat16 where it can be imported, else uint16."""
    try:
        scalar: type = importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        scalar = np.uint16
    return np.dtype(scalar)
