"""A worker's side of a lane: one front end's shared memory, mapped here."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway._kernels import ring
from gateway.serving import geometry, memory, strings

Bytes = npt.NDArray[np.uint8]


class AttachedLane:
    """One front end's lane, mapped into this process."""

    def __init__(self, spec: geometry.LaneSpec, fds: list[int]) -> None:
        control, inputs, outputs, self.bell = fds
        self.spec = spec
        self.control = memory.map_writable(
            control, ring.control_bytes(spec.slot_count, spec.dims_per_slot)
        )
        self.inputs = memory.map_read_only(inputs, spec.slot_count * spec.input_slot_bytes)
        self.outputs = memory.map_writable(outputs, spec.slot_count * spec.output_slot_bytes)
        self.inputs_at = memory.address(self.inputs)
        self.outputs_at = memory.address(self.outputs)
        for fd in (control, inputs, outputs):
            os.close(fd)

    def output_region(self, slot: int) -> memoryview:
        """The slot's output region, writable; release it before the lane is closed."""
        start = slot * self.spec.output_slot_bytes
        return memoryview(self.outputs)[start : start + self.spec.output_slot_bytes]

    def input_bytes(self, slot: int, p: geometry.Placement, rows: int) -> Bytes:
        """A slot's rows of one input, as a view; drop it before the lane is closed."""
        begin, end = p.span(0, rows if p.has_rows else 1)
        return np.frombuffer(
            self.inputs, np.uint8, end - begin, slot * self.spec.input_slot_bytes + begin
        )

    def read_arrays(
        self, slot: int, shape: geometry.SlotShape, rows: int, padded_rows: int
    ) -> dict[str, npt.NDArray[Any]]:
        """A slot's inputs as arrays: views of numbers, copies of strings and of padded batches."""
        arrays = {}
        start = slot * self.spec.input_slot_bytes
        inputs = memoryview(self.inputs)[start : start + self.spec.input_slot_bytes]
        for p in shape.inputs:
            if p.spec.datatype.numpy is None:
                array = strings.read_rows(inputs, p, rows)
            else:
                begin, end = p.span(0, rows if p.has_rows else 1)
                array = np.frombuffer(inputs[begin:end], p.spec.datatype.dtype)
                array = array.reshape(p.dims(rows))
            if p.has_rows and padded_rows > rows:
                array = np.concatenate([array, *[array[:1]] * (padded_rows - rows)])
            arrays[p.spec.name] = array
        return arrays

    def close(self) -> None:
        """Unmap; nothing may still point into the lane."""
        os.close(self.bell)
        for mapping in (self.control, self.inputs, self.outputs):
            mapping.close()
