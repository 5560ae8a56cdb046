"""TensorFlow Serving's REST API: predict in rows and in columns, status and metadata.

Protocol: tensorflow.org/tfx/serving/api_rest. A single tensor drops its name, both ways. Shapes are
not sent: they follow from how the lists nest, down the first element of each level, and the decode
kernel (`InputTensor.strict`) or `strings.pack_nested` holds every other element to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gateway.errors import InvalidRequest
from gateway.protocols.call import (
    InferCall,
    InputTensor,
    OutputTensor,
    unexpected_input,
)
from gateway.protocols.jsontext import check_ignored, dumps_tensors, loads, tensor_data
from gateway.protocols.strings import count_strings, is_base64, pack_nested, tensorflow_strings
from gateway.tensors import MAX_RANK, Signature, TensorSpec

SIGNATURE_NAME = "serving_default"
"""The only signature that a model has here."""

_FIELDS = frozenset({"signature_name", "instances", "inputs"})


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """One version in a status answer: START, LOADING, AVAILABLE, UNLOADING or END."""

    version: str
    state: str
    error_code: str = "OK"
    error_message: str = ""


def parse_predict(body: bytes | memoryview, signature: Signature) -> tuple[InferCall, bool]:
    """The call in the body of a ``:predict``, and whether it came in rows (``instances``).

    An instance whose only key is ``inputs``, holding an object, is read as that object when the
    model has no input of that name: documentation in the wild sends it. ``{"b64": …}`` is a string
    where the one input may go without its name, takes strings and is not itself called so.

    Raises:
        InvalidRequest: malformed in any way. The call is yet to be held against the signature
            (`check_call`).
        TooLarge: more than `MAX_STRINGS` strings.
    """
    document = loads(body)
    if type(document) is not dict:
        raise InvalidRequest("the request must be a JSON object")
    if not _FIELDS.issuperset(document):
        check_ignored(document, _FIELDS)
    if document.get("signature_name") not in (None, "", SIGNATURE_NAME):
        raise InvalidRequest(f"'signature_name' must be '{SIGNATURE_NAME}' or absent")
    row = "instances" in document
    if row is ("inputs" in document):
        raise InvalidRequest("Missing 'inputs' or 'instances' key")
    specs = {spec.name: spec for spec in signature.inputs}
    if row:
        columns = _columns_of_instances(document["instances"], specs)
        if signature.is_batched:
            _refuse_optional(columns, specs)
    else:
        columns = _columns_of_inputs(document["inputs"], specs)
    return InferCall(_tensors(columns, specs)), row


def _columns_of_instances(instances: Any, specs: dict[str, TensorSpec]) -> dict[str, Any]:
    """The data of each input. One without a name is the list of instances itself, not a copy."""
    if type(instances) is not list or not instances:
        raise InvalidRequest("'instances' must be an array of at least one element")
    first = instances[0]
    if type(first) is not dict:
        return {_only_input(specs, "'instances'"): instances}
    wrapped = first.keys() == {"inputs"} and type(first["inputs"]) is dict and "inputs" not in specs
    if wrapped:
        first = first["inputs"]
    if any(specs[name].datatype.numpy is None for name in first.keys() & specs.keys()):
        count_strings((len(instances),), 0)  # before each is looked at: they may be millions
    if wrapped:
        instances = [
            instance.get("inputs") if type(instance) is dict and len(instance) == 1 else None
            for instance in instances
        ]
    if _is_value(first, specs):
        return {_only_input(specs, "'instances'"): instances}
    names = first.keys()
    for position, instance in enumerate(instances):
        if type(instance) is not dict or instance.keys() != names:
            raise InvalidRequest(f"instance {position} does not name the same inputs as instance 0")
    return {name: [instance[name] for instance in instances] for name in names}


def _columns_of_inputs(inputs: Any, specs: dict[str, TensorSpec]) -> dict[str, Any]:
    """The data of each input in columnar form."""
    if type(inputs) is dict and not _is_value(inputs, specs):
        return inputs
    return {_only_input(specs, "'inputs'"): inputs}


def _may_go_unnamed(specs: dict[str, TensorSpec]) -> list[TensorSpec]:
    """The inputs that a request without names may mean; it is a good one if there is only one."""
    return [spec for spec in specs.values() if not spec.optional] or list(specs.values())


def _only_input(specs: dict[str, TensorSpec], where: str) -> str:
    """The name of the one input that a request may leave out."""
    unnamed = _may_go_unnamed(specs)
    if len(unnamed) != 1:
        names = ", ".join(f"'{name}'" for name in specs)
        raise InvalidRequest(f"{where} must name the inputs of this model: {names}")
    return unnamed[0].name


def _is_value(entry: dict[str, Any], specs: dict[str, TensorSpec]) -> bool:
    """Whether an object in the place of a map of inputs is a string in base64."""
    if not is_base64(entry) or "b64" in specs:
        return False
    unnamed = _may_go_unnamed(specs)
    return len(unnamed) == 1 and unnamed[0].datatype.numpy is None


def _refuse_optional(columns: Iterable[str], specs: dict[str, TensorSpec]) -> None:
    """An optional input of a batched model has one value for all rows, which rows cannot say."""
    for name in columns:
        if name in specs and specs[name].optional:
            raise InvalidRequest(
                f"input '{name}' is not given row by row: use 'inputs' in place of 'instances'"
            )


def _tensors(columns: dict[str, Any], specs: dict[str, TensorSpec]) -> list[InputTensor]:
    tensors = []
    strings = 0
    for name, data in columns.items():
        spec = specs.get(name)
        if spec is None:
            raise unexpected_input(name)
        shape, first = _nesting(name, data)
        if spec.datatype.numpy is None:
            strings = count_strings(shape, strings)
        tensors.append(_tensor(spec, data, shape, first))
    return tensors


def _nesting(name: str, data: Any) -> tuple[tuple[int, ...], Any]:
    """The shape of nested lists, down their first elements, and what comes last on that way."""
    shape: list[int] = []
    value = data
    while type(value) is list:
        if len(shape) == MAX_RANK:
            raise InvalidRequest(f"input '{name}' nests deeper than {MAX_RANK} levels")
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return tuple(shape), value


def _tensor(spec: TensorSpec, data: Any, shape: tuple[int, ...], first: Any) -> InputTensor:
    name = spec.name
    if spec.datatype.numpy is None:
        try:
            data = pack_nested(data, shape)
        except InvalidRequest as error:
            raise InvalidRequest(f"input '{name}': {error.message}") from None
    elif type(first) is str or is_base64(first):
        raise InvalidRequest(f"input '{name}' takes {spec.datatype.name}, got strings")
    elif not shape:
        return InputTensor(name, spec.datatype, (), [data])
    return InputTensor(name, spec.datatype, shape, data, strict=True)


def encode_predict(signature: Signature, row: bool, outputs: list[OutputTensor]) -> bytes:
    """The body of an answer: ``predictions`` for a request in rows, else ``outputs``.

    ``outputs`` are all outputs of the model; they are copied.

    Raises:
        InvalidRequest: an output is FP16 or BF16, which `check_call` refuses earlier; or the request
            came in rows and the outputs do not.
    """
    if row:
        _check_rows(outputs)
    arrays = {
        o.name: tensorflow_strings(o)
        if o.datatype.numpy is None
        else tensor_data(o.datatype, o.data, o.shape)
        for o in outputs
    }
    answer: Any = arrays
    if len(signature.outputs) == 1:
        (answer,) = arrays.values()
    elif row:
        rows = zip(*arrays.values(), strict=True)
        answer = [dict(zip(arrays, values, strict=True)) for values in rows]
    return dumps_tensors({"predictions" if row else "outputs": answer})


def _check_rows(outputs: list[OutputTensor]) -> None:
    """Hold outputs to having one first dim, that of the predictions."""
    first = outputs[0]
    for output in outputs:
        if output.shape[:1] != first.shape[:1] or not output.shape:
            raise InvalidRequest(
                f"output '{output.name}' has no row for each prediction: "
                "use 'inputs' in place of 'instances'"
            )


def model_status(entries: Iterable[VersionStatus]) -> dict[str, Any]:
    """The document of ``GET /v1/models/{m}``."""
    return {
        "model_version_status": [
            {
                "version": entry.version,
                "state": entry.state,
                "status": {"error_code": entry.error_code, "error_message": entry.error_message},
            }
            for entry in entries
        ]
    }


def metadata(name: str, version: str, signature: Signature) -> dict[str, Any]:
    """The document of ``GET /v1/models/{m}/metadata``."""
    definition = {
        "inputs": {spec.name: _tensor_info(spec) for spec in signature.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in signature.outputs},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": name, "signature_name": "", "version": version},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE_NAME: definition}}},
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    return {
        "dtype": spec.datatype.tensorflow,
        "tensor_shape": {
            "dim": []
            if spec.shape is None
            else [{"size": str(dim), "name": ""} for dim in spec.wire_shape],
            "unknown_rank": spec.shape is None,
        },
        "name": spec.name,
    }
