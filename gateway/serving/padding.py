"""Padding of symbolic dims: requests of similar lengths get one shape, and so share batches.

A request's inputs are padded as they are written into the slot; from its outputs every dim that bears
the padded symbol is cut back to the request's own length. Both are copies that only padded requests pay.
"""

from __future__ import annotations

from collections.abc import Mapping
from mmap import mmap
from typing import Any

import numpy as np

from gateway.protocols.call import InputTensor
from gateway.serving.geometry import Dims, Placement, inner_of
from gateway.serving.packing import raw
from gateway.tensors import Padding, Signature, TensorSpec


class Padder:
    """The padding of one model version.

    Args:
        signature: the model's; where it has no padding nothing is ever padded.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._by_symbol = {padding.dim: padding for padding in signature.padding}
        self._values = {
            name: value for padding in signature.padding for name, value in padding.values
        }

    def raise_dims(self, dims: Dims) -> tuple[Dims, dict[str, int]]:
        """Dims with the padded ones raised to their bucket; the lengths that were raised, by symbol."""
        lengths: dict[str, int] = {}
        padded: list[tuple[int, ...] | None] = []
        for spec, inner in zip(self._signature.inputs, dims, strict=True):
            if inner is None:
                padded.append(None)
                continue
            raised = list(inner)
            for axis, padding in self._axes(spec):
                raised[axis] = padding.bucket(inner[axis])
                if raised[axis] != inner[axis]:
                    lengths[padding.dim] = inner[axis]
            padded.append(tuple(raised))
        return tuple(padded), lengths

    def write(self, buffer: mmap | bytearray, at: int, tensor: InputTensor, p: Placement) -> None:
        """Write a tensor's rows, padded to the placement's dims, at a byte offset.

        Args:
            buffer: written from ``at`` on, where there is room.
            at: byte offset.
            tensor: its data are raw bytes.
            p: has the padded dims.
        """
        dtype = p.spec.datatype.dtype
        rows = tensor.shape[0] if p.has_rows else 1
        target = np.ndarray(p.dims(rows), dtype, buffer, at)
        target.fill(_element(p.spec, self._values.get(p.spec.name, 0)))
        own = tensor.shape[1:] if p.has_rows else tensor.shape
        part = self._part(p.spec, own, p.inner)
        where = (slice(None), *part) if p.has_rows else part
        target[where] = np.frombuffer(raw(tensor), dtype).reshape(tensor.shape)

    def cut(
        self, data: memoryview, dims: tuple[int, ...], p: Placement, lengths: Mapping[str, int]
    ) -> tuple[memoryview, tuple[int, ...]]:
        """A request's part of an output, without what stands for its padding.

        Args:
            data: raw bytes of these dims.
            dims: the request's, padded.
            p: the output's placement.
            lengths: the request's own, by symbol.

        Returns:
            Raw bytes and dims: the given ones where nothing is to be cut, else a copy.
        """
        own = list(p.inner)
        for axis, padding in self._axes(p.spec):
            length = lengths.get(padding.dim)
            if length is not None and axis < len(own) and own[axis] == padding.bucket(length):
                own[axis] = length
        if tuple(own) == p.inner:
            return data, dims
        part = self._part(p.spec, tuple(own), p.inner)
        where = (slice(None), *part) if p.has_rows else part
        array = np.frombuffer(data, p.spec.datatype.dtype).reshape(dims)[where]
        kept = np.ascontiguousarray(array)
        return kept.reshape(-1).view(np.uint8).data, kept.shape

    def _axes(self, spec: TensorSpec) -> list[tuple[int, Padding]]:
        """The axes of a row that are padded."""
        if spec.shape is None:
            return []
        return [
            (axis, self._by_symbol[symbol])
            for axis, symbol in enumerate(inner_of(self._signature, spec))
            if isinstance(symbol, str) and symbol in self._by_symbol
        ]

    def _part(
        self, spec: TensorSpec, own: tuple[int, ...], padded: tuple[int, ...]
    ) -> tuple[slice, ...]:
        """Where a row's own data lie within its padded dims."""
        at_end = {axis: padding.at_end for axis, padding in self._axes(spec)}
        return tuple(
            slice(0, length) if at_end.get(axis, True) else slice(room - length, room)
            for axis, (length, room) in enumerate(zip(own, padded, strict=True))
        )


def _element(spec: TensorSpec, value: float) -> Any:
    """The value as an element of the tensor; BF16 as the upper half of an FP32's bits."""
    if spec.datatype.name == "BF16":
        return np.float32(value).view(np.uint32) >> 16
    return spec.datatype.dtype.type(value)
