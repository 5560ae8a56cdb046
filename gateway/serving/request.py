"""A request between decoding and its answer, and the slot that its rows are in."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gateway.errors import GatewayError
from gateway.protocols.call import InferCall, OutputTensor
from gateway.serving import geometry


class State(enum.Enum):
    """Where a request is. `ENDED` is final: answered, failed, expired or cancelled."""

    NEW = enum.auto()
    QUEUED = enum.auto()  # in the dispatcher's queue, its data private
    PLACED = enum.auto()  # its rows are in a slot
    ENDED = enum.auto()


_MOVES = {
    State.NEW: {State.QUEUED, State.PLACED, State.ENDED},
    State.QUEUED: {State.PLACED, State.ENDED},
    State.PLACED: {State.QUEUED, State.ENDED},  # back to the queue when its slot is split
    State.ENDED: set[State](),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """What a request cost, in ns: waiting for its batch's run, and that run."""

    queue_ns: int
    compute_ns: int


class ShapeKey(NamedTuple):
    """What requests that may share a slot have in common.

    Attributes:
        id: its number, by which workers cache.
        shape: the layout of the slot.
        string_bytes: heap for strings behind the inputs, in each slot.
        lane: number of the lane for it.
        takes_mates: several requests may share a slot.
    """

    id: int
    shape: geometry.SlotShape
    string_bytes: int
    lane: int
    takes_mates: bool


NO_SHAPE = ShapeKey(-1, geometry.SlotShape((), 0, (), 0, (), 0), 0, -1, True)


class Timer(Protocol):
    """What an event loop's ``call_later`` returns."""

    def cancel(self) -> None:
        """Never call it."""


OnAnswer = Callable[[list[OutputTensor], Timing], None]
OnError = Callable[[GatewayError], None]


class Request:
    """One inference request: its data, its place, and who is told how it ends.

    Exactly one of `on_answer` and `on_error` is called, once, unless the request is cancelled: then
    neither. `on_answer` gets views of shared memory that are valid only during the call.

    Args:
        call: validated against the signature; its lists are replaced by bytes when it has to queue.
        key: the shape of its rows.
        lengths: by symbolic dim, the length before it was padded.
        level: its place in the queue's order, 0 the highest.
        arrived_ns: monotonic.
        deadline_ns: monotonic end of its time in the queue, 0 for none.
    """

    __slots__ = (
        "arrived_ns",
        "blame",
        "call",
        "deadline_ns",
        "key",
        "lengths",
        "level",
        "on_answer",
        "on_error",
        "rows",
        "slot",
        "solo",
        "start",
        "state",
        "timer",
    )

    def __init__(
        self,
        call: InferCall,
        key: ShapeKey,
        lengths: Mapping[str, int],
        level: int,
        arrived_ns: int,
        deadline_ns: int,
        on_answer: OnAnswer,
        on_error: OnError,
    ) -> None:
        self.call = call
        self.key = key
        self.lengths = lengths
        self.level = level
        self.rows = call.rows
        self.arrived_ns = arrived_ns
        self.deadline_ns = deadline_ns
        self.on_answer = on_answer
        self.on_error = on_error
        self.state = State.NEW
        self.slot: Slot | None = None
        self.timer: Timer | None = None
        self.start = 0  # first row within the slot
        self.solo = not key.takes_mates  # also once it was in a batch that failed
        self.blame = 0  # workers that died of running it alone

    def move(self, state: State) -> None:
        """The one place where the state changes. RuntimeError on an illegal move."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"a request cannot go from {self.state.name} to {state.name}")
        self.state = state

    def end(self) -> None:
        """The last move; stops the deadline's timer."""
        self.move(State.ENDED)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Slot:
    """A front end's mirror of a slot: the requests that its rows belong to, in their order.

    ``lane`` is the number of its lane, ``index`` its place there.
    """

    __slots__ = (
        "awaits_judgement",
        "deaths",
        "index",
        "key",
        "lane",
        "last_owner",
        "requests",
        "rows",
        "string_bytes",
    )

    def __init__(self, lane: int, index: int) -> None:
        self.lane = lane
        self.index = index
        self.requests: list[Request] = []
        self.rows = 0
        self.string_bytes = 0  # of the heap that are taken, by requests that left as well
        self.key = NO_SHAPE
        self.deaths = 0  # workers that died holding these rows
        self.last_owner = 0  # the last of them
        self.awaits_judgement = False  # of how that one died

    def clear(self) -> None:
        """Forget the requests."""
        self.requests = []
        self.rows = self.string_bytes = 0
        self.deaths = self.last_owner = 0
        self.awaits_judgement = False
