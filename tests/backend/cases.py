"""The backend test cases that the onnx package brings along: models, inputs and expected outputs.

There are four kinds: ``node`` (one operator each, made in memory by Python code; that takes seconds) and
``simple``, ``pytorch-converted`` and ``pytorch-operator`` (files in the wheel). The kind ``real`` is left
out: its models have no weights.

`Case.write` lays a case out in a folder of a model repository, with its data in another folder as
TensorProto files, for a process of its own to run (`direct`).
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from gateway.names import NAME
from gateway.tensors import DATATYPES

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")

MAX_NAME = 64
"""Characters of a model's name in the gateway."""

MODEL = "model.onnx"

Arrays = dict[str, np.ndarray]

_SERVED_TYPES = {datatype.onnx for datatype in DATATYPES.values()}


@dataclass(frozen=True, slots=True)
class DataSet:
    """Inputs and expected outputs by name; strings are object arrays."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Case:
    """One test: a model, data, and how far its outputs may be from the expected ones."""

    kind: str
    name: str
    rtol: float
    atol: float
    source: TestCase = field(repr=False)

    @property
    def model_name(self) -> str:
        """The name in a model repository: the case's own, cut and told apart by a hash if too long."""
        if len(self.name) > MAX_NAME:
            digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
            return f"{self.name[: MAX_NAME - 9]}_{digest}"
        return self.name

    def write(self, version: Path, data: Path) -> None:
        """Write the model and its side files to a version's folder, its data to another."""
        version.mkdir(parents=True)
        data.mkdir(parents=True)
        if self.source.model_dir is None:
            onnx.save(self._model(), version / MODEL)
        else:
            for path in Path(self.source.model_dir).iterdir():
                if path.is_file():
                    shutil.copyfile(path, version / path.name)
        for number, data_set in enumerate(self.data_sets() or ()):
            save_arrays(data / f"inputs_{number}", data_set.inputs)
            save_arrays(data / f"outputs_{number}", data_set.outputs)

    def data_sets(self) -> list[DataSet] | None:
        """All data; None where a value is no tensor, or of a datatype that v2 has no name for."""
        model = self._model()
        defaults = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in defaults]
        outputs = list(model.graph.output)
        if not all(_is_served(value) for value in (*inputs, *outputs)):
            return None
        return [
            DataSet(_named(inputs, given), _named(outputs, expected))
            for given, expected in self._values()
        ]

    def _model(self) -> onnx.ModelProto:
        if self.source.model_dir is None:
            return self.source.model
        return onnx.load(Path(self.source.model_dir) / MODEL, load_external_data=False)

    def _values(self) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        """Inputs and expected outputs of each data set, in the graph's order."""
        if self.source.model_dir is None:
            yield from self.source.data_sets
            return
        for folder in sorted(Path(self.source.model_dir).glob("test_data_set_*")):
            yield tuple(
                [_read_tensor(path) for path in sorted(folder.glob(f"{role}_*.pb"), key=_number)]
                for role in ("input", "output")
            )


def cases(kinds: Iterable[str] = KINDS) -> list[Case]:
    """All cases of these kinds, by kind and name. ValueError: two have one name, or one is no name."""
    found = [
        Case(kind, source.name, source.rtol, source.atol, source)
        for kind in kinds
        for source in sorted(_load(kind), key=lambda source: source.name)
    ]
    names = {case.model_name for case in found}
    if len(names) != len(found) or not all(NAME.fullmatch(name) for name in names):
        raise ValueError("the cases' names do not serve as names of models")
    return found


def sample(found: list[Case], count: int) -> list[Case]:
    """The ``count`` cases whose names' SHA-256 comes first: the same ones each time, of all sorts."""
    return sorted(found, key=lambda case: hashlib.sha256(case.name.encode()).digest())[:count]


def save_arrays(folder: Path, arrays: Arrays) -> None:
    """Write arrays as TensorProto files, in order."""
    folder.mkdir()
    for number, (name, array) in enumerate(arrays.items()):
        (folder / f"{number}.pb").write_bytes(
            numpy_helper.from_array(array, name).SerializeToString()
        )


def load_arrays(folder: Path) -> Arrays:
    """The inverse of `save_arrays`."""
    tensors = [_read_tensor(path) for path in sorted(folder.glob("*.pb"), key=_number)]
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


@functools.cache
def _load(kind: str) -> list[TestCase]:
    with warnings.catch_warnings():  # making the data divides by zero and overflows on purpose
        warnings.simplefilter("ignore")
        return load_model_tests(kind=kind)


def _is_served(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.WhichOneof("value")
    return kind == "tensor_type" and value.type.tensor_type.elem_type in _SERVED_TYPES


def _named(declared: Sequence[onnx.ValueInfoProto], values: Sequence[Any]) -> Arrays:
    return {value.name: _array(one) for value, one in zip(declared, values, strict=True)}


def _array(value: Any) -> np.ndarray:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value)


def _read_tensor(path: Path) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return tensor


def _number(path: Path) -> int:
    return int(re.search(r"\d+", path.stem)[0])
