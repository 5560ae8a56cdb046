"""Slots of a lane as a worker has them: inputs that it has mapped read-only, outputs that it can write."""

from __future__ import annotations

import os

import numpy as np

from gateway.serving import geometry, memory
from gateway.serving.devicememory import Fragment
from gateway.tensors import Signature


class Lane:
    """A lane of one shape; what `gateway.serving.pinning` needs of an attached one, and the writer's side."""

    def __init__(self, signature: Signature, slot_count: int = 8) -> None:
        self.signature = signature
        dims = tuple(
            tuple(dim for dim in geometry.inner_of(signature, spec)) for spec in signature.inputs
        )
        self.shape = geometry.shape_of(signature, dims, signature.max_batch_size)
        self.spec = geometry.lane_spec(signature, self.shape, 0, 1 << 20)
        nbytes = slot_count * self.spec.input_slot_bytes
        fd = memory.create("inputs", nbytes)
        self._written = memory.map_writable(fd, nbytes)
        memory.forbid_new_writers(fd)
        self.inputs = memory.map_read_only(fd, nbytes)
        os.close(fd)
        nbytes = slot_count * self.spec.output_slot_bytes
        fd = memory.create("outputs", nbytes)
        self.outputs = memory.map_writable(fd, nbytes)
        os.close(fd)
        self.spec = geometry.LaneSpec(
            slot_count,
            self.spec.input_slot_bytes,
            self.spec.output_slot_bytes,
            self.spec.dims_per_slot,
        )
        self.inputs_at = memory.address(self.inputs)
        self.outputs_at = memory.address(self.outputs)

    def fill(self, slot: int, arrays: dict[str, np.ndarray]) -> Fragment:
        """Write a batch into a slot, and nonsense where its answers will be."""
        rows = len(next(iter(arrays.values())))
        start = slot * self.spec.input_slot_bytes
        for p in self.shape.inputs:
            raw = np.ascontiguousarray(arrays[p.spec.name]).tobytes()
            self._written[start + p.offset : start + p.offset + len(raw)] = raw
        begin = slot * self.spec.output_slot_bytes
        end = begin + self.spec.output_slot_bytes
        self.outputs[begin:end] = b"\xee" * self.spec.output_slot_bytes
        return Fragment(self.shape, rows, self.inputs_at + start, self.outputs_at + begin)

    def answers(self, slot: int, rows: int) -> list[np.ndarray]:
        """What a slot's outputs hold."""
        region = np.frombuffer(self.outputs, np.uint8)
        start = slot * self.spec.output_slot_bytes
        found = []
        for p in self.shape.outputs or ():
            begin, end = p.span(0, rows)
            raw = region[start + begin : start + end].copy()
            found.append(raw.view(p.spec.datatype.dtype).reshape(p.dims(rows)))
        return found
