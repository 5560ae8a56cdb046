"""Plain Python twin of kernels/heads.pyx and so of http_head.h and http_answer.h: regular expressions
and the standard library, with the same results and errors."""

from __future__ import annotations

import re
import struct
from email.utils import formatdate
from enum import Enum
from typing import Any, Literal, NamedTuple

MAX_BYTES = 8000
MAX_FIELDS = 64
DATE_MAX_S = 253402300799
WORD = (1 << 64) - 1

MEDIA = [
    "application/json",
    "application/octet-stream",
    "application/msgpack",
    "application/x-msgpack",
    "application/vnd.msgpack",
]  # from 1 on; 0: none, 6: another

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"POST (/[A-Za-z0-9_.~/:-]{0,511}) HTTP/1\.1")
REQUEST_LINE_BEGUN = re.compile(rb"POST /[A-Za-z0-9_.~/:-]{0,511}")
FIELD = re.compile(rb"(%s):[ \t]*([\t -~]*?)[ \t]*" % TOKEN)
FIELD_BEGUN = re.compile(rb"\r?|%s(:[\t -~]*\r?)?" % TOKEN)

SIZE = re.compile(r"[0-9]{1,15}")
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
ONCE = {
    "host": re.compile(r"[A-Za-z0-9._:\[\]-]+"),
    "content-length": SIZE,
    "content-type": re.compile(rf"({TOKEN.decode()}/{TOKEN.decode()})(\s*;\s*(?i:charset=utf-8))?"),
    "content-encoding": re.compile("(?i:identity)"),
    "connection": re.compile("(?i:keep-alive)"),
    "inference-header-content-length": SIZE,
    "x-request-id": re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}"),
    "traceparent": TRACEPARENT,
    "authorization": re.compile(".*"),
    "user-agent": re.compile(".*"),
}
NEVER = {
    *(
        "transfer-encoding",
        "expect",
        "upgrade",
        "trailer",
        "proxy-connection",
        "sec-websocket-key1",
    ),
    *("content-location", "content-range", "etag", "max-forwards", "server"),
}


class Aside(Enum):
    ASIDE = "aside"


ASIDE = Aside.ASIDE


class Head(NamedTuple):
    head_bytes: int
    target: str
    content_length: int
    json_bytes: int | None
    media: int
    request_id: str | None
    traceparent: str | None


def parse(data: Any, start: int = 0) -> Head | Literal[Aside.ASIDE] | None:
    size = memoryview(data).nbytes
    if not 0 <= start <= size:
        raise ValueError(f"start: must be within the buffer of {size} bytes")
    seen = bytes(data)[start : start + MAX_BYTES]
    text, end, _ = seen.partition(b"\r\n\r\n")
    lines = text.split(b"\r\n")
    begun = b"" if end else lines.pop()
    if not lines:
        return missing(seen) if request_line_begun(begun) else ASIDE
    asked = REQUEST_LINE.fullmatch(lines[0])
    fields = read_fields(lines[1:])
    if asked is None or fields is None:
        return ASIDE
    if not end:
        surplus = len(lines) > MAX_FIELDS and begun not in (b"", b"\r")
        return missing(seen) if FIELD_BEGUN.fullmatch(begun) and not surplus else ASIDE
    if not fields.keys() >= {"host", "content-length"}:
        return ASIDE
    json_bytes = fields.get("inference-header-content-length")
    return Head(
        len(text) + len(end),
        asked[1].decode(),
        int(fields["content-length"]),
        None if json_bytes is None else int(json_bytes),
        media(fields.get("content-type")),
        fields.get("x-request-id"),
        fields.get("traceparent"),
    )


def missing(seen: bytes) -> Literal[Aside.ASIDE] | None:
    """The verdict on a good beginning: it may go on, unless it is as long as a head may be."""
    return None if len(seen) < MAX_BYTES else ASIDE


def request_line_begun(line: bytes) -> bool:
    target = REQUEST_LINE_BEGUN.match(line)
    if target is None:
        return b"POST /".startswith(line)
    return b" HTTP/1.1\r".startswith(line[target.end() :])


def read_fields(lines: list[bytes]) -> dict[str, str] | None:
    """The headers that matter, by name; None if the lines are not all plain."""
    found: dict[str, str] = {}
    for line in lines:
        field = FIELD.fullmatch(line)
        if field is None:
            return None
        name, value = field[1].decode().lower(), field[2].decode()
        if name in NEVER or name in found:
            return None
        if name in ONCE:
            if not ONCE[name].fullmatch(value):
                return None
            found[name] = value
    return found if len(lines) <= MAX_FIELDS else None


def media(value: str | None) -> int:
    if value is None:
        return 0
    name = re.split(r"[;\s]", value)[0].lower()
    return MEDIA.index(name) + 1 if name in MEDIA else len(MEDIA) + 1


def uint_text(value: int) -> bytes:
    if not 0 <= value <= WORD:
        raise OverflowError("value: must be from 0 to 2^64 - 1")
    return b"%d" % value


def date_text(unix_s: int) -> bytes:
    return formatdate(min(max(unix_s, 0), DATE_MAX_S), usegmt=True).encode()


class RequestIds:
    def __init__(self, seed: bytes) -> None:
        if len(seed) != 16:
            raise ValueError(f"seed: expected 16 bytes, got {len(seed)}")
        self._state = list(struct.unpack("<2Q", seed))

    def take(self) -> bytes:
        self._state = [(word + 0x9E3779B97F4A7C15) & WORD for word in self._state]
        return b"%016x%016x" % tuple(mixed(word) for word in self._state)


def mixed(word: int) -> int:
    """The output function of splitmix64."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31
