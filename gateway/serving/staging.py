"""Private memory of a worker, for batches that are not one slot as it lies.

Slots are the batch tensor and are run in place. Two kinds of batch are copied first: those that are padded to
an allowed size, since a worker cannot write the inputs, and those packed from slots of several lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gateway.serving import geometry
from gateway.serving.attached import AttachedLane, Bytes


class Piece(NamedTuple):
    """Rows of a batch: those of one slot."""

    lane: AttachedLane
    slot: int
    rows: int
    shape: geometry.SlotShape


class Staging:
    """Memory laid out like a slot, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._inputs = aligned(0)
        self._outputs = aligned(0)

    @property
    def inputs_at(self) -> int:
        """Address of the inputs."""
        return self._inputs.ctypes.data

    @property
    def outputs_at(self) -> int:
        """Address of the outputs."""
        return self._outputs.ctypes.data

    def reserve(self, shape: geometry.SlotShape) -> bool:
        """Have room for a slot of this shape. True where memory moved: what is bound to it is void."""
        moved = False
        if self._inputs.size < shape.input_bytes:
            self._inputs, moved = aligned(shape.input_bytes), True
        if shape.outputs is not None and self._outputs.size < shape.output_bytes:
            self._outputs, moved = aligned(shape.output_bytes), True
        return moved

    def gather(self, pieces: Sequence[Piece], shape: geometry.SlotShape, padded_rows: int) -> None:
        """Copy the pieces' rows one behind the other, and the first row behind them up to ``padded_rows``.

        Args:
            pieces: of the same dims; several where every input has rows.
            shape: layout of the copy, with room for all.
            padded_rows: of the batch.
        """
        for i, p in enumerate(shape.inputs):
            end = begin = p.offset
            for piece in pieces:
                data = piece.lane.input_bytes(piece.slot, piece.shape.inputs[i], piece.rows)
                end += data.size
                self._inputs[end - data.size : end] = data
            if p.has_rows and p.row_bytes:
                padding = self._inputs[end : begin + padded_rows * p.row_bytes]
                padding.reshape(-1, p.row_bytes)[:] = self._inputs[begin : begin + p.row_bytes]

    def scatter(self, pieces: Iterable[Piece], shape: geometry.SlotShape) -> None:
        """Copy the rows of the outputs back to where each piece's front end looks for them."""
        start = 0
        for piece in pieces:
            with piece.lane.output_region(piece.slot) as region:
                for p, q in zip(shape.outputs or (), piece.shape.outputs or (), strict=True):
                    begin, end = p.span(start, piece.rows)
                    to_begin, to_end = q.span(0, piece.rows)
                    region[to_begin:to_end] = self._outputs[begin:end].data
            start += piece.rows


def aligned(nbytes: int) -> Bytes:
    """Zeroed bytes that begin at a cache line, as slots do."""
    room = np.zeros(nbytes + geometry.LINE, np.uint8)
    skip = -room.ctypes.data % geometry.LINE
    return room[skip : skip + nbytes]
