"""Datatypes, tensor specifications and model signatures: the vocabulary of every layer.

One table names each datatype in all the dialects the gateway speaks: the Open Inference Protocol
("FP32"), NumPy, ONNX's TensorProto numbers, ONNX Runtime's type strings, TensorFlow's ("DT_FLOAT").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_RANK = 8
"""Most dimensions a tensor may have; bounds the records in shared memory."""

MAX_ELEMENTS = (1 << 63) - 1
"""Most elements a shape may name, as in the Open Inference Protocol (int64)."""


@dataclass(frozen=True, slots=True)
class DataType:
    """One element type. ``numpy`` is the dtype of its raw little-endian bytes."""

    name: str  # Open Inference Protocol
    numpy: npt.DTypeLike | None  # None: not of a fixed size (BYTES)
    onnx: int  # onnx.TensorProto.DataType
    ort: str  # ONNX Runtime's "tensor(…)"
    tensorflow: str  # TensorFlow Serving's DT_…
    index: int  # number used by the kernels
    in_json: bool  # has a JSON form (FP16 and BF16 are binary only)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of one element (BF16: its raw 16 bits). TypeError for BYTES."""
        if self.numpy is None:
            raise TypeError(f"{self.name} has no fixed element size")
        return np.dtype(self.numpy)

    @property
    def itemsize(self) -> int:
        """Bytes of one element. TypeError for BYTES."""
        return self.dtype.itemsize


_TABLE = (
    DataType("BOOL", np.bool_, 9, "tensor(bool)", "DT_BOOL", 0, True),
    DataType("UINT8", np.uint8, 2, "tensor(uint8)", "DT_UINT8", 1, True),
    DataType("UINT16", np.uint16, 4, "tensor(uint16)", "DT_UINT16", 2, True),
    DataType("UINT32", np.uint32, 12, "tensor(uint32)", "DT_UINT32", 3, True),
    DataType("UINT64", np.uint64, 13, "tensor(uint64)", "DT_UINT64", 4, True),
    DataType("INT8", np.int8, 3, "tensor(int8)", "DT_INT8", 5, True),
    DataType("INT16", np.int16, 5, "tensor(int16)", "DT_INT16", 6, True),
    DataType("INT32", np.int32, 6, "tensor(int32)", "DT_INT32", 7, True),
    DataType("INT64", np.int64, 7, "tensor(int64)", "DT_INT64", 8, True),
    DataType("FP16", np.float16, 10, "tensor(float16)", "DT_HALF", 9, False),
    DataType("FP32", np.float32, 1, "tensor(float)", "DT_FLOAT", 10, True),
    DataType("FP64", np.float64, 11, "tensor(double)", "DT_DOUBLE", 11, True),
    DataType("BF16", np.uint16, 16, "tensor(bfloat16)", "DT_BFLOAT16", 12, False),
    DataType("BYTES", None, 8, "tensor(string)", "DT_STRING", 13, True),
)

DATATYPES: dict[str, DataType] = {t.name: t for t in _TABLE}
BY_ORT: dict[str, DataType] = {t.ort: t for t in _TABLE}


Shape = tuple[int | str | None, ...]
"""Declared dims: a positive int for a fixed one, a name for a symbolic one, None for an unknown one."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    ``shape`` is None where not even the rank is known. In a batched model the first dim is the batch.
    ``optional``: an input that has a default, so that a request may leave it out.
    """

    name: str
    datatype: DataType
    shape: Shape | None
    optional: bool = False

    @property
    def wire_shape(self) -> list[int]:
        """The shape as the protocols show it: -1 where a dim varies, [-1] where the rank does."""
        return [-1] if self.shape is None else [d if isinstance(d, int) else -1 for d in self.shape]

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        return {
            "name": self.name,
            "datatype": self.datatype.name,
            "shape": None if self.shape is None else list(self.shape),
            "optional": self.optional,
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> TensorSpec:
        """The inverse of `to_wire`."""
        shape = wire["shape"]
        return cls(
            wire["name"],
            DATATYPES[wire["datatype"]],
            None if shape is None else tuple(shape),
            wire["optional"],
        )


@dataclass(frozen=True, slots=True)
class Padding:
    """How inputs are padded in one symbolic dim, so that requests of similar lengths share a batch.

    Attributes:
        dim: the symbolic dim's name; outputs that have it are cut back to the request's own length.
        buckets: the lengths that it is padded to, ascending; a longer request keeps its own length.
        at_end: padding goes behind the data, else in front of it.
        values: what each named input is padded with; 0 for the others.
    """

    dim: str
    buckets: tuple[int, ...]
    at_end: bool
    values: tuple[tuple[str, float], ...]

    def bucket(self, length: int) -> int:
        """The length that this one is padded to."""
        return next((bucket for bucket in self.buckets if bucket >= length), length)

    def to_wire(self) -> list[Any]:
        """Plain values for a message between processes."""
        return [self.dim, list(self.buckets), self.at_end, [list(pair) for pair in self.values]]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Padding:
        """The inverse of `to_wire`."""
        dim, buckets, at_end, values = wire
        return cls(dim, tuple(buckets), at_end, tuple((name, value) for name, value in values))


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model version takes and gives, and how its batches are made.

    Attributes:
        inputs: in the model's order, optional ones last.
        outputs: in the model's order.
        max_batch_size: most rows of a batch; 0 for a model that is served one request at a time, whose
            tensors have no batch dim (as far as the gateway is concerned).
        allowed_batch_sizes: where given, batches are padded to one of these numbers of rows, ascending;
            the last is `max_batch_size`.
        padding: at most one for each symbolic dim.
        describes_outputs: the worker describes every output after each run, as if no shape of theirs
            were known: binding them in advance was found unsafe, or one of them is of strings.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    allowed_batch_sizes: tuple[int, ...] = ()
    padding: tuple[Padding, ...] = ()
    describes_outputs: bool = False

    @property
    def is_batched(self) -> bool:
        """Whether the first dim of every tensor is the batch, and rows of several requests share one."""
        return self.max_batch_size > 0

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        return {
            "inputs": [t.to_wire() for t in self.inputs],
            "outputs": [t.to_wire() for t in self.outputs],
            "max_batch_size": self.max_batch_size,
            "allowed_batch_sizes": list(self.allowed_batch_sizes),
            "padding": [padding.to_wire() for padding in self.padding],
            "describes_outputs": self.describes_outputs,
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Signature:
        """The inverse of `to_wire`."""
        return cls(
            tuple(TensorSpec.from_wire(t) for t in wire["inputs"]),
            tuple(TensorSpec.from_wire(t) for t in wire["outputs"]),
            wire["max_batch_size"],
            tuple(wire["allowed_batch_sizes"]),
            tuple(Padding.from_wire(padding) for padding in wire["padding"]),
            wire["describes_outputs"],
        )


def element_count(shape: tuple[int, ...] | list[int]) -> int:
    """Elements of a shape whose dims are all known (1 for a scalar); exact, never overflows."""
    return math.prod(shape)
