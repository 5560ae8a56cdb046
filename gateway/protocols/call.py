"""A decoded inference request and its answer, as every protocol sees them.

A protocol module turns bytes into an `InferCall`, `check_call` holds it against the model's
signature, and `serving` packs the tensors' data into shared memory. Tensor data is not converted
here: nested lists stay lists until the decode kernel writes them to their place, and raw bytes stay
a view of the request's body.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gateway import bytestrings
from gateway.errors import InvalidRequest, TooLarge
from gateway.names import NAME
from gateway.tensors import (
    DATATYPES,
    MAX_ELEMENTS,
    MAX_RANK,
    DataType,
    Shape,
    Signature,
    TensorSpec,
    element_count,
)

_MAX_ELEMENTS = {
    t.name: MAX_ELEMENTS // (1 if t.numpy is None else t.itemsize) for t in DATATYPES.values()
}
"""Elements whose bytes still fit in 63 bits, beside a zero in the shape, too."""

_ITEMSIZES = {t.name: t.itemsize for t in DATATYPES.values() if t.numpy is not None}

_ANY_DIMS: Shape = (None,) * MAX_RANK


@dataclass(slots=True)
class InputTensor:
    """One input of a request.

    ``data`` is a list of numbers (flat or nested; of one for shape ()) or the tensor's raw bytes
    (little-endian, row-major, exactly ``element_count(shape) * itemsize`` of them). ``strict``: a
    list must nest exactly as ``shape`` says; otherwise it is flattened and only the count must agree.
    BYTES are always raw: their serialised form (`gateway.bytestrings`).
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: list[Any] | memoryview
    strict: bool = False


@dataclass(slots=True)
class WantedOutput:
    """An output that the caller named, and whether it wants it as raw bytes."""

    name: str
    binary: bool


@dataclass(slots=True)
class InferCall:
    """One inference request. ``outputs`` None means all of them, each ``binary_outputs``.

    ``timeout_us`` None means the model's own. ``priority`` 1 is the highest level, 0 the model's
    default. ``rows`` is set by `check_call`: 1 for a model that is not batched.
    """

    inputs: list[InputTensor]
    id: str | None = None
    outputs: list[WantedOutput] | None = None
    binary_outputs: bool = False
    timeout_us: int | None = None
    priority: int = 0
    rows: int = 0


@dataclass(slots=True)
class OutputTensor:
    """One output of an answer. ``data`` holds its raw bytes, little-endian and row-major.

    The view is only valid inside the call that was handed it (it shows memory shared with a
    worker): an encoder copies what it keeps.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: memoryview


def check_call(call: InferCall, signature: Signature, max_bytes: int) -> None:
    """Hold a call against a model's signature, and set ``call.rows``.

    Checks names of inputs and outputs, datatypes, shapes, that a symbolic dim has one value throughout
    the request, and the size of raw data. How many numbers a list holds is checked by the decode
    kernel, which counts them anyway. In a batched model the required inputs need the same first dim,
    the rows, whose name is not compared with other dims.

    Args:
        call: as a protocol module parsed it; BYTES are raw.
        signature: of the model version.
        max_bytes: most bytes that all inputs may take as tensors (``max_request_bytes``).

    Raises:
        InvalidRequest: the call does not fit; the message names the tensor.
        TooLarge: the inputs take more than ``max_bytes`` once decoded.
    """
    specs = _match_inputs(call.inputs, signature.inputs)
    _check_outputs(call, signature.outputs)
    rows = total_bytes = 0
    symbols: dict[str, int] = {}
    batched = signature.is_batched
    for tensor, spec in zip(call.inputs, specs, strict=True):
        has_rows = batched and not spec.optional
        total_bytes += _check_tensor(tensor, spec, symbols, has_rows)
        if has_rows and tensor.shape[0] != rows:
            if rows:
                first = next(other.name for other in specs if not other.optional)
                raise InvalidRequest(
                    f"input '{spec.name}' has {tensor.shape[0]} rows, "
                    f"'{first}' has {rows}: every input needs as many"
                )
            rows = tensor.shape[0]
    if not batched:
        rows = 1
    elif rows > signature.max_batch_size:
        raise InvalidRequest(
            f"request batch-size must be <= {signature.max_batch_size}, got {rows}"
        )
    elif not rows:
        raise InvalidRequest("the request has no rows")
    if total_bytes > max_bytes:
        raise TooLarge(
            f"the inputs take {total_bytes} bytes as tensors, max_request_bytes is {max_bytes}"
        )
    call.rows = rows


def _match_inputs(tensors: list[InputTensor], specs: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    """The spec of each tensor, in the order of the request."""
    missing = {spec.name: spec for spec in specs}
    matched = []
    for tensor in tensors:
        spec = missing.pop(tensor.name, None)
        if spec is None:
            if any(spec.name == tensor.name for spec in specs):
                raise InvalidRequest(f"input '{tensor.name}' is given twice")
            raise unexpected_input(tensor.name)
        matched.append(spec)
    if missing:
        absent = [f"'{spec.name}'" for spec in missing.values() if not spec.optional]
        if absent:
            required = sum(not spec.optional for spec in specs)
            raise InvalidRequest(
                f"expected {required} inputs but got {required - len(absent)}, "
                f"missing: {', '.join(absent)}"
            )
    return matched


def _check_outputs(call: InferCall, specs: tuple[TensorSpec, ...]) -> None:
    if call.outputs is None:
        if not call.binary_outputs:
            for spec in specs:
                if not spec.datatype.in_json:
                    raise no_json_form(f"output '{spec.name}'", spec.datatype)
        return
    left = {spec.name: spec for spec in specs}
    for wanted in call.outputs:
        found = left.pop(wanted.name, None)
        if found is None:
            if any(spec.name == wanted.name for spec in specs):
                raise InvalidRequest(f"output '{wanted.name}' is requested twice")
            raise InvalidRequest(f"unexpected inference output {show_name(wanted.name)}")
        if not wanted.binary and not found.datatype.in_json:
            raise no_json_form(f"output '{found.name}'", found.datatype)


def _check_tensor(
    tensor: InputTensor, spec: TensorSpec, symbols: dict[str, int], has_rows: bool
) -> int:
    """The bytes that the tensor takes. ``symbols``: the values of symbolic dims seen so far."""
    datatype, shape = tensor.datatype, tensor.shape
    if datatype is not spec.datatype:
        raise InvalidRequest(
            f"input '{spec.name}' has datatype {datatype.name}, expected {spec.datatype.name}"
        )
    declared = _ANY_DIMS[: len(shape)] if spec.shape is None else spec.shape
    if len(shape) != len(declared):
        raise _misshapen(tensor, spec)
    for position, (dim, expected) in enumerate(zip(shape, declared, strict=True)):
        if isinstance(expected, int):
            if dim != expected:
                raise _misshapen(tensor, spec)
        elif dim < 0:
            raise _misshapen(tensor, spec)
        elif (
            expected
            # The batch dim's name is left out: the rows of a call are compared on their own.
            and (position or not has_rows)
            and symbols.setdefault(expected, dim) != dim
        ):
            raise InvalidRequest(
                f"input '{spec.name}': dim {position} is {show_number(dim)}, but '{expected}' "
                f"is {show_number(symbols[expected])} elsewhere in the request"
            )
    elements = element_count(shape)
    # Beside a zero the other dims must not overflow either: an output may lack the zero.
    if (elements or element_count([dim or 1 for dim in shape])) > _MAX_ELEMENTS[datatype.name]:
        raise _too_many_elements(spec)
    if has_rows and (not shape or not shape[0]):
        raise InvalidRequest(f"input '{spec.name}' has no rows: its first dim must be at least 1")
    if datatype.numpy is None:
        return _check_strings(tensor, elements)
    size = elements * _ITEMSIZES[datatype.name]
    if isinstance(tensor.data, memoryview):
        if tensor.data.nbytes != size:
            raise InvalidRequest(
                f"input '{spec.name}': expected {size} bytes of data for shape "
                f"{show_shape(shape)}, got {tensor.data.nbytes}"
            )
    elif not datatype.in_json:
        raise no_json_form(f"input '{spec.name}'", datatype)
    return size


def _check_strings(tensor: InputTensor, elements: int) -> int:
    """The bytes of a BYTES tensor's raw form, which must hold as many elements."""
    if not isinstance(tensor.data, memoryview):
        raise TypeError("a BYTES tensor needs raw data")
    wanted = f"expected {elements} strings for shape {show_shape(tensor.shape)}"
    try:
        left = tensor.data.nbytes - bytestrings.skip(tensor.data, elements)
    except ValueError as error:
        raise InvalidRequest(f"input '{tensor.name}': {wanted}, but {error}") from None
    if left:  # how many strings that is stays unsaid: they may be millions
        raise InvalidRequest(f"input '{tensor.name}': {wanted}, but {left} bytes are left over")
    return tensor.data.nbytes


def _misshapen(tensor: InputTensor, spec: TensorSpec) -> InvalidRequest:
    """The error for a shape that the spec does not allow."""
    if any(dim > MAX_ELEMENTS for dim in tensor.shape):
        return _too_many_elements(spec)
    if any(dim < 0 for dim in tensor.shape):
        return InvalidRequest(f"input '{spec.name}' has a negative dim")
    return InvalidRequest(
        f"unexpected shape for input '{spec.name}': "
        f"expected {show_shape(spec.wire_shape)}, got {show_shape(tensor.shape)}"
    )


def _too_many_elements(spec: TensorSpec) -> InvalidRequest:
    return InvalidRequest(f"input '{spec.name}': its shape names more than 2^63-1 elements")


def show_shape(shape: Iterable[int]) -> str:
    """A shape or an index as a message shows it."""
    return f"[{','.join(map(str, shape))}]"


def show_number(number: int) -> str:
    """A number from a request as a message shows it; its digits may be thousands."""
    return str(number) if number <= MAX_ELEMENTS else "over 2^63-1"


def unexpected_input(name: str) -> InvalidRequest:
    """The error for an input that the model does not have."""
    return InvalidRequest(f"unexpected inference input {show_name(name)}")


def no_json_form(subject: str, datatype: DataType) -> InvalidRequest:
    """The error for a tensor whose datatype only has a binary form; ``subject`` begins it."""
    return InvalidRequest(
        f"{subject}: {datatype.name} has no JSON or array form, use binary data "
        "(the v2 binary extension or msgpack)"
    )


def show_name(name: object, known: Iterable[TensorSpec] = ()) -> str:
    """A name as an error may show it: quoted where it matches the grammar of names, else hidden.

    Names of the model's own tensors, ``known``, are shown whatever they hold.
    """
    if isinstance(name, str) and (NAME.fullmatch(name) or any(spec.name == name for spec in known)):
        return f"'{name}'"
    return "<name not shown>"
