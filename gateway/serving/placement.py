"""Which slot a request goes into: lanes, shapes, and the open slot of each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from mmap import mmap
from types import MappingProxyType

from gateway._kernels.ring import Producer
from gateway.errors import TooLarge, Unavailable
from gateway.protocols.call import InferCall
from gateway.serving import geometry
from gateway.serving.lane import Lane
from gateway.serving.packing import string_bytes
from gateway.serving.padding import Padder
from gateway.serving.request import ShapeKey, Slot, Submission
from gateway.tensors import Signature

MAX_SHAPES = 4096
"""Shapes that are remembered before numbering begins anew; clients choose them."""

_NO_LENGTHS: Mapping[str, int] = MappingProxyType({})


class Placement:
    """The lanes of one version in one front end, and where the next row goes.

    Args:
        signature: the model's.
        lane_bytes: budget of a lane.
        board: mapping of the version's board.
        on_lane: called with each new lane.
        wake: has a worker woken, now or soon, for rows that it could seal.
    """

    def __init__(
        self,
        signature: Signature,
        lane_bytes: int,
        board: mmap,
        on_lane: Callable[[Lane], None],
        wake: Callable[[Producer], object] = Producer.wake,
    ) -> None:
        self.lanes: list[Lane] = []  # by number
        self._signature = signature
        self._lane_bytes = lane_bytes
        self._board = board
        self._on_lane = on_lane
        self._wake = wake
        self._padder = Padder(signature)
        self._is_padded = bool(signature.padding)
        self._inputs = [
            (spec.name, int(geometry.has_rows(signature, spec))) for spec in signature.inputs
        ]
        self._has_strings = any(spec.datatype.numpy is None for spec in signature.inputs)
        self._keys: dict[tuple[geometry.Dims, int], ShapeKey] = {}
        self._next_shape_id = 0
        self._cursors: dict[int, Slot] = {}  # by shape id; each key knows its own
        self._complete: set[Slot] = set()  # unsealed as far as known, and nothing more joins

    def fit(self, call: InferCall) -> tuple[ShapeKey, Mapping[str, int]]:
        """The shape of a call, after padding; makes its lane on first use.

        Returns:
            It, and the lengths that padding changes, by symbol.

        Raises:
            TooLarge: its rows do not fit the budget of a lane.
            Unavailable: there is no memory for another lane now.
        """
        shapes = {tensor.name: tensor.shape for tensor in call.inputs}
        dims: geometry.Dims = tuple(
            shapes[name][skip:] if name in shapes else None for name, skip in self._inputs
        )
        lengths: Mapping[str, int] = _NO_LENGTHS
        if self._is_padded:
            dims, lengths = self._padder.raise_dims(dims)
        row_strings = 0
        if self._has_strings:
            longest = -(-string_bytes(call) // call.rows)
            row_strings = geometry.size_class(longest, geometry.SMALLEST_STRINGS_BYTES)
        key = self._keys.get((dims, row_strings)) or self._learn(dims, row_strings)
        if call.rows > key.shape.capacity:
            raise TooLarge(
                f"lane_bytes ({self._lane_bytes}) holds {key.shape.capacity} rows of this shape, "
                f"the request has {call.rows}: send fewer at once"
            )
        return key, lengths

    def place(self, request: Submission, max_complete: int) -> bool:
        """Put the request into a slot and wake a worker; False when it has to wait.

        Args:
            request: of a shape that `fit` found.
            max_complete: complete slots that may lie ready for the workers.

        Raises:
            InvalidRequest: its data do not decode.
        """
        key = request.key
        lane = self.lanes[key.lane]
        cursor = key.cursor
        if cursor is not None and not request.solo:
            fits = cursor.rows + request.rows <= key.limit
            if fits and key.string_bytes:
                fits = cursor.string_bytes + request.string_bytes <= key.string_bytes
            if fits and lane.append(cursor, request):
                self._wake(lane.producer)
                return True
            self._close(lane, cursor)
        if len(self._complete) >= max_complete:
            self.unsealed()
            if len(self._complete) >= max_complete:
                return False
        if not lane.has_free_slot():
            return False
        slot = lane.open(request)
        key.limit = min(key.capacity, lane.producer.best_rows() or key.capacity)
        if request.solo or slot.rows >= key.limit:
            self._complete_slot(lane, slot)
        else:
            key.cursor = slot
            self._cursors[key.id] = slot
        self._wake(lane.producer)
        return True

    def take_out(self, request: Submission) -> bool:
        """Drop a placed request from its slot; False when a worker has it."""
        slot = request.slot
        if slot is None or not self.lanes[slot.lane].drop(slot, request):
            return False
        if slot.rows == 0:
            self._forget(slot)
        else:
            self.lanes[slot.lane].producer.wake()
        return True

    def is_unsealed(self, request: Submission) -> bool:
        """Whether a placed request is out of every worker's hands."""
        slot = request.slot
        return slot is not None and self.lanes[slot.lane].is_unsealed(slot)

    def retry(self, slot: Slot) -> None:
        """Have a slot whose worker is dead run by another."""
        lane = self.lanes[slot.lane]
        lane.producer.retry(slot.index)
        self._forget(slot)
        self._complete.add(slot)
        lane.producer.wake()

    def release(self, slot: Slot) -> None:
        """Free a slot that is done with."""
        self._forget(slot)
        self.lanes[slot.lane].release(slot)

    def unsealed(self) -> list[Slot]:
        """Slots that no worker has taken, after a look; forgets the others."""
        self._complete = {s for s in self._complete if self.lanes[s.lane].is_unsealed(s)}
        for slot in list(self._cursors.values()):
            if not self.lanes[slot.lane].is_unsealed(slot):
                self._drop_cursor(slot.key)
        return [*self._complete, *self._cursors.values()]

    def close(self) -> None:
        """Give back every lane."""
        for lane in self.lanes:
            lane.close()
        self.lanes.clear()

    def _learn(self, dims: geometry.Dims, row_strings: int) -> ShapeKey:
        if len(self._keys) >= MAX_SHAPES:
            self._keys.clear()  # ids go on: a worker never sees one with two meanings
        signature = self._signature
        shape = geometry.slot_shape(signature, dims, self._lane_bytes)
        if shape is None:
            raise TooLarge(
                f"one row of this shape does not fit lane_bytes ({self._lane_bytes}), "
                f"as inputs or as outputs"
            )
        heap = 0
        if row_strings:
            heap = geometry.string_heap(row_strings, shape.capacity, self._lane_bytes)
        spec = geometry.lane_spec(signature, shape, heap, self._lane_bytes)
        lane = next((lane for lane in self.lanes if lane.spec == spec), None)
        if lane is None:
            lane = self._make_lane(spec)
        # An optional input is there once in a batch, so it can be of one request only.
        takes_mates = signature.is_batched and all(p.has_rows for p in shape.inputs)
        key = self._keys[dims, row_strings] = ShapeKey(
            self._next_shape_id,
            shape,
            heap,
            lane.number,
            takes_mates,
            lane.memory,
            geometry.flatten(signature, shape),
        )
        self._next_shape_id += 1
        return key

    def _make_lane(self, spec: geometry.LaneSpec) -> Lane:
        try:
            lane = Lane(len(self.lanes), spec, self._signature, self._padder, self._board)
        except OSError as error:
            raise Unavailable(
                f"no shared memory for requests of this shape: {error.strerror}"
            ) from None
        self.lanes.append(lane)
        lane.producer.arm()
        self._on_lane(lane)
        return lane

    def _close(self, lane: Lane, slot: Slot) -> None:
        """Nothing more joins the open slot, also when a cancelled request leaves room in it."""
        self._drop_cursor(slot.key)
        self._complete_slot(lane, slot)
        if slot.rows < slot.key.capacity:
            lane.producer.wake()  # a worker may be holding it for more

    def _complete_slot(self, lane: Lane, slot: Slot) -> None:
        lane.producer.complete(slot.index)
        self._complete.add(slot)

    def _drop_cursor(self, key: ShapeKey) -> None:
        key.cursor = None
        del self._cursors[key.id]

    def _forget(self, slot: Slot) -> None:
        self._complete.discard(slot)
        if slot.key.cursor is slot:
            self._drop_cursor(slot.key)
