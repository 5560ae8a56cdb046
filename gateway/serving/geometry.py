"""Where every row lies in a lane's memory. Front end and worker compute the same from the same facts.

A slot's input region holds, for each input, `capacity` rows one behind the other, each tensor beginning
at a multiple of 64 bytes: it is the batch tensor, at every number of rows. A model that is not batched
has slots of one row, which is the whole tensor. A row of strings is a record that says where in the heap
at the region's end they lie. The output region is laid out in the same way behind a head that holds an
error text, or the shapes of outputs that could not be told from the inputs' shapes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gateway.tensors import MAX_RANK, Shape, Signature, TensorSpec, element_count

LINE = 64
"""Alignment of every tensor: a cache line, and what vector loads like."""

ERROR_BYTES = 448
"""Most bytes of a worker's error text."""

SMALLEST_CLASS_BYTES = 4096
"""Slot bytes of the smallest size class of a model with variable dims."""

SMALLEST_STRINGS_BYTES = 256
"""Heap bytes that a row of strings gets at least; more by factors of 4."""

DESCRIBED_OUTPUT_BYTES = 1 << 20
"""Output region of a slot where an output's size is only known after the run; more is spilled."""

MAX_SLOT_COUNT = 256
"""Slots of a lane. Most batches of a fast model are small, so slots must be plentiful."""

MIN_SLOT_COUNT = 8

STRINGS = struct.Struct("<QQ")
"""A row of strings: where in the slot's input region they lie, serialised, and their bytes."""

DESCRIPTOR = struct.Struct(f"<II{MAX_RANK}qQQ")  # rank, is it spilled, dims, offset, nbytes
ERROR_LENGTH = struct.Struct("<I")
_RANKED = 1 + MAX_RANK  # what an input of unknown rank takes in a slot's record

Dims = tuple[tuple[int, ...] | None, ...]
"""For each input the dims of one row (all dims of an input without rows); None: it is left out."""


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
        row_bytes: bytes of one row; of a row of strings, those of its record.
        offset: from the begin of the slot's region.
        has_rows: the batch is its first dim; otherwise it is there once, whatever the rows.
        starts: of an output of strings, where each row begins and the last one ends.
    """

    spec: TensorSpec
    inner: tuple[int, ...]
    row_bytes: int
    offset: int
    has_rows: bool = True
    starts: tuple[int, ...] = ()

    def dims(self, rows: int) -> tuple[int, ...]:
        """The tensor's dims in a batch of so many rows."""
        return (rows, *self.inner) if self.has_rows else self.inner

    def span(self, start: int, rows: int) -> tuple[int, int]:
        """Where these rows begin and end in the slot's region."""
        if self.starts:
            return self.starts[start], self.starts[start + rows]
        begin = self.offset + start * self.row_bytes
        return begin, begin + rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class SlotShape:
    """The layout of a slot whose rows have given dims.

    ``outputs`` is None when the worker describes the outputs in the head of the slot's output region:
    a shape is only known after the run, or they are larger than a slot may be.
    """

    dims: Dims
    capacity: int
    inputs: tuple[Placement, ...]
    input_bytes: int
    outputs: tuple[Placement, ...] | None
    output_bytes: int


def head_bytes(outputs: int) -> int:
    """Bytes of the head of an output region: descriptors, or a length and an error text."""
    return align(max(DESCRIPTOR.size * outputs, ERROR_LENGTH.size + ERROR_BYTES))


def has_rows(signature: Signature, spec: TensorSpec) -> bool:
    """Whether the first dim of this tensor is the batch."""
    return signature.is_batched and not spec.optional


def shape_of(
    signature: Signature, dims: Dims, capacity: int, *, is_described: bool = False
) -> SlotShape:
    """Lay out a slot for rows of these dims.

    Args:
        signature: the model's.
        dims: dims of a row of each input, in the signature's order, that match it.
        capacity: rows the slot holds.
        is_described: the worker is to describe the outputs, known or not.
    """
    present = [
        (spec, inner, has_rows(signature, spec))
        for spec, inner in zip(signature.inputs, dims, strict=True)
        if inner is not None
    ]
    inputs, input_bytes = _place(present, capacity, 0)
    head = head_bytes(len(signature.outputs))
    known = None if is_described else _resolve_outputs(signature, dims)
    if known is None:
        return SlotShape(dims, capacity, inputs, input_bytes, None, head + DESCRIBED_OUTPUT_BYTES)
    batched = signature.is_batched
    outputs, output_bytes = _place(
        [(spec, inner, batched) for spec, inner in zip(signature.outputs, known, strict=True)],
        capacity,
        head,
    )
    return SlotShape(dims, capacity, inputs, input_bytes, outputs, output_bytes)


def slot_shape(signature: Signature, dims: Dims, lane_bytes: int) -> SlotShape | None:
    """The layout of a front end's slots for these dims; None where not even one row fits a lane.

    A slot holds `max_batch_size` rows, fewer where rows are very large. Outputs of which not one row
    fits are left to be described, and so spilled.

    Args:
        signature: the model's.
        dims: dims of a row of each input.
        lane_bytes: budget of a lane's inputs, and of its outputs; strings have one of their own.
    """
    one = shape_of(signature, dims, 1)
    row_bytes = sum(p.row_bytes for p in one.inputs)
    output_bytes = sum(p.row_bytes for p in one.outputs or ())
    is_described = one.outputs is None
    if output_bytes > lane_bytes:
        is_described, limit = True, 1
    else:
        limit = lane_bytes // max(row_bytes, output_bytes, 1)
    capacity = min(signature.max_batch_size or 1, limit)
    if signature.allowed_batch_sizes:
        capacity = max((n for n in signature.allowed_batch_sizes if n <= capacity), default=0)
    if capacity == 0 or row_bytes > lane_bytes:
        return None
    return shape_of(signature, dims, capacity, is_described=is_described)


def string_heap(row_bytes: int, capacity: int, lane_bytes: int) -> int:
    """Heap of a slot whose rows have so many bytes of strings: a size class, at most a lane's budget.

    The strings of one request always fit: `max_request_bytes` is at most `lane_bytes`.
    """
    return min(size_class(row_bytes, SMALLEST_STRINGS_BYTES) * capacity, lane_bytes)


def lane_spec(
    signature: Signature, shape: SlotShape, string_bytes: int, lane_bytes: int
) -> LaneSpec:
    """The lane that holds slots of this shape.

    A model with fixed dims gets slots of exactly its size; with variable ones, slots of a size class,
    so that similar shapes share a lane. Slots come from a byte budget.
    """
    input_bytes = shape.input_bytes + string_bytes
    output_bytes = shape.output_bytes
    if not has_fixed_dims(signature):
        input_bytes = output_bytes = size_class(max(input_bytes, output_bytes))
    slot_bytes = max(LINE, input_bytes, output_bytes)
    slot_count = max(MIN_SLOT_COUNT, min(MAX_SLOT_COUNT, lane_bytes // slot_bytes))
    return LaneSpec(slot_count, max(LINE, input_bytes), output_bytes, record_dims(signature))


def size_class(nbytes: int, smallest: int = SMALLEST_CLASS_BYTES) -> int:
    """The smallest ``smallest * 4**k`` that holds so many bytes."""
    size = smallest
    while size < nbytes:
        size *= 4
    return size


def has_fixed_dims(signature: Signature) -> bool:
    """Whether every dim but the batch is fixed, in inputs and outputs, and none holds strings."""
    skip = int(signature.is_batched)
    return all(
        spec.shape is not None
        and spec.datatype.numpy is not None
        and not spec.optional
        and all(isinstance(dim, int) for dim in spec.shape[skip:])
        for spec in (*signature.inputs, *signature.outputs)
    )


def unknown_output(signature: Signature) -> str | None:
    """The first output whose shape cannot be told from the inputs' shapes; None if there is none."""
    symbols = {
        symbol
        for spec in signature.inputs
        if spec.shape is not None and not spec.optional
        for symbol in inner_of(signature, spec)
        if isinstance(symbol, str)
    }
    for spec in signature.outputs:
        dims = (None,) if spec.shape is None else inner_of(signature, spec)
        if any(dim is None or (isinstance(dim, str) and dim not in symbols) for dim in dims):
            return spec.name
    return None


def record_dims(signature: Signature) -> int:
    """Numbers in a slot's record, see `flatten`."""
    return 1 + sum(
        int(spec.optional) + (_RANKED if spec.shape is None else len(inner_of(signature, spec)))
        for spec in signature.inputs
    )


def flatten(signature: Signature, shape: SlotShape) -> tuple[int, ...]:
    """A slot's record: whether the outputs are described, and every input's dims.

    An optional input has a 1 or 0 before its dims, one of unknown rank its rank, and room for the most.
    """
    flat = [int(shape.outputs is None)]
    for spec, inner in zip(signature.inputs, shape.dims, strict=True):
        if spec.optional:
            flat.append(int(inner is not None))
        if spec.shape is None:
            known = inner or ()
            flat += (len(known), *known, *(0 for _ in range(MAX_RANK - len(known))))
        else:
            flat += (0 for _ in spec.shape) if inner is None else inner
    return tuple(flat)


def unflatten(signature: Signature, flat: Sequence[int]) -> tuple[bool, Dims]:
    """The inverse of `flatten`: whether outputs are described, and the dims of each input."""
    dims: list[tuple[int, ...] | None] = []
    at = 1
    for spec in signature.inputs:
        is_present = True
        if spec.optional:
            is_present, at = bool(flat[at]), at + 1
        if spec.shape is None:
            inner, room = tuple(flat[at + 1 : at + 1 + flat[at]]), _RANKED
        else:
            room = len(inner_of(signature, spec))
            inner = tuple(flat[at : at + room])
        dims.append(inner if is_present else None)
        at += room
    return bool(flat[0]), tuple(dims)


def _place(
    tensors: Iterable[tuple[TensorSpec, tuple[int, ...], bool]], capacity: int, offset: int
) -> tuple[tuple[Placement, ...], int]:
    placed: list[Placement] = []
    for spec, inner, in_rows in tensors:
        is_text = spec.datatype.numpy is None
        row_bytes = STRINGS.size if is_text else spec.datatype.itemsize * element_count(inner)
        placed.append(Placement(spec, inner, row_bytes, offset, in_rows))
        offset += align(row_bytes * (capacity if in_rows else 1))
    return tuple(placed), offset


def inner_of(signature: Signature, spec: TensorSpec) -> Shape:
    """The declared dims of a row of an input or output whose rank is known."""
    shape = spec.shape or ()
    return shape[1:] if has_rows(signature, spec) else shape


def _resolve_outputs(signature: Signature, dims: Dims) -> list[tuple[int, ...]] | None:
    """Dims of a row of each output, told from the symbols that the inputs bind; None if not all."""
    if signature.describes_outputs:
        return None
    symbols: dict[str, int] = {}
    for spec, inner in zip(signature.inputs, dims, strict=True):
        if inner is not None and spec.shape is not None:
            for symbol, value in zip(inner_of(signature, spec), inner, strict=True):
                if isinstance(symbol, str):
                    symbols[symbol] = value
    resolved: list[tuple[int, ...]] = []
    for spec in signature.outputs:
        known = None if spec.shape is None else _known(inner_of(signature, spec), symbols)
        if known is None:
            return None
        resolved.append(known)
    return resolved


def _known(declared: Shape, symbols: Mapping[str, int]) -> tuple[int, ...] | None:
    known = []
    for dim in declared:
        size = symbols.get(dim) if isinstance(dim, str) else dim
        if size is None:
            return None
        known.append(size)
    return tuple(known)
