"""What every server is asked: models, forms of a request, and numbers of connections."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass

import msgpack
import numpy as np
import orjson
from models import ENCODER_LENGTH, ENCODER_WIDTH, IMAGE_SHAPE

DIGITS = 7
"""Decimals of the numbers that are sent: JSON of 784 of them is 8 kB."""


@dataclass(frozen=True)
class Tensors:
    """A model of `models.py`: the names of its one input and one output, and the shape of a row."""

    model: str
    input: str
    output: str
    row_shape: tuple[int, ...]

    def rows(self, count: int) -> np.ndarray:
        """Rows [count, ...] FP32 which no two answers are the same of; the same in every run."""
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((count, *self.row_shape), np.float32)
        # An offset of each row's own: a mean over many pixels would else be the same for all.
        offset = rng.standard_normal((count, *(1 for _ in self.row_shape)), np.float32)
        return np.round(noise + offset, DIGITS)


MLP16 = Tensors("mlp16", "x", "y", (16,))
MLP784 = Tensors("mlp784", "x", "y", (784,))
ENCODER = Tensors("encoder", "tokens_embedding", "hidden", (ENCODER_LENGTH, ENCODER_WIDTH))
IMAGE = Tensors("image", "x", "y", IMAGE_SHAPE)


@dataclass(frozen=True)
class Workload:
    """A model and a form of request, under one or more numbers of connections.

    Attributes:
        bare_rows: batch sizes of a bare ONNX Runtime loop, of which the best, found beforehand, takes
            turns with the servers; none: there is no such loop.
        in_bursts: few large batches are answered, so that a rate is counted from the end of one to the
            end of another: a window cut across a batch would be off by several percent.
    """

    tensors: Tensors
    form: str
    connections: tuple[int, ...]
    bare_rows: tuple[int, ...] = ()
    in_bursts: bool = False

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.tensors.model}-{self.form}"

    def title(self, connections: int) -> str:
        """One of its cases, for people; 0: the model without a server."""
        where = f"{connections} conn." if connections else "no server"
        return f"{self.tensors.model} {self.form}, {where}"


WORKLOADS = (
    Workload(MLP16, "binary", (1, 32, 128), (1,)),
    Workload(MLP784, "binary", (32,)),
    Workload(MLP784, "json", (32,)),
    Workload(MLP784, "msgpack", (32,)),
    Workload(ENCODER, "binary", (64,), (4, 8, 16, 32), in_bursts=True),
    Workload(IMAGE, "binary", (32,), (1, 4, 8, 32)),
)


@dataclass(frozen=True)
class Request:
    """One HTTP request: the same bytes each time."""

    path: str
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def encoded(self, host: str) -> bytes:
        """All of it, as it goes over the wire."""
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True)
class Wire:
    """How a tensor is written in a request and read from an answer.

    Attributes:
        form: what the servers of `servers/` call it.
        request: of a path, tensors and a row.
        answer: the flat FP32 row of an answer's body and its header ``Inference-Header-Content-Length``.
    """

    form: str
    request: Callable[[str, Tensors, np.ndarray], Request]
    answer: Callable[[bytes, int], np.ndarray]


def _post(path: str, kind: str, body: bytes, *more: tuple[str, str]) -> Request:
    return Request(path, "POST", (("Content-Type", kind), *more), body)


def _numbers(row: np.ndarray) -> bytes:
    """A flat JSON array, in which FP32 numbers are as short as they can be."""
    return orjson.dumps(np.ascontiguousarray(row.ravel()), option=orjson.OPT_SERIALIZE_NUMPY)


def _raw_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    return _post(path, "application/octet-stream", row.tobytes())


def _raw_answer(body: bytes, _: int) -> np.ndarray:
    return np.frombuffer(body, np.float32)


def _json_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    return _post(path, "application/json", b'{"x":' + _numbers(row) + b"}")


def _json_answer(body: bytes, _: int) -> np.ndarray:
    return np.asarray(json.loads(body)["y"], np.float32).ravel()


def _msgpack_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    return _post(path, "application/msgpack", msgpack.packb({"x": row.tobytes()}))


def _msgpack_answer(body: bytes, _: int) -> np.ndarray:
    return np.frombuffer(msgpack.unpackb(body)["y"], np.float32)


def _v2_tensor(tensors: Tensors) -> dict[str, object]:
    return {"name": tensors.input, "datatype": "FP32", "shape": [1, *tensors.row_shape]}


def _v2_binary_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    tensor = _v2_tensor(tensors) | {"parameters": {"binary_data_size": row.nbytes}}
    head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    length = ("Inference-Header-Content-Length", str(len(head)))
    return _post(path, "application/octet-stream", head + row.tobytes(), length)


def _v2_binary_answer(body: bytes, head_bytes: int) -> np.ndarray:
    return np.frombuffer(body[head_bytes:], np.float32)


def _v2_json_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    head = orjson.dumps(_v2_tensor(tensors))[:-1]
    body = b'{"inputs":[' + head + b',"data":' + _numbers(row) + b"}]}"
    return _post(path, "application/json", body)


def _v2_json_answer(body: bytes, _: int) -> np.ndarray:
    return np.asarray(json.loads(body)["outputs"][0]["data"], np.float32).ravel()


def _v2_msgpack_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    tensor = _v2_tensor(tensors) | {"data": row.tobytes()}
    return _post(path, "application/msgpack", msgpack.packb({"inputs": [tensor]}))


def _v2_msgpack_answer(body: bytes, _: int) -> np.ndarray:
    return np.frombuffer(msgpack.unpackb(body)["outputs"][0]["data"], np.float32)


def _v2_base64_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    text = base64.b64encode(row.tobytes()).decode()
    tensor = {"name": tensors.input, "datatype": "BYTES", "shape": [1], "data": [text]}
    return _post(path, "application/json", orjson.dumps({"inputs": [tensor]}))


def _v2_base64_answer(body: bytes, _: int) -> np.ndarray:
    text = json.loads(body)["outputs"][0]["data"][0]
    return np.frombuffer(base64.b64decode(text), np.float32)


def _rows_request(path: str, tensors: Tensors, row: np.ndarray) -> Request:
    return _post(path, "application/json", b'{"x":[' + _numbers(row) + b"]}")


def _rows_answer(body: bytes, _: int) -> np.ndarray:
    return np.asarray(json.loads(body), np.float32).ravel()


def _nothing(body: bytes, _: int) -> np.ndarray:
    """Of a server without a model, whose 200 is the answer."""
    return np.empty(0, np.float32)


NO_MODEL = Wire("raw", _raw_request, _nothing)
RAW = Wire("raw", _raw_request, _raw_answer)
JSON = Wire("json", _json_request, _json_answer)
MSGPACK = Wire("msgpack", _msgpack_request, _msgpack_answer)
JSON_ROWS = Wire("json", _rows_request, _rows_answer)
V2_BINARY = Wire("v2", _v2_binary_request, _v2_binary_answer)
V2_JSON = Wire("v2", _v2_json_request, _v2_json_answer)
V2_MSGPACK = Wire("v2", _v2_msgpack_request, _v2_msgpack_answer)
V2_BASE64 = Wire("base64", _v2_base64_request, _v2_base64_answer)
