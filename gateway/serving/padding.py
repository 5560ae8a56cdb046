"""Padding of symbolic dims: requests of similar lengths get one shape, and so share batches.

A request's inputs are padded as they are written into the slot; from its outputs every dim that bears
the padded symbol is cut back to the request's own length. Both are copies that only padded requests pay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        by_symbol = {padding.dim: padding for padding in signature.padding}
        specs = (*signature.inputs, *signature.outputs)
        self._inputs = [_axes(signature, spec, by_symbol) for spec in signature.inputs]
        self._axes = {spec.name: _axes(signature, spec, by_symbol) for spec in specs}
        self._fill = {
            spec.name: [
                _element(spec, dict(padding.values).get(spec.name, 0))
                for _axis, padding in self._axes[spec.name]
            ]
            for spec in signature.inputs
        }

    def raise_dims(self, dims: Dims) -> tuple[Dims, dict[str, int]]:
        """Dims with the padded ones raised to their bucket; the lengths that were raised, by symbol."""
        lengths: dict[str, int] = {}
        padded: list[tuple[int, ...] | None] = []
        for axes, inner in zip(self._inputs, dims, strict=True):
            if inner is None or not axes:
                padded.append(inner)
                continue
            raised = list(inner)
            for axis, padding in axes:
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
        own = tensor.shape[1:] if p.has_rows else tensor.shape
        ahead = (slice(None),) if p.has_rows else ()
        for (axis, padding), value in zip(
            self._axes[p.spec.name], self._fill[p.spec.name], strict=True
        ):
            length, room = own[axis], p.inner[axis]
            outside = slice(length, room) if padding.at_end else slice(0, room - length)
            target[(*ahead, *(slice(None),) * axis, outside)] = value
        target[self._part(p, own)] = np.frombuffer(raw(tensor), dtype).reshape(tensor.shape)

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
        for axis, padding in self._axes[p.spec.name]:
            length = lengths.get(padding.dim)
            if length is not None and axis < len(own) and own[axis] == padding.bucket(length):
                own[axis] = length
        if tuple(own) == p.inner:
            return data, dims
        part = self._part(p, own)
        array = np.frombuffer(data, p.spec.datatype.dtype).reshape(dims)[part]
        kept = np.ascontiguousarray(array)
        return kept.reshape(-1).view(np.uint8).data, kept.shape

    def _part(self, p: Placement, own: Sequence[int]) -> tuple[slice, ...]:
        """Where a request's own data lie within its padded tensor."""
        part = [slice(length) for length in own]
        for axis, padding in self._axes[p.spec.name]:
            if not padding.at_end and axis < len(part):
                part[axis] = slice(p.inner[axis] - own[axis], p.inner[axis])
        return (slice(None), *part) if p.has_rows else tuple(part)


def _axes(
    signature: Signature, spec: TensorSpec, by_symbol: Mapping[str, Padding]
) -> list[tuple[int, Padding]]:
    """The axes of a row that are padded."""
    if spec.shape is None:
        return []
    return [
        (axis, by_symbol[symbol])
        for axis, symbol in enumerate(inner_of(signature, spec))
        if isinstance(symbol, str) and symbol in by_symbol
    ]


def _element(spec: TensorSpec, value: float) -> Any:
    """The value as an element of the tensor; BF16 as the upper half of an FP32's bits."""
    if spec.datatype.name == "BF16":
        return np.float32(value).view(np.uint32) >> 16
    return spec.datatype.dtype.type(value)
