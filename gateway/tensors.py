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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    ``shape`` holds a positive int for a fixed dim, a name for a symbolic one, None for an unknown
    one; the first is the batch dim.
    """

    name: str
    datatype: DataType
    shape: tuple[int | str | None, ...]

    @property
    def wire_shape(self) -> list[int]:
        """The shape as the protocols show it: -1 where a dim varies."""
        return [d if isinstance(d, int) else -1 for d in self.shape]

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        return {"name": self.name, "datatype": self.datatype.name, "shape": list(self.shape)}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> TensorSpec:
        """The inverse of `to_wire`."""
        return cls(wire["name"], DATATYPES[wire["datatype"]], tuple(wire["shape"]))


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model version takes and gives, and how many rows it takes at once."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        return {
            "inputs": [t.to_wire() for t in self.inputs],
            "outputs": [t.to_wire() for t in self.outputs],
            "max_batch_size": self.max_batch_size,
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Signature:
        """The inverse of `to_wire`."""
        return cls(
            tuple(TensorSpec.from_wire(t) for t in wire["inputs"]),
            tuple(TensorSpec.from_wire(t) for t in wire["outputs"]),
            wire["max_batch_size"],
        )


def element_count(shape: tuple[int, ...] | list[int]) -> int:
    """Elements of a shape whose dims are all known (1 for a scalar); exact, never overflows."""
    return math.prod(shape)
