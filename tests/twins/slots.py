"""Requests and slots in plain Python: the same records and moves as kernels/slots.pyx."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any


class State(enum.Enum):
    NEW = 0
    QUEUED = 1
    PLACED = 2
    ENDED = 3


MOVES = {
    State.NEW: {State.QUEUED, State.PLACED, State.ENDED},
    State.QUEUED: {State.PLACED, State.ENDED},
    State.PLACED: {State.QUEUED, State.ENDED},
    State.ENDED: set(),
}


class ShapeKey:
    def __init__(
        self,
        number: int,
        shape: Any,
        string_bytes: int,
        lane: int,
        takes_mates: bool,
        memory: SlotMemory | None = None,
        dims: tuple[int, ...] = (),
    ):
        self.id = number
        self.shape = shape
        self.capacity = self.limit = shape.capacity
        self.string_bytes = string_bytes
        self.lane = lane
        self.takes_mates = takes_mates
        self.dims = dims
        self.is_bound = shape.outputs is not None
        self.cursor: Slot | None = None


class Slot:
    def __init__(self, lane: int, index: int):
        self.lane, self.index = lane, index
        self.key: ShapeKey | None = None
        self.clear()

    def clear(self) -> None:
        self.requests: list[Request] = []
        self.rows = self.string_bytes = self.deaths = self.last_owner = 0
        self.awaits_judgement = False


class Intake:
    def __init__(self, bound: int):
        self.bound = bound
        self.in_flight = self.receiving = 0
        self.has_queue = False
        self.is_open = True


class Request:
    def __init__(
        self,
        key: ShapeKey,
        rows: int,
        level: int,
        arrived_ns: int,
        deadline_ns: int,
        due_ns: int = 0,
    ):
        self.key, self.rows, self.level = key, rows, level
        self.arrived_ns, self.deadline_ns, self.due_ns = arrived_ns, deadline_ns, due_ns
        self.slot: Slot | None = None
        self.start = self.blame = 0
        self.solo = not key.takes_mates
        self.state = State.NEW

    def move(self, state: State) -> None:
        if state not in MOVES[self.state]:
            raise RuntimeError(state)
        self.state = state


class SlotMemory:
    def __init__(
        self,
        producer: Any,
        inputs: Any,
        outputs: Any,
        input_slot_bytes: int,
        output_slot_bytes: int,
    ):
        self._views = memoryview(inputs), memoryview(outputs)
        if self._views[0].readonly:
            raise BufferError("not writable")

    def answer(self, slot: Slot, started_ns: int, finished_ns: int) -> Sequence[Request]:
        return [request for request in slot.requests if request.state is State.PLACED]

    def close(self) -> None:
        for view in self._views:
            view.release()
