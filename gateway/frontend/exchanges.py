"""What each protocol makes of a body, and of outputs: the one place that both lanes go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from gateway.errors import UnsupportedMediaType
from gateway.protocols import messagepack, tfserving, v2_infer
from gateway.protocols.call import InferCall, OutputTensor
from gateway.serving.routes import Version
from gateway.tensors import Signature

HEADER_LENGTH = "Inference-Header-Content-Length"

JSON = "application/json"
OCTETS = "application/octet-stream"

MSGPACK_TYPES = frozenset(
    {"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"}
)

JSON_TYPES = frozenset(
    {
        JSON,
        OCTETS,  # aiohttp's name for no Content-Type, and Triton's for binary
        "application/x-www-form-urlencoded",  # curl's, when it is given a body and nothing else
        "text/plain",
    }
)


class Encoded(NamedTuple):
    """The body of an answer; ``json_bytes``: of its text before raw tensors, None where none follow."""

    body: bytes
    media_type: str
    json_bytes: int | None = None


Encode = Callable[[list[OutputTensor]], Encoded]
"""Outputs to answer. They are views of shared memory, valid only during the call."""

Understood = tuple[InferCall, Encode]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request's protocol, and how its body is to be read.

    Attributes:
        understand: body and signature to the call, which is yet to be checked, and how it is answered.
            Raises InvalidRequest and TooLarge.
    """

    understand: Callable[[bytes, Signature], Understood]


def v2_exchange(version: Version, media_type: str, header_length: str | None) -> Exchange:
    """The exchange of a ``POST …/infer``.

    Args:
        version: that answers.
        media_type: of the request, without parameters.
        header_length: its ``Inference-Header-Content-Length``.

    Raises:
        UnsupportedMediaType: neither JSON nor msgpack.
    """
    if media_type in MSGPACK_TYPES:
        return Exchange(partial(_understand_msgpack, version, media_type))
    if media_type not in JSON_TYPES:
        raise UnsupportedMediaType("Content-Type must be application/json or application/msgpack")
    return Exchange(partial(_understand_v2, version, header_length))


PREDICT: Exchange
"""The exchange of a TensorFlow Serving ``:predict``."""


def _understand_v2(
    version: Version, header_length: str | None, body: bytes, signature: Signature
) -> Understood:
    call = v2_infer.parse_infer(body, header_length, signature)

    def encode(outputs: list[OutputTensor]) -> Encoded:
        text, json_bytes = v2_infer.encode_infer(call, version.model, str(version.number), outputs)
        return Encoded(text, JSON if json_bytes is None else OCTETS, json_bytes)

    return call, encode


def _understand_msgpack(
    version: Version, media_type: str, body: bytes, signature: Signature
) -> Understood:
    call = messagepack.parse_infer(body, signature)

    def encode(outputs: list[OutputTensor]) -> Encoded:
        packed = messagepack.encode_infer(call, version.model, str(version.number), outputs)
        return Encoded(packed, media_type)

    return call, encode


def _understand_predict(body: bytes, signature: Signature) -> Understood:
    call, by_row = tfserving.parse_predict(body, signature)

    def encode(outputs: list[OutputTensor]) -> Encoded:
        return Encoded(tfserving.encode_predict(signature, by_row, outputs), JSON)

    return call, encode


PREDICT = Exchange(_understand_predict)
