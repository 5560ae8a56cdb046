from enum import Enum
from typing import Final, Literal, NamedTuple

from typing_extensions import Buffer

class Aside(Enum):
    ASIDE = "aside"

ASIDE: Final = Aside.ASIDE

class Head(NamedTuple):
    head_bytes: int
    target: str
    content_length: int
    json_bytes: int | None
    media: int
    request_id: str | None
    traceparent: str | None

def parse(data: Buffer, start: int = 0) -> Head | Literal[Aside.ASIDE] | None: ...
def uint_text(value: int) -> bytes: ...
def date_text(unix_s: int) -> bytes: ...

class RequestIds:
    def __init__(self, seed: bytes) -> None: ...
    def take(self) -> bytes: ...
