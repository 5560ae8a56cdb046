from asyncio import AbstractEventLoop, BaseTransport, BufferedProtocol, Transport
from typing import Any, Final

from gateway._kernels.ledger import RequestCounters
from gateway._kernels.ring import Producer
from gateway._kernels.slots import ShapeKey

MAX_PIECES: Final[int]
FROM_TAIL: Final[int]
FROM_BIN: Final[int]
FROM_NUMBERS: Final[int]
NUMBERS: Final[int]
BIN: Final[int]
ID: Final[int]

class Burst:
    def __init__(self, call_soon: Any, may_linger: bool = False) -> None: ...
    def listen(self, producer: Producer, on_report: Any) -> None: ...
    def wake(self, producer: Producer) -> None: ...
    def end(self) -> None: ...

class Template:
    key: ShapeKey
    def __init__(
        self,
        key: ShapeKey,
        rows: int,
        level: int,
        timeout_ns: int,
        slo_ns: int,
        tail_bytes: int,
        span_count: int,
        sources: tuple[tuple[Any, ...], ...],
        head: bytes,
        json_bytes: int,
        pieces: tuple[object, ...],
        encode: Any,
        outputs: tuple[tuple[int, int, int], ...],
    ) -> None: ...

class Route:
    version: Any  # serving.routes.Version and serving.dispatcher.Dispatcher are of a higher rank
    dispatcher: Any
    exchange: Any
    heads: dict[str, bytes]
    def __init__(
        self,
        version: Any,
        dispatcher: Any,
        exchange: Any,
        counters: RequestCounters,
        heads: dict[str, bytes],
        max_templates: int,
    ) -> None: ...
    def learn(self, skeleton: bytes, template: Template) -> None: ...

class Split:
    skeleton: bytes
    spans: list[tuple[int, int, int, int]]  # begin, end, count, kind

class Unreadable(Exception): ...

class Lane:
    burst: Burst
    is_open: bool
    def __init__(
        self,
        loop: AbstractEventLoop,
        max_request_bytes: int,
        max_head_bytes: int,
        seed: bytes,
        may_linger: bool = False,
    ) -> None: ...
    @property
    def route_count(self) -> int: ...
    def forget_routes(self) -> None: ...

class Connection(BufferedProtocol):  # registered as one, and not derived: it is compiled
    transport: Transport
    active_ns: int
    def __init__(self, lane: Lane) -> None: ...
    def connection_made(self, transport: BaseTransport) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def get_buffer(self, sizehint: int) -> memoryview: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def began(self, request: Any) -> None: ...
    def respond(self, head: bytes, body: bytes, json_bytes: int = -1) -> None: ...
    def finish(self) -> None: ...
    def resume(self) -> None: ...
    @property
    def is_busy(self) -> bool: ...
    @property
    def is_aside(self) -> bool: ...
