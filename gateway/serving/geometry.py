"""Where every row lies in a lane's memory. Front end and worker compute the same from the same facts.

A slot's input region holds, for each input, `capacity` rows one behind the other, each tensor beginning
at a multiple of 64 bytes: it is the batch tensor, at every number of rows. The output region is laid out
in the same way behind a head that holds an error text, or the shapes of outputs that could not be told
from the inputs' shapes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.tensors import MAX_RANK, Signature, TensorSpec, element_count

LINE = 64
"""Alignment of every tensor: a cache line, and what vector loads like."""

ERROR_BYTES = 448
"""Most bytes of a worker's error text."""

SMALLEST_CLASS_BYTES = 4096
"""Slot bytes of the smallest size class of a model with variable dims."""

UNKNOWN_OUTPUT_BYTES = 1 << 20
"""At least so much output region has a slot where an output's size is only known after the run."""

MAX_SLOT_COUNT = 256
"""Slots of a lane. Most batches of a fast model are small, so slots must be plentiful."""

MIN_SLOT_COUNT = 8

_DESCRIPTOR = struct.Struct(f"<II{MAX_RANK}qQQ")  # rank, unused, dims, offset, nbytes
_ERROR_LENGTH = struct.Struct("<I")

Dims = tuple[tuple[int, ...], ...]
"""Inner dims (all but the batch) of each input of a request."""


def align(nbytes: int) -> int:
    """Round up to a cache line."""
    return -(-nbytes // LINE) * LINE


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """Geometry of a lane, told to its workers."""

    slot_count: int
    input_slot_bytes: int
    output_slot_bytes: int
    dims_per_slot: int

    def to_wire(self) -> list[int]:
        """Plain values for a message between processes."""
        return [
            self.slot_count,
            self.input_slot_bytes,
            self.output_slot_bytes,
            self.dims_per_slot,
        ]

    @classmethod
    def from_wire(cls, wire: Sequence[int]) -> LaneSpec:
        """The inverse of `to_wire`."""
        return cls(*wire)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor of a shape lies within a slot.

    Attributes:
        spec: the tensor's name and datatype.
        inner: its dims without the batch.
        row_bytes: bytes of one row.
        offset: from the begin of the slot's region.
    """

    spec: TensorSpec
    inner: tuple[int, ...]
    row_bytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The layout of a slot whose rows have given inner dims.

    ``outputs`` is None when an output's shape is only known after the run: the worker then describes
    the outputs in the head of the slot's output region.
    """

    dims: Dims
    capacity: int
    inputs: tuple[Placement, ...]
    input_bytes: int
    outputs: tuple[Placement, ...] | None
    output_bytes: int


def head_bytes(outputs: int) -> int:
    """Bytes of the head of an output region: descriptors, or a length and an error text."""
    return align(max(_DESCRIPTOR.size * outputs, _ERROR_LENGTH.size + ERROR_BYTES))


def shape_of(signature: Signature, dims: Dims, capacity: int) -> Shape:
    """Lay out a slot for rows of these dims.

    Args:
        signature: the model's.
        dims: inner dims of each input, in the signature's order, that match it.
        capacity: rows the slot holds.
    """
    inputs, input_bytes = _place(
        [(s, inner) for s, inner in zip(signature.inputs, dims, strict=True)], capacity, 0
    )
    head = head_bytes(len(signature.outputs))
    inner_of_outputs = _resolve_outputs(signature, dims)
    if inner_of_outputs is None:
        return Shape(dims, capacity, inputs, input_bytes, None, head + UNKNOWN_OUTPUT_BYTES)
    outputs, output_bytes = _place(
        list(zip(signature.outputs, inner_of_outputs, strict=True)), capacity, head
    )
    return Shape(dims, capacity, inputs, input_bytes, outputs, output_bytes)


def capacity_of(signature: Signature, dims: Dims, lane_bytes: int) -> int:
    """Rows of these dims that one slot holds: max_batch_size, fewer where rows are very large.

    0 where not even one row's inputs, or its outputs, fit the budget of a lane.
    """
    one = shape_of(signature, dims, 1)
    row_bytes = max(
        sum(p.row_bytes for p in one.inputs), sum(p.row_bytes for p in one.outputs or ()), 1
    )
    return min(signature.max_batch_size, lane_bytes // row_bytes)


def lane_spec(signature: Signature, shape: Shape, lane_bytes: int) -> LaneSpec:
    """The lane that holds slots of this shape.

    A model with fixed dims gets slots of exactly its size; with variable ones, slots of a size class,
    so that similar shapes share a lane. Slots come from a byte budget.
    """
    input_bytes, output_bytes = shape.input_bytes, shape.output_bytes
    if not has_fixed_dims(signature):
        input_bytes = output_bytes = size_class(max(input_bytes, output_bytes))
    slot_bytes = max(LINE, input_bytes, output_bytes)
    slot_count = max(MIN_SLOT_COUNT, min(MAX_SLOT_COUNT, lane_bytes // slot_bytes))
    dims = sum(len(spec.shape) - 1 for spec in signature.inputs)
    return LaneSpec(slot_count, max(LINE, input_bytes), output_bytes, dims)


def size_class(nbytes: int) -> int:
    """The smallest 4096 * 4**k that holds so many bytes."""
    size = SMALLEST_CLASS_BYTES
    while size < nbytes:
        size *= 4
    return size


def has_fixed_dims(signature: Signature) -> bool:
    """Whether every dim but the batch is fixed, in inputs and outputs."""
    return all(
        isinstance(dim, int)
        for spec in (*signature.inputs, *signature.outputs)
        for dim in spec.shape[1:]
    )


def split_dims(signature: Signature, flat: Sequence[int]) -> Dims:
    """The dims of each input, from the flat sequence in a slot's record."""
    dims: list[tuple[int, ...]] = []
    at = 0
    for spec in signature.inputs:
        inner = len(spec.shape) - 1
        dims.append(tuple(flat[at : at + inner]))
        at += inner
    return tuple(dims)


def write_error(region: memoryview, text: str) -> None:
    """Put an error text at the head of an output region, cut to `ERROR_BYTES`."""
    encoded = text.encode("utf-8", "replace")[:ERROR_BYTES]
    _ERROR_LENGTH.pack_into(region, 0, len(encoded))
    region[_ERROR_LENGTH.size : _ERROR_LENGTH.size + len(encoded)] = encoded


def read_error(region: memoryview) -> str:
    """The error text at the head of an output region, which another process wrote: not trusted."""
    (length,) = _ERROR_LENGTH.unpack_from(region, 0)
    start = _ERROR_LENGTH.size
    return bytes(region[start : start + min(length, ERROR_BYTES)]).decode("utf-8", "replace")


def write_descriptors(
    region: memoryview, outputs: Sequence[tuple[tuple[int, ...], int, int]]
) -> None:
    """Describe outputs as (dims with the batch, offset in the region, nbytes) each."""
    for i, (dims, offset, nbytes) in enumerate(outputs):
        padded = (*dims, *(0 for _ in range(MAX_RANK - len(dims))))
        _DESCRIPTOR.pack_into(region, i * _DESCRIPTOR.size, len(dims), 0, *padded, offset, nbytes)


def read_descriptors(region: memoryview, signature: Signature, rows: int) -> list[Placement] | None:
    """Outputs that a worker described, or None where it described nonsense.

    Every number is checked against the region, the datatype and the rows: another process wrote them.
    """
    placements: list[Placement] = []
    for i, spec in enumerate(signature.outputs):
        rank, _, *rest = _DESCRIPTOR.unpack_from(region, i * _DESCRIPTOR.size)
        dims, (offset, nbytes) = tuple(rest[:MAX_RANK][:rank]), rest[MAX_RANK:]
        if not 1 <= rank <= MAX_RANK or dims[0] != rows or min(dims) < 0:
            return None
        if nbytes != element_count(dims) * spec.datatype.itemsize:
            return None
        if offset + nbytes > len(region):
            return None
        placements.append(Placement(spec, dims[1:], nbytes // rows, offset))
    return placements


def _place(
    tensors: list[tuple[TensorSpec, tuple[int, ...]]], capacity: int, offset: int
) -> tuple[tuple[Placement, ...], int]:
    placed: list[Placement] = []
    for spec, inner in tensors:
        row_bytes = spec.datatype.itemsize * element_count(inner)
        placed.append(Placement(spec, inner, row_bytes, offset))
        offset += align(row_bytes * capacity)
    return tuple(placed), offset


def _resolve_outputs(signature: Signature, dims: Dims) -> list[tuple[int, ...]] | None:
    """Inner dims of each output, told from the symbols that the inputs' dims bind; None if not all."""
    symbols: dict[str, int] = {}
    for spec, inner in zip(signature.inputs, dims, strict=True):
        for symbol, value in zip(spec.shape[1:], inner, strict=True):
            if isinstance(symbol, str):
                symbols[symbol] = value
    resolved: list[tuple[int, ...]] = []
    for spec in signature.outputs:
        known: list[int] = []
        for dim in spec.shape[1:]:
            size = symbols.get(dim) if isinstance(dim, str) else dim
            if size is None:
                return None
            known.append(size)
        resolved.append(tuple(known))
    return resolved
