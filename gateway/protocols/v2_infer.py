"""Inference in the Open Inference Protocol v2: JSON, JSON with binary tensors, one raw tensor.

Protocol: KServe's `open-inference-protocol` and Triton's binary tensor data extension. The fields
of a request are read by `call_from_document`, which msgpack shares.
"""

from __future__ import annotations

from typing import Any

from gateway import bytestrings
from gateway.errors import InvalidRequest
from gateway.protocols.call import (
    InferCall,
    InputTensor,
    OutputTensor,
    WantedOutput,
    show_name,
)
from gateway.protocols.jsontext import check_ignored, dumps_tensors, loads, tensor_data
from gateway.protocols.strings import count_strings, pack_flat, texts
from gateway.tensors import DATATYPES, MAX_RANK, DataType, Signature, TensorSpec, element_count

MAX_TIMEOUT_US = (1 << 62) // 1000
"""Longest time-out that is kept (146 years), so that deadlines in ns fit in 64 bits."""

_MAX_HEADER_DIGITS = 19
"""Digits of the longest header length that is read; keeps a long number from being converted."""

_REQUEST_FIELDS = frozenset({"id", "parameters", "inputs", "outputs"})
_INPUT_FIELDS = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT_FIELDS = frozenset({"name", "parameters"})
_SEQUENCE = frozenset({"sequence_id", "sequence_start", "sequence_end"})
_SCALARS = frozenset({str, int, float, bool})


def parse_infer(
    body: bytes | memoryview, header_length: str | None, signature: Signature
) -> InferCall:
    """The call in the body of a ``POST …/infer``.

    Args:
        body: the whole body, decompressed. Raw tensors of the call are views of it.
        header_length: the header ``Inference-Header-Content-Length``: the bytes of the JSON text
            before the raw tensors; "0": the body is one raw tensor; None: it is all JSON.
        signature: of the model version; its names may be shown, and raw mode takes its one required
            input.

    Raises:
        InvalidRequest: malformed in any way. The call is yet to be held against the signature
            (`check_call`).
        TooLarge: more than `MAX_STRINGS` strings.
    """
    if header_length is None:
        return call_from_document(loads(body), memoryview(b""), signature)
    view = memoryview(body)
    size = _header_size(header_length, len(view))
    if size == 0:
        return _raw_call(view, signature)
    return call_from_document(loads(view[:size]), view[size:], signature)


def _header_size(text: str, body_bytes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_HEADER_DIGITS):
        raise InvalidRequest("Inference-Header-Content-Length must be a number of bytes")
    size = int(text)
    if size > body_bytes:
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {size}, the body has {body_bytes} bytes"
        )
    return size


def _raw_call(data: memoryview, signature: Signature) -> InferCall:
    """The tensor of a model's one required input, one row of it where the model is batched.

    Its one variable dim follows from the number of bytes. A string is the body itself.
    """
    required = [spec for spec in signature.inputs if not spec.optional]
    if len(required) != 1:
        raise InvalidRequest(
            f"a raw request needs a model with one required input, this one has {len(required)}"
        )
    spec = required[0]
    shape = [1, *spec.wire_shape[1:]] if signature.is_batched else spec.wire_shape
    variable = [position for position, dim in enumerate(shape) if dim < 0]
    if len(variable) > 1:
        raise InvalidRequest(
            f"a raw request needs an input with at most one variable dim, "
            f"'{spec.name}' has {len(variable)}"
        )
    if spec.datatype.numpy is None:
        if any(dim > 1 for dim in shape):
            raise InvalidRequest(
                f"a raw request holds one string, input '{spec.name}' takes several"
            )
        data = memoryview(bytestrings.serialise([bytes(data)]))
        return _raw_tensor(spec, [1] * len(shape), data)
    for position in variable:
        step = element_count([dim for dim in shape if dim >= 0]) * spec.datatype.itemsize
        if not step or data.nbytes % step:
            raise InvalidRequest(
                f"input '{spec.name}': expected a multiple of {step} bytes, got {data.nbytes}"
            )
        shape[position] = data.nbytes // step
    return _raw_tensor(spec, shape, data)


def _raw_tensor(spec: TensorSpec, shape: list[int], data: memoryview) -> InferCall:
    tensor = InputTensor(spec.name, spec.datatype, tuple(shape), data)
    return InferCall([tensor], binary_outputs=True)


def call_from_document(document: Any, binary: memoryview, signature: Signature) -> InferCall:
    """The call in a decoded request.

    Args:
        document: what the JSON or msgpack text held: a dict with ``inputs`` and, optionally,
            ``id``, ``parameters`` and ``outputs``; other fields are ignored.
        binary: the raw tensors that follow a JSON text, in the order of the inputs.
        signature: its tensor names may be shown in errors.

    Raises:
        InvalidRequest: a field is missing or is not what it must be.
        TooLarge: more than `MAX_STRINGS` strings.
    """
    if type(document) is not dict:
        raise InvalidRequest("the request must be an object with 'inputs'")
    if not _REQUEST_FIELDS.issuperset(document):
        check_ignored(document, _REQUEST_FIELDS)
    call = InferCall([])
    if "id" in document:
        call.id = _request_id(document["id"])
    if "parameters" in document:
        _read_request_parameters(document["parameters"], call)
    call.inputs = _read_inputs(document.get("inputs"), binary, signature.inputs)
    if "outputs" in document:
        call.outputs = _read_outputs(document["outputs"], call.binary_outputs, signature.outputs)
    return call


def _request_id(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest("'id' must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        # The standard library's JSON parser lets lone surrogates through; no answer can hold them.
        raise InvalidRequest("'id' must be Unicode text") from None
    return value


def _parameters(value: Any) -> dict[str, Any]:
    """A ``parameters`` object, of scalars only and with no reserved name."""
    if type(value) is not dict:
        raise InvalidRequest("'parameters' must be an object")
    for key, parameter in value.items():
        if type(parameter) not in _SCALARS:
            raise InvalidRequest(
                f"parameter {show_name(key)} must be a string, a number or a boolean"
            )
        if key.startswith("triton_"):
            raise InvalidRequest(f"parameter {show_name(key)}: names with 'triton_' are reserved")
    return value


def _read_request_parameters(value: Any, call: InferCall) -> None:
    """Set what the request's parameters say; those that no one has defined are ignored."""
    for key, parameter in _parameters(value).items():
        if key == "binary_data_output":
            call.binary_outputs = _boolean(key, parameter)
        elif key == "timeout":
            # 0 asks for the model's own time-out, as in the reference.
            call.timeout_us = min(_unsigned(key, parameter), MAX_TIMEOUT_US) or None
        elif key == "priority":
            call.priority = _unsigned(key, parameter)
        elif key in _SEQUENCE and parameter:
            raise InvalidRequest(f"parameter '{key}': sequences are not supported")


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter '{key}' must be a boolean")
    return value


def _unsigned(key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise InvalidRequest(f"parameter '{key}' must be an unsigned 64-bit integer")
    return value


def _refuse_shared_memory(parameters: dict[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise InvalidRequest("'shared_memory_region': client shared memory is not enabled")


def _read_inputs(
    entries: Any, binary: memoryview, known: tuple[TensorSpec, ...]
) -> list[InputTensor]:
    if type(entries) is not list:
        raise InvalidRequest("the request must have an array 'inputs'")
    tensors = []
    offset = strings = 0
    for entry in entries:
        if type(entry) is not dict:
            raise InvalidRequest("every element of 'inputs' must be an object")
        if not _INPUT_FIELDS.issuperset(entry):
            check_ignored(entry, _INPUT_FIELDS)
        name = entry.get("name")
        if type(name) is not str:
            raise InvalidRequest("every input must have a string 'name'")
        try:
            datatype, shape, size = _datatype(entry), _shape(entry), _binary_size(entry)
            if datatype.numpy is None:
                strings = count_strings(shape, strings)
            if size is None:
                data = _inline_data(entry, datatype, shape)
            else:
                data = binary[offset : offset + size]
                if len(data) != size:
                    raise InvalidRequest(
                        f"expected {size} bytes of binary data, {len(data)} are left"
                    )
                offset += size
            tensors.append(InputTensor(name, datatype, shape, data))
        except InvalidRequest as error:
            raise InvalidRequest(f"input {show_name(name, known)}: {error.message}") from None
    if offset != len(binary):
        raise InvalidRequest(f"{len(binary) - offset} bytes are left over after the last input")
    return tensors


def _binary_size(entry: dict[str, Any]) -> int | None:
    """Bytes of the input in the binary part of the request, None where it is not there."""
    if "parameters" not in entry:
        return None
    parameters = _parameters(entry["parameters"])
    _refuse_shared_memory(parameters)
    if "binary_data_size" not in parameters:
        return None
    if "data" in entry:
        raise InvalidRequest("'data' and 'binary_data_size' exclude each other")
    return _unsigned("binary_data_size", parameters["binary_data_size"])


def _inline_data(
    entry: dict[str, Any], datatype: DataType, shape: tuple[int, ...]
) -> list[Any] | memoryview:
    """The input's ``data``: an array, raw bytes (which only msgpack has), or for shape () a scalar."""
    data = entry.get("data")
    if type(data) is bytes:
        return memoryview(data)
    if type(data) is not list:
        if "data" not in entry:
            raise InvalidRequest("needs 'data' or 'binary_data_size'")
        if shape or type(data) not in _SCALARS:
            raise InvalidRequest("'data' must be an array")
        data = [data]
    return data if datatype.numpy is not None else pack_flat(data, shape)


def _datatype(entry: dict[str, Any]) -> DataType:
    name = entry.get("datatype")
    datatype = DATATYPES.get(name) if isinstance(name, str) else None
    if datatype is None:
        raise InvalidRequest(f"'datatype' must be one of {', '.join(DATATYPES)}")
    return datatype


def _shape(entry: dict[str, Any]) -> tuple[int, ...]:
    shape = entry.get("shape")
    if type(shape) is not list:
        raise InvalidRequest("'shape' must be an array of integers")
    if len(shape) > MAX_RANK:
        raise InvalidRequest(f"'shape' has {len(shape)} dims, at most {MAX_RANK} are supported")
    for dim in shape:
        if type(dim) is not int:
            raise InvalidRequest("'shape' must be an array of integers")
    return tuple(shape)


def _read_outputs(
    entries: Any, binary_default: bool, known: tuple[TensorSpec, ...]
) -> list[WantedOutput] | None:
    """The outputs that are asked for; None, which means all of them, for an empty array."""
    if type(entries) is not list:
        raise InvalidRequest("'outputs' must be an array")
    wanted = []
    for entry in entries:
        if type(entry) is not dict:
            raise InvalidRequest("every element of 'outputs' must be an object")
        if not _OUTPUT_FIELDS.issuperset(entry):
            check_ignored(entry, _OUTPUT_FIELDS)
        name = entry.get("name")
        if type(name) is not str:
            raise InvalidRequest("every output must have a string 'name'")
        binary = binary_default
        if "parameters" in entry:
            try:
                binary = _output_is_binary(entry["parameters"], binary_default)
            except InvalidRequest as error:
                raise InvalidRequest(f"output {show_name(name, known)}: {error.message}") from None
        wanted.append(WantedOutput(name, binary))
    return wanted or None


def _output_is_binary(value: Any, binary_default: bool) -> bool:
    parameters = _parameters(value)
    _refuse_shared_memory(parameters)
    if parameters.get("classification"):
        raise InvalidRequest("'classification' is not supported")
    if "binary_data" not in parameters:
        return binary_default
    return _boolean("binary_data", parameters["binary_data"])


def encode_infer(
    call: InferCall, model: str, version: str, outputs: list[OutputTensor]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the value of its ``Inference-Header-Content-Length`` if it has one.

    Args:
        call: the call that is answered; says which outputs, in which order and form.
        model: name of the model.
        version: its version, in digits.
        outputs: all outputs of the model, or at least the wanted ones; they are copied.

    Returns:
        The body, and the bytes of its JSON part where raw tensors follow it, None where it is all
        JSON. ``data`` in JSON is flat and row-major.

    Raises:
        InvalidRequest: an output is wanted as JSON that has no such form: by its datatype, which
            `check_call` refuses earlier, or because its strings are not UTF-8.
    """
    entries: list[dict[str, Any]] = []
    raw: list[memoryview] = []
    for output, binary in wanted_outputs(call, outputs):
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype.name,
            "shape": output.shape,
        }
        if binary:
            entry["parameters"] = {"binary_data_size": output.data.nbytes}
            raw.append(output.data)
        else:
            is_text = output.datatype.numpy is None
            entry["data"] = texts(output) if is_text else tensor_data(output.datatype, output.data)
        entries.append(entry)
    text = dumps_tensors(answer_document(call, model, version, entries))
    if not raw:
        return text, None
    return b"".join([text, *raw]), len(text)


def answer_document(
    call: InferCall, model: str, version: str, outputs: list[dict[str, Any]]
) -> dict[str, Any]:
    """The fields around the outputs of an answer; ``id`` is among them only when it was sent."""
    document: dict[str, Any] = {} if call.id is None else {"id": call.id}
    document["model_name"] = model
    document["model_version"] = version
    document["outputs"] = outputs
    return document


def wanted_outputs(call: InferCall, outputs: list[OutputTensor]) -> list[tuple[OutputTensor, bool]]:
    """The outputs that the call asks for, in its order, each with whether it is to be raw."""
    if call.outputs is None:
        return [(output, call.binary_outputs) for output in outputs]
    named = {output.name: output for output in outputs}
    return [(named[wanted.name], wanted.binary) for wanted in call.outputs]
