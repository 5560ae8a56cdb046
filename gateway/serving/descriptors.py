"""What a worker writes at the head of a slot's output region: an error text, or its outputs' shapes.

Read by front ends, which trust none of it: every number is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway import bytestrings
from gateway.serving.geometry import DESCRIPTOR, ERROR_BYTES, ERROR_LENGTH, Placement
from gateway.tensors import MAX_RANK, Signature, element_count


def write_error(region: memoryview, text: str) -> None:
    """Put an error text at the head of an output region, cut to `ERROR_BYTES`."""
    encoded = text.encode("utf-8", "replace")[:ERROR_BYTES]
    ERROR_LENGTH.pack_into(region, 0, len(encoded))
    region[ERROR_LENGTH.size : ERROR_LENGTH.size + len(encoded)] = encoded


def read_error(region: memoryview) -> str:
    """The error text at the head of an output region, which another process wrote: not trusted."""
    (length,) = ERROR_LENGTH.unpack_from(region, 0)
    start = ERROR_LENGTH.size
    return bytes(region[start : start + min(length, ERROR_BYTES)]).decode("utf-8", "replace")


def write_descriptors(
    region: memoryview,
    outputs: Iterable[tuple[tuple[int, ...], int, int]],
    *,
    is_spilled: bool = False,
) -> None:
    """Describe outputs as (dims, offset, nbytes) each; offsets into the region, or the spill."""
    for i, (dims, offset, nbytes) in enumerate(outputs):
        padded = (*dims, *(0 for _ in range(MAX_RANK - len(dims))))
        at = i * DESCRIPTOR.size
        DESCRIPTOR.pack_into(region, at, len(dims), is_spilled, *padded, offset, nbytes)


def is_spilled(region: memoryview) -> bool:
    """Whether the descriptors in an output region point into a spill."""
    return bool(DESCRIPTOR.unpack_from(region, 0)[1])


def read_descriptors(
    head: memoryview, data: memoryview, signature: Signature, rows: int
) -> tuple[Placement, ...] | None:
    """Outputs that a worker described, or None where it described nonsense.

    Every number is checked against the data, the datatype and the rows: another process wrote them.

    Args:
        head: the slot's output region, with the descriptors.
        data: what their offsets point into: the same region, or the spill.
        signature: the model's.
        rows: of the batch.
    """
    placements: list[Placement] = []
    batched = signature.is_batched
    for i, spec in enumerate(signature.outputs):
        rank, _, *rest = DESCRIPTOR.unpack_from(head, i * DESCRIPTOR.size)
        dims, (offset, nbytes) = tuple(rest[:MAX_RANK][:rank]), rest[MAX_RANK:]
        if rank > MAX_RANK or min(dims, default=0) < 0 or offset + nbytes > len(data):
            return None
        if batched and dims[:1] != (rows,):
            return None
        inner = dims[1:] if batched else dims
        starts: tuple[int, ...] = ()
        if spec.datatype.numpy is None:
            found = _string_rows(data, offset, nbytes, element_count(inner), rows)
            if found is None:
                return None
            starts, row_bytes = found, 0
        elif nbytes != element_count(dims) * spec.datatype.itemsize:
            return None
        else:
            row_bytes = nbytes // rows
        placements.append(Placement(spec, inner, row_bytes, offset, batched, starts))
    return tuple(placements)


def _string_rows(
    data: memoryview, offset: int, nbytes: int, per_row: int, rows: int
) -> tuple[int, ...] | None:
    """Where each row of serialised strings begins and the last ends; None: they are not that."""
    starts = [offset]
    end = offset + nbytes
    if rows * per_row * bytestrings.PREFIX_BYTES > nbytes:
        return None
    try:
        for _ in range(rows):
            starts.append(bytestrings.skip(data[:end], per_row, starts[-1]))
    except ValueError:
        return None
    return tuple(starts) if starts[-1] == end else None
