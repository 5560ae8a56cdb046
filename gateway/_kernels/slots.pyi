import enum
from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

from gateway._kernels.ring import Producer

class State(enum.Enum):
    NEW = 0
    QUEUED = 1
    PLACED = 2
    ENDED = 3

class ShapeKey:
    id: int
    shape: Any  # serving.geometry.SlotShape, which is of a higher rank
    capacity: int
    limit: int
    string_bytes: int
    lane: int
    takes_mates: bool
    dims: tuple[int, ...]
    is_bound: bool
    cursor: Slot | None
    def __init__(
        self,
        number: int,
        shape: Any,
        string_bytes: int,
        lane: int,
        takes_mates: bool,
        memory: SlotMemory | None = None,
        dims: tuple[int, ...] = (),
    ) -> None: ...

class Slot:
    lane: int
    index: int
    requests: list[Any]  # of the front end's kinds of Request
    rows: int
    string_bytes: int
    key: ShapeKey
    deaths: int
    last_owner: int
    awaits_judgement: bool
    def __init__(self, lane: int, index: int) -> None: ...
    def clear(self) -> None: ...

class Intake:
    in_flight: int
    receiving: int
    bound: int
    has_queue: bool
    is_open: bool
    def __init__(self, bound: int) -> None: ...

class Request:
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
    def __init__(
        self,
        key: ShapeKey,
        rows: int,
        level: int,
        arrived_ns: int,
        deadline_ns: int,
        due_ns: int = 0,
    ) -> None: ...
    @property
    def state(self) -> State: ...
    def move(self, state: State) -> None: ...

class SlotMemory:
    def __init__(
        self,
        producer: Producer,
        inputs: Buffer,
        outputs: Buffer,
        input_slot_bytes: int,
        output_slot_bytes: int,
    ) -> None: ...
    def answer(self, slot: Slot, started_ns: int, finished_ns: int) -> Sequence[Any]: ...
    def close(self) -> None: ...
