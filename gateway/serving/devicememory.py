"""A GPU's memory for one batch, and the copies between it and the slots that the batch is made of.

Each tensor of the batch is in one piece on the GPU; its rows may come from several slots, each of which is
copied straight to its place. Addresses never change: captured graphs and kept bindings hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.serving.cuda import Gpu
from gateway.serving.geometry import Placement, SlotShape, align

SMALLEST_AREA_BYTES = 1 << 20
"""Least memory that is taken of a GPU at a time; more by factors of 2."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """What one sealed slot gives to a batch, by where it lies in this process.

    Attributes:
        shape: the slot's layout; all fragments of a batch have the same dims and know their outputs.
        rows: how many it holds; 1 where the model is not batched.
        inputs_at: address of the slot's input region.
        outputs_at: address of its output region.
    """

    shape: SlotShape
    rows: int
    inputs_at: int
    outputs_at: int


class Workspace:
    """Memory for one batch at a time, of any shape, and the events of its way through the GPU.

    Areas are taken as larger batches come and never given back. Each is at least twice as large as the
    one before, so all together are less than twice the largest, and a layout's place stays what it was.

    Attributes:
        gpu: whose memory it is.
        copied_in, computed, copied_out: events; recorded by `copy_in`, the caller and `copy_out`.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._areas: list[tuple[int, int]] = []  # address and bytes, ascending
        self.copied_in = gpu.event()
        self.computed = gpu.event()
        self.copied_out = gpu.event()

    def place(self, layout: SlotShape) -> tuple[int, int]:
        """Where inputs and outputs of this layout lie, by address.

        Raises:
            CudaError: the GPU has no more memory.
        """
        room = align(layout.input_bytes) + layout.output_bytes
        for at, nbytes in self._areas:
            if room <= nbytes:
                return at, at + align(layout.input_bytes)
        size = max(SMALLEST_AREA_BYTES, 1 << (room - 1).bit_length())
        self._areas.append((self.gpu.allocate(size), size))
        return self.place(layout)

    def copy_in(self, layout: SlotShape, fragments: Sequence[Fragment], rows: int) -> None:
        """Queue the fragments' inputs, and their first row behind them until there are ``rows``.

        Raises:
            CudaError: as of now the queue may hold a part.
        """
        gpu, stream = self.gpu, self.gpu.copy_in_stream
        inputs_at, _ = self.place(layout)
        for to, source, nbytes in _inputs(layout, fragments, inputs_at):
            gpu.copy(to, source, nbytes, stream)
        filled = sum(fragment.rows for fragment in fragments)
        for p in layout.inputs:
            if p.has_rows and p.row_bytes and filled < rows:
                self._repeat_first_row(inputs_at + p.offset, p.row_bytes, filled, rows)
        gpu.record(self.copied_in, stream)

    def _repeat_first_row(self, tensor_at: int, row_bytes: int, filled: int, rows: int) -> None:
        """Queue copies of a tensor's first row to its rows from ``filled`` to ``rows``, doubling them."""
        begin = tensor_at + filled * row_bytes
        source, done = tensor_at, 0
        while done < rows - filled:
            count = min(max(done, 1), rows - filled - done)
            to = begin + done * row_bytes
            self.gpu.copy(to, source, count * row_bytes, self.gpu.copy_in_stream)
            source, done = begin, done + count

    def copy_out(self, layout: SlotShape, fragments: Sequence[Fragment]) -> None:
        """Queue the outputs' way to each fragment's slot, after what `computed` stands for.

        Raises:
            CudaError: as of now the queue may hold a part.
        """
        gpu, stream = self.gpu, self.gpu.copy_out_stream
        gpu.wait_in(stream, self.computed)
        for source, to, nbytes in _outputs(layout, fragments, self.place(layout)[1]):
            gpu.copy(to, source, nbytes, stream)
        gpu.record(self.copied_out, stream)

    def copy_former_outputs(self, layout: SlotShape, fragments: Sequence[Fragment]) -> None:
        """Queue what the slots' outputs hold now: what a run does not write stays that.

        Raises:
            CudaError: as of now the queue may hold a part.
        """
        for to, source, nbytes in _outputs(layout, fragments, self.place(layout)[1]):
            self.gpu.copy(to, source, nbytes, self.gpu.copy_in_stream)
        self.gpu.record(self.copied_in, self.gpu.copy_in_stream)


Piece = tuple[int, int, int]
"""Bytes that lie in one piece on both sides: address on the GPU, address in the slot, how many."""


def _inputs(layout: SlotShape, fragments: Sequence[Fragment], at: int) -> Iterator[Piece]:
    first = 0
    for part in fragments:
        yield from _pieces(layout.inputs, at, part.shape.inputs, part.inputs_at, first, part.rows)
        first += part.rows


def _outputs(layout: SlotShape, fragments: Sequence[Fragment], at: int) -> Iterator[Piece]:
    first, tensors = 0, layout.outputs or ()
    for part in fragments:
        yield from _pieces(tensors, at, part.shape.outputs or (), part.outputs_at, first, part.rows)
        first += part.rows


def _pieces(
    here: Sequence[Placement],
    here_at: int,
    there: Sequence[Placement],
    there_at: int,
    first: int,
    rows: int,
) -> Iterator[Piece]:
    """A slot's part of each tensor: ``rows`` rows from row ``first`` on.

    Of a tensor without rows, what the first slot has is all there is.
    """
    for p, slot in zip(here, there, strict=True):
        skipped, taken = (first, rows) if p.has_rows else (0, int(first == 0))
        if nbytes := taken * p.row_bytes:
            yield here_at + p.offset + skipped * p.row_bytes, there_at + slot.offset, nbytes
