"""A request between decoding and its answer, and the slot that its rows are in."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
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
    """A shape, its number, by which workers cache, and the number of the lane for it."""

    id: int
    shape: geometry.Shape
    lane: int


NO_SHAPE = ShapeKey(-1, geometry.Shape((), 0, (), 0, (), 0), -1)


class Timer(Protocol):
    """What an event loop's ``call_later`` returns."""

    def cancel(self) -> None:
        """Never call it."""


OnAnswer = Callable[[Sequence[OutputTensor], Timing], None]
OnError = Callable[[GatewayError], None]


class Request:
    """One inference request: its data, its place, and who is told how it ends.

    Exactly one of `on_answer` and `on_error` is called, once, unless the request is cancelled: then
    neither. `on_answer` gets views of shared memory that are valid only during the call.

    Args:
        call: validated against the signature; its lists are replaced by bytes when it has to queue.
        key: the shape of its rows.
        arrived_ns: monotonic.
        deadline_ns: monotonic end of its time in the queue, 0 for none.
    """

    __slots__ = (
        "arrived_ns",
        "blame",
        "call",
        "deadline_ns",
        "key",
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
        arrived_ns: int,
        deadline_ns: int,
        on_answer: OnAnswer,
        on_error: OnError,
    ) -> None:
        self.call = call
        self.key = key
        self.rows = call.rows
        self.arrived_ns = arrived_ns
        self.deadline_ns = deadline_ns
        self.on_answer = on_answer
        self.on_error = on_error
        self.state = State.NEW
        self.slot: Slot | None = None
        self.timer: Timer | None = None
        self.start = 0  # first row within the slot
        self.solo = False  # takes no mates: it was in a batch that failed
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
    )

    def __init__(self, lane: int, index: int) -> None:
        self.lane = lane
        self.index = index
        self.requests: list[Request] = []
        self.rows = 0
        self.key = NO_SHAPE
        self.deaths = 0  # workers that died holding these rows
        self.last_owner = 0  # the last of them
        self.awaits_judgement = False  # of how that one died

    def clear(self) -> None:
        """Forget the requests."""
        self.requests = []
        self.rows = 0
        self.deaths = self.last_owner = 0
        self.awaits_judgement = False
