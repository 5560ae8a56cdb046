"""A request between decoding and its answer: what the dispatcher needs of each kind of them.

`Request` and `Slot` are compiled records (`kernels/slots.pyx`). A request's data and its way to be answered
belong to the protocol that it came by: `CallRequest` holds a decoded call and two callbacks, the fast
lane's own kind holds bytes and a connection. The dispatcher, lane and placement see a `Submission`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway._kernels.slots import Intake, Request, ShapeKey, Slot, State
from gateway.errors import GatewayError
from gateway.protocols.call import InferCall, InputTensor, OutputTensor
from gateway.serving import geometry
from gateway.serving.packing import materialise, string_bytes

__all__ = [
    "NO_SHAPE",
    "CallRequest",
    "Intake",
    "OnAnswer",
    "OnError",
    "Request",
    "ShapeKey",
    "Slot",
    "State",
    "Submission",
    "Timing",
]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a request cost, in ns: waiting for its batch's run, and that run."""

    queue_ns: int
    compute_ns: int


NO_SHAPE = ShapeKey(-1, geometry.SlotShape((), 0, (), 0, (), 0), 0, -1, True)


OnAnswer = Callable[[list[OutputTensor], Timing], None]
OnError = Callable[[GatewayError], None]


class SlotWriter(Protocol):
    """What of a lane a request writes itself with."""

    def write_call(self, slot: Slot, call: InferCall, lengths: Mapping[str, int]) -> None:
        """Write a call's rows behind those of the slot."""


class Submission(Protocol):
    """A `Request` of any kind, as the dispatcher sees it.

    It is answered or failed once, unless it is cancelled: then neither.
    """

    key: ShapeKey
    slot: Slot | None
    rows: int
    start: int
    level: int
    blame: int
    solo: bool
    arrived_ns: int
    deadline_ns: int
    due_ns: int
    lengths: Mapping[str, int]
    string_bytes: int

    @property
    def state(self) -> State:
        """Where it is."""

    def move(self, state: State) -> None:
        """The one way to change the state. RuntimeError on an illegal move."""

    def write(self, lane: SlotWriter, slot: Slot) -> None:
        """Write its rows behind those of the slot. InvalidRequest: they do not decode."""

    def materialise(self) -> None:
        """Own its data, decoded: it has to wait. InvalidRequest: they do not decode."""

    def take_back(self, copies: Sequence[InputTensor]) -> None:
        """Own these as its data: its slot is given up."""

    def drop_data(self) -> None:
        """It will not be written again."""

    def answer(self, outputs: list[OutputTensor], timing: Timing) -> None:
        """Answer it. The outputs are views of shared memory that are valid only during the call."""

    def fail(self, error: GatewayError) -> None:
        """Answer it with an error."""


class CallRequest(Request):
    """A decoded call, and who is told how it ends.

    Args:
        call: validated against the signature; its lists are replaced by bytes when it has to queue.
        key: the shape of its rows.
        lengths: by symbolic dim, the length before it was padded.
        level: its place in the queue's order, 0 the highest.
        arrived_ns: monotonic.
        deadline_ns: monotonic end of its time in the queue, 0 for none.
        on_answer: called once with its outputs, unless `on_error` is, or it is cancelled.
        on_error: called once when it failed or expired.
        due_ns: monotonic time by which its answer is wanted, 0 for none.
    """

    __slots__ = ("answer", "call", "fail", "lengths", "string_bytes")

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
        due_ns: int = 0,
    ) -> None:
        super().__init__(key, call.rows, level, arrived_ns, deadline_ns, due_ns)
        self.call = call
        self.lengths = lengths
        self.string_bytes = string_bytes(call) if key.string_bytes else 0
        self.answer = on_answer
        self.fail = on_error

    def write(self, lane: SlotWriter, slot: Slot) -> None:
        """Write its rows behind those of the slot. InvalidRequest: they do not decode."""
        lane.write_call(slot, self.call, self.lengths)

    def materialise(self) -> None:
        """Decode lists into private bytes. InvalidRequest: they do not decode."""
        for tensor in self.call.inputs:
            materialise(tensor)

    def take_back(self, copies: Sequence[InputTensor]) -> None:
        """Own these as its data."""
        self.call.inputs = list(copies)

    def drop_data(self) -> None:
        """It will not be written again."""
        self.call.inputs = []
