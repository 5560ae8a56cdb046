"""Signatures, requests and answers that the tests of the protocols share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from gateway import bytestrings
from gateway.protocols.call import OutputTensor
from gateway.tensors import DATATYPES, Signature, TensorSpec

MAX_BYTES = 1 << 20

FIXED_SIZE = [t for t in DATATYPES.values() if t.numpy is not None]
IN_JSON = [t for t in FIXED_SIZE if t.in_json]
BINARY_ONLY = [t for t in FIXED_SIZE if not t.in_json]


def spec(name: str, datatype: str, *shape: int | str | None) -> TensorSpec:
    return TensorSpec(name, DATATYPES[datatype], shape)


def optional(name: str, datatype: str, *shape: int | str | None) -> TensorSpec:
    return TensorSpec(name, DATATYPES[datatype], shape, optional=True)


def unranked(name: str, datatype: str) -> TensorSpec:
    """A tensor of unknown rank."""
    return TensorSpec(name, DATATYPES[datatype], None)


def signature(
    inputs: list[TensorSpec], outputs: list[TensorSpec] | None = None, max_batch_size: int = 8
) -> Signature:
    outputs = outputs or [spec("y", "FP32", "N", 4)]
    return Signature(tuple(inputs), tuple(outputs), max_batch_size)


def whole(inputs: list[TensorSpec], outputs: list[TensorSpec] | None = None) -> Signature:
    """A model that is served one request at a time."""
    return signature(inputs, outputs, max_batch_size=0)


DIGITS = signature([spec("x", "FP32", "N", 4)])
"""One input, one output."""

PAIR = signature(
    [spec("ids", "INT64", "N", "T"), spec("mask", "BOOL", "N", "T")],
    [spec("label", "INT64", "N"), spec("score", "FP32", "N", 3)],
)
"""Two inputs that share a symbolic dim, two outputs."""


WORDS = signature([spec("s", "BYTES", "N", 2)], [spec("t", "BYTES", "N")])
"""Strings in and out."""

ANY_WORDS = whole([unranked("s", "BYTES")], [unranked("t", "BYTES")])
"""The same, of any shape."""


def request(**changes: Any) -> dict[str, Any]:
    """A good request for DIGITS; a change to None takes the field away."""
    tensor = {"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6, 7, 8]}
    document = {"inputs": [tensor], **changes}
    return {key: value for key, value in document.items() if value is not None}


def with_input(**changes: Any) -> dict[str, Any]:
    """A good request for DIGITS with its input changed; a change to None takes the field away."""
    document = request()
    entry = {**document["inputs"][0], **changes}
    document["inputs"] = [{key: value for key, value in entry.items() if value is not None}]
    return document


def framed(document: Any, *raw: bytes) -> tuple[bytes, str]:
    """A body of JSON and raw tensors, and the value of its header."""
    text = orjson.dumps(document)
    return b"".join([text, *raw]), str(len(text))


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def strings(name: str, shape: tuple[int, ...], *elements: bytes) -> OutputTensor:
    """An output of strings as a worker leaves it."""
    return OutputTensor(
        name, DATATYPES["BYTES"], shape, memoryview(bytestrings.serialise(elements))
    )


def output(name: str, datatype: str, array: npt.ArrayLike) -> OutputTensor:
    """An output as a worker leaves it: read-only bytes."""
    made = np.asarray(array, DATATYPES[datatype].dtype)
    return OutputTensor(name, DATATYPES[datatype], made.shape, memoryview(made.tobytes()))
