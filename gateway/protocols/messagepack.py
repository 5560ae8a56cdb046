"""Inference in msgpack: the v2 request and answer as a map.

The fields are those of v2. An input's ``data`` is a ``bin`` (raw, little-endian, row-major) or an
array of numbers, flat or nested; an answer's is always a ``bin``. BYTES are arrays of ``bin``, flat
in answers; a request may also hold them as text, or raw in one ``bin``.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgpack
from msgpack.exceptions import OutOfData, StackError, UnpackException

from gateway import bytestrings
from gateway.errors import InvalidRequest
from gateway.protocols.call import InferCall, OutputTensor
from gateway.protocols.v2_infer import answer_document, call_from_document, wanted_outputs
from gateway.tensors import Signature


def parse_infer(body: bytes | memoryview, signature: Signature) -> InferCall:
    """The call in a msgpack body.

    Unlike in JSON there is no binary part after the map; a tensor's bytes are copied out of the
    body once, by msgpack.

    Raises:
        InvalidRequest: truncated, with bytes left over, too deep, with extension types, with keys
            that are not strings or are given twice, or malformed as v2. The call is yet to be held
            against the signature (`check_call`).
        TooLarge: more than `MAX_STRINGS` strings.
    """
    call = call_from_document(_load(body), memoryview(b""), signature)
    call.binary_outputs = True
    for wanted in call.outputs or ():
        wanted.binary = True
    return call


def encode_infer(call: InferCall, model: str, version: str, outputs: list[OutputTensor]) -> bytes:
    """The answer as a map; the outputs that the call asks for, in its order, are copied into it."""
    entries = [
        {
            "name": output.name,
            "datatype": output.datatype.name,
            "shape": output.shape,
            "data": output.data
            if output.datatype.numpy is not None
            else bytestrings.elements(output.data),
        }
        for output, _ in wanted_outputs(call, outputs)
    ]
    packed: bytes = msgpack.packb(answer_document(call, model, version, entries))
    return packed


def _load(body: bytes | memoryview) -> Any:
    """The value of a body that is one complete msgpack value of plain types.

    An array's header names its length and msgpack allocates that much at once, so a small body of
    nested headers could ask for a thousand times its size. Skipping through the body first, which
    allocates nothing, proves that every element that a header promises is there.
    """
    try:
        skipper = msgpack.Unpacker(max_buffer_size=len(body))
        skipper.feed(body)
        skipper.skip()
        if skipper.tell() != len(body):
            problem = f"{len(body) - skipper.tell()} bytes are left over after the map"
        else:
            return msgpack.unpackb(body, object_pairs_hook=_map, ext_hook=_refuse_extension)
    except OutOfData:
        problem = f"the body ends after {len(body)} bytes, inside of a value"
    except (StackError, RecursionError):
        problem = "it nests too deep"
    except UnicodeDecodeError:
        problem = "a string is not UTF-8"
    except InvalidRequest as error:
        problem = error.message
    except (ValueError, UnpackException):
        problem = "a value is not allowed here"
    raise InvalidRequest(f"malformed msgpack: {problem}")


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise InvalidRequest("a map holds a key twice")
    for key in fields:
        if type(key) is not str:  # msgpack itself lets bin through
            raise InvalidRequest("the keys of a map must be strings")
    return fields


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise InvalidRequest("extension types are not supported")
