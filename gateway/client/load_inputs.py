"""What a load sends: inputs that fit a model's metadata, as complete bodies in each protocol."""

from __future__ import annotations

import importlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import orjson

from gateway.client.encoding import Array, Encoding, encode_infer
from gateway.client.errors import BadAnswer
from gateway.errors import ConfigurationError
from gateway.tensors import DATATYPES, DataType, element_count

Protocol = Literal["v2-binary", "v2-json", "tfserving", "msgpack"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

MAX_BODIES = 64
"""Most different requests that are made; they are sent in turn."""

MAX_RANDOM_BYTES = 16 << 20
"""Of random inputs altogether, unless a single request is larger."""

_ENCODINGS: dict[str, Encoding] = {"v2-binary": "binary", "v2-json": "json", "msgpack": "msgpack"}

_STRING_DIGITS = 8
"""Length of a random string, all digits: models that parse numbers take it, too."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input as the server's metadata describes it; -1 is a dim that varies."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]

    @property
    def has_rows(self) -> bool:
        """Whether its first dim varies, and so counts rows."""
        return self.shape[:1] == (-1,)

    def __str__(self) -> str:
        return f"'{self.name}' {self.datatype.name} {list(self.shape)}"


def parse_inputs(metadata: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """The inputs in the document of ``GET /v2/models/{m}``. BadAnswer: it is not one."""
    try:
        return tuple(
            InputSpec(
                str(entry["name"]),
                DATATYPES[entry["datatype"]],
                tuple(int(dim) for dim in entry["shape"]),
            )
            for entry in metadata["inputs"]
        )
    except (LookupError, TypeError, ValueError) as error:
        raise BadAnswer(f"the model's metadata is malformed ({error!r})") from None


def concrete_shapes(
    specs: Sequence[InputSpec], given: Mapping[str, tuple[int, ...]], rows: int | None
) -> dict[str, tuple[int, ...]]:
    """The shape of each input of a request.

    Args:
        specs: the model's inputs.
        given: whole shapes by name, the first dim included.
        rows: replaces a first dim that varies where no shape is given; None: 1.

    Raises:
        ConfigurationError: a shape is given for no input or contradicts its declaration or ``rows``; or
            a dim varies and nothing says how long it is.
    """
    unknown = given.keys() - {spec.name for spec in specs}
    if unknown:
        known = ", ".join(map(str, specs)) or "none"
        raise ConfigurationError(f"no input '{min(unknown)}': the model's inputs are {known}")
    return {spec.name: _concrete_shape(spec, given.get(spec.name), rows) for spec in specs}


def _concrete_shape(
    spec: InputSpec, given: tuple[int, ...] | None, rows: int | None
) -> tuple[int, ...]:
    if given is None:
        shape = (1 if rows is None else rows, *spec.shape[1:]) if spec.has_rows else spec.shape
        if -1 in shape:
            example = ",".join(str(dim) if dim >= 0 else "N" for dim in shape)
            raise ConfigurationError(
                f"input {spec} has dims that vary: say how long they are, "
                f"--shape {spec.name}:{example}"
            )
        return shape
    fits = len(given) == len(spec.shape) and all(
        declared in (-1, dim) for declared, dim in zip(spec.shape, given, strict=False)
    )
    if not fits and spec.shape != (-1,):  # which may also stand for any rank
        raise ConfigurationError(f"--shape {list(given)} does not fit the input {spec}")
    if rows is not None and spec.has_rows and given[:1] != (rows,):
        raise ConfigurationError(
            f"input '{spec.name}': --shape {list(given)} does not begin with --rows {rows}"
        )
    return given


def rows_of(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of a request: the first dim of its inputs where that varies and is the same; else 1."""
    counts = {shapes[spec.name][0] for spec in specs if spec.has_rows and shapes[spec.name]}
    return counts.pop() if len(counts) == 1 else 1


def make_inputs(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, tuple[int, ...]],
    data: Literal["zeros", "random"],
    source: np.random.Generator,
) -> list[dict[str, Array]]:
    """The inputs of one request, or of several that differ, by the name of the input.

    Random floats are from 0 to 1, integers 0 or 1 (so that ids and masks are valid), strings digits.
    """
    if data == "zeros":
        return [{spec.name: _zeros(spec.datatype, shapes[spec.name]) for spec in specs}]
    made: list[dict[str, Array]] = []
    size = 0
    while not made or (len(made) < MAX_BODIES and size * (len(made) + 1) <= MAX_RANDOM_BYTES):
        one = {spec.name: _random(spec.datatype, shapes[spec.name], source) for spec in specs}
        size = sum(array.nbytes for array in one.values())
        made.append(one)
    return made


def _zeros(datatype: DataType, shape: tuple[int, ...]) -> Array:
    if datatype.numpy is None:
        return np.full(shape, b"", object)
    return np.zeros(shape, _dtype(datatype))


def _random(datatype: DataType, shape: tuple[int, ...], source: np.random.Generator) -> Array:
    if datatype.numpy is None:
        numbers = source.integers(10**_STRING_DIGITS, size=element_count(shape)).tolist()
        strings = np.empty(len(numbers), object)
        strings[:] = [b"%0*d" % (_STRING_DIGITS, number) for number in numbers]
        return strings.reshape(shape)
    dtype = _dtype(datatype)
    if dtype.kind in "biu":
        return source.integers(2, size=shape).astype(dtype)
    return source.random(shape, np.float32).astype(dtype)


def _dtype(datatype: DataType) -> np.dtype[Any]:
    """What an array of the datatype has. ConfigurationError: BF16 without ml_dtypes."""
    if datatype.name != "BF16":
        return datatype.dtype
    try:
        scalar: type = importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        raise ConfigurationError("BF16 inputs need a package: pip install ml_dtypes") from None
    return np.dtype(scalar)


def load_inputs(path: Path, specs: Sequence[InputSpec], rows: int | None) -> list[dict[str, Array]]:
    """Inputs from a ``.npz`` file with an array for each input, cut into requests along the first dim.

    Where every input has rows, requests are of ``rows`` (None: 1) each, `MAX_BODIES` of them at most;
    what does not fill a request is left out. Otherwise the arrays are one request, as they are.

    Raises:
        ConfigurationError: the file cannot be read or does not fit the model.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [spec.name for spec in specs if spec.name not in arrays]
            if missing:
                raise ConfigurationError(f"--data {path} has no array '{missing[0]}'")
            given = {spec.name: _fitting(spec, arrays[spec.name]) for spec in specs}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        raise ConfigurationError(f"--data {path}: expected a .npz file of arrays") from None
    if not specs or not all(spec.has_rows for spec in specs):
        return [given]
    per_request = 1 if rows is None else rows
    count = min(MAX_BODIES, min(len(array) for array in given.values()) // per_request)
    if not count:
        raise ConfigurationError(f"--data: expected at least {per_request} rows (--rows)")
    return [
        {name: array[at * per_request :][:per_request] for name, array in given.items()}
        for at in range(count)
    ]


def _fitting(spec: InputSpec, array: Array) -> Array:
    """The array with the input's dtype. ConfigurationError: it does not fit the declaration."""
    fits = len(array.shape) == len(spec.shape) and all(
        declared in (-1, dim) for declared, dim in zip(spec.shape, array.shape, strict=False)
    )
    if not fits and spec.shape != (-1,):
        raise ConfigurationError(
            f"--data: an array of shape {list(array.shape)} does not fit the input {spec}"
        )
    if spec.datatype.numpy is None:
        return array if array.dtype.kind in "SU" else array.astype(str)
    return array.astype(_dtype(spec.datatype))


def encode_request(
    protocol: Protocol, model_path: str, specs: Sequence[InputSpec], inputs: Mapping[str, Array]
) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of an inference.

    Args:
        protocol: in which it is asked.
        model_path: ``/{model}[/versions/{version}]``, quoted.
        specs: of the model.
        inputs: for each of them an array.

    Raises:
        InvalidRequest: the protocol has no form for a datatype.
    """
    if protocol != "tfserving":
        body, headers = encode_infer(_ENCODINGS[protocol], inputs)
        return f"/v2/models{model_path}/infer", body, headers
    encode_infer("json", inputs)  # refuses what JSON cannot carry
    document = _predict_document(specs, inputs)
    return f"/v1/models{model_path}:predict", document, {"Content-Type": "application/json"}


def _predict_document(specs: Sequence[InputSpec], inputs: Mapping[str, Array]) -> bytes:
    """TensorFlow Serving's request: in rows where every input has them, else in columns."""
    columns = {name: _nested(array) for name, array in inputs.items()}
    counts = {len(array) for array in inputs.values() if array.ndim}
    document: dict[str, Any] = {"inputs": columns}
    if len(counts) == 1 and all(spec.has_rows for spec in specs):
        if len(columns) == 1:
            (document["instances"],) = columns.values()
        else:
            rows = zip(*columns.values(), strict=True)
            document["instances"] = [dict(zip(columns, row, strict=True)) for row in rows]
        del document["inputs"]
    has_nan = any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in inputs.values())
    if has_nan:  # which orjson would write as null
        return json.dumps(document, default=lambda numbers: numbers.tolist()).encode()
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _nested(array: Array) -> Any:
    """The array as orjson takes it: numbers as they are, strings in lists, as text."""
    if array.dtype.kind not in "OSU":
        return np.ascontiguousarray(array) if array.ndim else array.item()
    texts = [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1)]
    return np.array(texts, object).reshape(array.shape).tolist()
