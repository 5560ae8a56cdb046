"""TensorFlow Serving's REST API: predict in rows and in columns, status and metadata.

Protocol: tensorflow.org/tfx/serving/api_rest. A single tensor drops its name, both ways. Shapes are
not sent: they follow from how the lists nest, down the first element of each level, and the decode
kernel holds every other element to them (`InputTensor.strict`).
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
    bytes_unsupported,
    unexpected_input,
)
from gateway.protocols.jsontext import check_ignored, dumps_tensors, loads, tensor_data
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
    model has no input of that name: documentation in the wild sends it.

    Raises:
        InvalidRequest: malformed in any way. The call is yet to be held against the signature
            (`check_call`).
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
    else:
        columns = _columns_of_inputs(document["inputs"], specs)
    return InferCall([_tensor(name, data, specs) for name, data in columns.items()]), row


def _columns_of_instances(instances: Any, specs: dict[str, TensorSpec]) -> dict[str, Any]:
    """The data of each input. One without a name is the list of instances itself, not a copy."""
    if type(instances) is not list or not instances:
        raise InvalidRequest("'instances' must be an array of at least one element")
    first = instances[0]
    if type(first) is not dict:
        return {_only_input(specs, "'instances'"): instances}
    if first.keys() == {"inputs"} and type(first["inputs"]) is dict and "inputs" not in specs:
        instances = [
            instance.get("inputs") if type(instance) is dict and len(instance) == 1 else None
            for instance in instances
        ]
        first = instances[0]
    names = first.keys()
    for position, instance in enumerate(instances):
        if type(instance) is not dict or instance.keys() != names:
            raise InvalidRequest(f"instance {position} does not name the same inputs as instance 0")
    return {name: [instance[name] for instance in instances] for name in names}


def _columns_of_inputs(inputs: Any, specs: dict[str, TensorSpec]) -> dict[str, Any]:
    """The data of each input in columnar form."""
    if type(inputs) is dict:
        return inputs
    return {_only_input(specs, "'inputs'"): inputs}


def _only_input(specs: dict[str, TensorSpec], where: str) -> str:
    """The name of a model's one input, which the request may leave out."""
    if len(specs) != 1:
        names = ", ".join(f"'{name}'" for name in specs)
        raise InvalidRequest(f"{where} must name the inputs of this model: {names}")
    return next(iter(specs))


def _tensor(name: str, data: Any, specs: dict[str, TensorSpec]) -> InputTensor:
    spec = specs.get(name)
    if spec is None:
        if name == "b64" and len(specs) == 1:
            raise bytes_unsupported(next(iter(specs)))
        raise unexpected_input(name)
    shape: list[int] = []
    value = data
    while type(value) is list:
        if len(shape) == MAX_RANK:
            raise InvalidRequest(f"input '{name}' nests deeper than {MAX_RANK} levels")
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    if type(value) is str or (type(value) is dict and value.keys() == {"b64"}):
        raise bytes_unsupported(name)
    return InputTensor(name, spec.datatype, tuple(shape), data, strict=True)


def encode_predict(signature: Signature, row: bool, outputs: list[OutputTensor]) -> bytes:
    """The body of an answer: ``predictions`` for a request in rows, else ``outputs``.

    ``outputs`` are all outputs of the model, the batch as their first dim; they are copied.

    Raises:
        InvalidRequest: an output is FP16 or BF16, which `check_call` refuses earlier.
    """
    arrays = {o.name: tensor_data(o.datatype, o.data, o.shape) for o in outputs}
    answer: Any = arrays
    if len(signature.outputs) == 1:
        (answer,) = arrays.values()
    elif row:
        rows = zip(*arrays.values(), strict=True)
        answer = [dict(zip(arrays, values, strict=True)) for values in rows]
    return dumps_tensors({"predictions" if row else "outputs": answer})


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
            "dim": [{"size": str(dim), "name": ""} for dim in spec.wire_shape],
            "unknown_rank": False,
        },
        "name": spec.name,
    }
