from typing import Any, Final

from gateway._kernels.ledger import RequestCounters
from gateway._kernels.slots import ShapeKey

MAX_PIECES: Final[int]
KEPT_SPANS: Final[int]
FROM_TAIL: Final[int]
FROM_BIN: Final[int]
FROM_NUMBERS: Final[int]
NUMBERS: Final[int]
BIN: Final[int]
ID: Final[int]

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
    counters: RequestCounters
    heads: dict[str, bytes]
    shadow: Any  # serving.routes.Target, or None
    def __init__(
        self,
        version: Any,
        dispatcher: Any,
        exchange: Any,
        counters: RequestCounters,
        heads: dict[str, bytes],
        max_templates: int,
        shadow: Any = None,
    ) -> None: ...
    def learn(self, skeleton: bytes, template: Template) -> None: ...

class Split:
    skeleton: bytes
    spans: list[tuple[int, int, int, int]]  # begin, end, count, kind
