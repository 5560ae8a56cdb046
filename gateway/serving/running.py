"""Runs sealed slots: learns what a shape means, binds, runs, leaves outputs where they are looked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from gateway import bytestrings
from gateway._kernels import ring
from gateway.clock import monotonic_ns
from gateway.serving import descriptors, geometry, memory, spill
from gateway.serving.attached import AttachedLane
from gateway.serving.channel import Channel
from gateway.serving.costs import MAX_SHAPES as MAX_COSTS
from gateway.serving.costs import Arrivals, Cost, Recent
from gateway.serving.loader import Loaded
from gateway.serving.session import Array, RunError
from gateway.serving.staging import Piece, Staging
from gateway.tensors import MAX_RANK

MAX_BINDINGS = 2048
"""Cached bindings; bounds memory (a few kB each). Beyond it the least recently used is made again."""

MAX_SHAPES = 4096
"""Shapes that are remembered of a lane; clients choose them."""

_TOO_SMALL = "this request's shape does not fit its slot of shared memory"

LaneKey = tuple[int, int]
"""A lane in this process: the descriptor of its front end's channel, and its number there."""


@dataclass(slots=True)
class KnownShape:
    """What a worker knows of a lane's shape id.

    Attributes:
        shape: the layout of its slots.
        cost: of runs, shared by every lane's shapes of these dims.
        row_bytes: of a row's inputs and outputs; 0: slots of it are not run together with others.
        arrivals: of its rows in this lane.
    """

    shape: geometry.SlotShape
    cost: Cost
    row_bytes: int
    arrivals: Arrivals = field(default_factory=Arrivals)


class Runner:
    """The model and the lanes whose slots it runs.

    Args:
        loaded: the model.
        consumer: the worker's.
        lanes: those attached; the worker adds and removes them.
        channels: to front ends, by descriptor.
        max_answer_bytes: most bytes of outputs that do not fit a slot.
    """

    def __init__(
        self,
        loaded: Loaded,
        consumer: ring.Consumer,
        lanes: Mapping[LaneKey, AttachedLane],
        channels: Mapping[int, Channel],
        max_answer_bytes: int,
    ) -> None:
        self._session = loaded.session
        self._signature = loaded.signature
        self._has_strings = any(s.datatype.numpy is None for s in loaded.signature.inputs)
        self._consumer = consumer
        self._lanes = lanes
        self._channels = channels
        self._max_answer_bytes = max_answer_bytes
        self._shapes: dict[LaneKey, dict[int, KnownShape]] = {}
        self._costs: Recent[tuple[geometry.Dims, bool], Cost] = Recent(MAX_COSTS, Cost.forget)
        self._staging = Staging()
        kept = MAX_BINDINGS if loaded.session.is_in_place else 0
        self._binding = lru_cache(maxsize=kept)(self._make_binding)
        self._packed_binding = lru_cache(maxsize=kept)(self._make_packed_binding)
        self.padded = Cost(loaded.signature.allowed_batch_sizes).padded

    def forget(self, key: LaneKey) -> None:
        """Drop all that points into a lane, which is about to be unmapped."""
        self._shapes.pop(key, None)
        self._forget_bindings()

    def known(self, key: LaneKey, shape_id: int) -> KnownShape | None:
        """The shape of a slot, if one of it was run before."""
        shapes = self._shapes.get(key)
        return None if shapes is None else shapes.get(shape_id)

    def learn(self, key: LaneKey, slot: int, shape_id: int, capacity: int) -> KnownShape:
        """The shape of a sealed slot whose id was not seen before. RunError: it cannot be right."""
        lane, signature = self._lanes[key], self._signature
        shapes = self._shapes.setdefault(key, {})
        if len(shapes) >= MAX_SHAPES:
            shapes.clear()  # ids are never used twice; what is still in use is learned again
            self._forget_bindings()
        flat = self._consumer.dims(key, slot)
        is_described, dims = geometry.unflatten(signature, flat)
        shape = geometry.shape_of(signature, dims, capacity, is_described=is_described)
        if (
            shape.input_bytes > lane.spec.input_slot_bytes
            or shape.output_bytes > lane.spec.output_slot_bytes
        ):
            raise RunError(_TOO_SMALL)
        alike = dims, shape.outputs is None
        cost = self._costs.get(alike) or self._costs.put(alike, Cost(signature.allowed_batch_sizes))
        known = KnownShape(shape, cost, self._packed_row_bytes(shape))
        shapes[shape_id] = known
        return known

    def recommended_rows(self) -> int:
        """The rows at which a batch is at its best, whatever its shape; 0: unknown of one of them."""
        best = [cost.best_rows for cost in self._costs.values()]
        return max(best, default=0) if all(best) else 0

    def run(self, key: LaneKey, slot: int, rows: int, shape_id: int, known: KnownShape) -> int:
        """Run a sealed slot's rows and leave the outputs where its front end looks for them.

        Returns:
            The rows that ran, those made up for padding included.

        Raises:
            RunError: the model failed on them.
        """
        shape = known.shape
        padded_rows = self.padded(rows)
        if self._has_strings:
            arrays = self._lanes[key].read_arrays(slot, shape, rows, padded_rows)
            outputs = self._session.run_arrays(arrays)
        else:
            is_staged = padded_rows > rows
            if is_staged:
                self._stage([Piece(self._lanes[key], slot, rows, shape)], shape, padded_rows)
            if shape.outputs is not None:
                self._session.run(self._binding(key, slot, padded_rows, shape_id, is_staged))
                return padded_rows
            binding = self._make_binding(key, slot, padded_rows, shape_id, is_staged)
            self._session.run(binding)
            outputs = self._session.unbound_outputs(binding)
        if padded_rows > rows:
            outputs = [array[:rows] for array in outputs]
        self._hand_over(key, slot, outputs)
        return padded_rows

    def run_together(self, pieces: Sequence[Piece]) -> tuple[int, int]:
        """Run the rows of several sealed slots of the same dims, by way of private memory.

        Returns:
            The rows that ran, those made up for padding included, and how many ns that took without the
            copies.

        Raises:
            RunError: the model failed on them, or on some of them.
        """
        shape = pieces[0].shape
        padded_rows = self.padded(sum(piece.rows for piece in pieces))
        self._stage(pieces, shape, padded_rows)
        binding = self._packed_binding(shape, padded_rows)
        started_ns = monotonic_ns()
        self._session.run(binding)
        run_ns = monotonic_ns() - started_ns
        self._staging.scatter(pieces, shape)
        return padded_rows, run_ns

    def _stage(self, pieces: Sequence[Piece], shape: geometry.SlotShape, padded_rows: int) -> None:
        if self._staging.reserve(shape):
            self._forget_bindings()
        self._staging.gather(pieces, shape, padded_rows)

    def _forget_bindings(self) -> None:
        self._binding.cache_clear()
        self._packed_binding.cache_clear()

    def _packed_row_bytes(self, shape: geometry.SlotShape) -> int:
        """Bytes of a row where slots of this shape may be run together; otherwise 0."""
        is_plain = self._signature.is_batched and not self._has_strings
        if not is_plain or shape.outputs is None or not all(p.has_rows for p in shape.inputs):
            return 0
        return sum(p.row_bytes for p in (*shape.inputs, *shape.outputs))

    def _make_binding(
        self, key: LaneKey, slot: int, rows: int, shape_id: int, is_staged: bool
    ) -> Any:
        lane, staging = self._lanes[key], self._staging
        return self._session.bind(
            self._shapes[key][shape_id].shape,
            rows,
            staging.inputs_at if is_staged else lane.inputs_at + slot * lane.spec.input_slot_bytes,
            lane.outputs_at + slot * lane.spec.output_slot_bytes,
        )

    def _make_packed_binding(self, shape: geometry.SlotShape, rows: int) -> Any:
        staging = self._staging
        return self._session.bind(shape, rows, staging.inputs_at, staging.outputs_at)

    def _hand_over(self, key: LaneKey, slot: int, outputs: Sequence[Array]) -> None:
        """Copy outputs whose size was only known after the run into the slot, or a spill."""
        lane, count = self._lanes[key], len(self._signature.outputs)
        raw = [_raw(array) for array in outputs]
        described, end = [], geometry.head_bytes(count)
        for array, data in zip(outputs, raw, strict=True):
            if array.ndim > MAX_RANK:
                raise RunError(f"an output has {array.ndim} dims, of {MAX_RANK} at most")
            described.append((array.shape, end, len(data)))
            end = geometry.align(end + len(data))
        if end > max(self._max_answer_bytes, lane.spec.output_slot_bytes):
            raise RunError(
                f"the outputs take {end} bytes, max_answer_bytes is {self._max_answer_bytes}"
            )
        with lane.output_region(slot) as region:
            is_spilled = end > len(region)
            descriptors.write_descriptors(region, described, is_spilled=is_spilled)
            if not is_spilled:
                _lay_out(region, described, raw)
                return
        fd = memory.create("spill", end)
        try:
            with memory.map_writable(fd, end) as mapping, memoryview(mapping) as region:
                _lay_out(region, described, raw)
            spill.send(self._channels[key[0]], key[1], slot, fd)
        finally:
            os.close(fd)


def _raw(array: Array) -> bytes | memoryview:
    """An output's bytes in the order of its elements."""
    if array.dtype == object:
        return bytestrings.serialise(array.reshape(-1))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _lay_out(
    region: memoryview,
    described: Sequence[tuple[tuple[int, ...], int, int]],
    raw: Sequence[bytes | memoryview],
) -> None:
    for (_dims, offset, nbytes), data in zip(described, raw, strict=True):
        region[offset : offset + nbytes] = data
