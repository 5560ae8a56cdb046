"""Plain Python twin of kernels/skeleton.pyx: same signatures and results.

Bodies are divided by regular expressions; numbers are read by orjson and the decode kernel's twin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.tensors import DATATYPES
from tests.twins import decode

MAX_SPANS = 16
MAX_ID_BYTES = 256
MAX_DEPTH = 32
SPAN_NUMBERS, SPAN_BIN, SPAN_ID = 1, 2, 3
MARK, ID_MARK, MSGPACK_ID_MARK = b"\x01", b"\x02", b"\xc1"

Parts = tuple[bytes, list[tuple[int, int, int, int]]]

STRING = re.compile(rb'"((?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*)"', re.DOTALL)
SHAPE = re.compile(rb'\[[^][{}"\x00-\x08\x0b\x0c\x0e-\x1f]*\]')
PLAIN = re.compile(rb"[ !#-\[\]-~]{0,%d}" % MAX_ID_BYTES)
SPACE = re.compile(rb"[ \t\n\r]*")
FOREIGN = re.compile(rb'["A-DF-Za-df-z{}:;<=>?@\\^_`|~\x7f]')
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
LONG_EXPONENT = re.compile(rb"[eE][+-]?[0-9]{9}")


class Refused(Exception):
    """The body has to go the general way."""


@dataclass
class Cuts:
    body: bytes
    room: int
    done: int = 0
    skeleton: bytes = b""
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)

    def keep(self, end: int) -> None:
        self.skeleton += self.body[self.done : end]
        self.done = end
        if len(self.skeleton) > self.room:
            raise Refused

    def cut(self, kind: int, begin: int, end: int, count: int, mark: bytes) -> None:
        if len(self.spans) == MAX_SPANS:
            raise Refused
        self.keep(begin)
        self.skeleton += mark
        self.spans.append((begin, end, count, kind))
        self.done = end

    def parts(self) -> Parts:
        self.keep(len(self.body))
        return self.skeleton, self.spans


def json_parts(body: bytes, room: int) -> Parts | None:
    if room < 0:
        raise ValueError("room: must not be negative")
    try:
        return divide_json(Cuts(body, room))
    except Refused:
        return None


def divide_json(cuts: Cuts) -> Parts:
    body, at, depth = cuts.body, 0, 0
    while at < len(body):
        byte = body[at : at + 1]
        if byte == b'"':
            at = string(cuts, at, depth)
        elif byte == b"[":
            inside = array(cuts, at)
            at = inside or at + 1
            depth += inside is None
        else:
            depth += {b"{": 1, b"}": -1, b"]": -1}.get(byte, 0)
            at += 1
        if CONTROL.match(byte) or not 0 <= depth <= MAX_DEPTH:
            raise Refused
    if depth:
        raise Refused
    return cuts.parts()


def string(cuts: Cuts, at: int, depth: int) -> int:
    """Where to go on after a string, and after what its value needs if it is a key."""
    text = found(STRING.match(cuts.body, at))
    colon = found(SPACE.match(cuts.body, text.end())).end()
    if cuts.body[colon : colon + 1] != b":":
        return text.end()
    if b"\\" in text[1]:
        raise Refused
    value = found(SPACE.match(cuts.body, colon + 1)).end()
    if text[1] == b"shape" and cuts.body[value : value + 1] == b"[":
        return found(SHAPE.match(cuts.body, value)).end()
    if text[1] == b"id" and depth == 1:
        inside = found(STRING.match(cuts.body, value))
        found(PLAIN.fullmatch(inside[1]))
        if any(kind == SPAN_ID for *_, kind in cuts.spans):
            raise Refused
        cuts.cut(SPAN_ID, value + 1, inside.end() - 1, 0, ID_MARK)
        return inside.end()
    return value


def found(match: re.Match[bytes] | None) -> re.Match[bytes]:
    if match is None:
        raise Refused
    return match


def array(cuts: Cuts, at: int) -> int | None:
    """Cuts the array at `at` and gives its end; None where it is to be entered."""
    foreign = FOREIGN.search(cuts.body, at)
    text = cuts.body[at : foreign.start() if foreign else len(cuts.body)]
    depth = 0
    for bracket in re.finditer(rb"[][]", text):
        depth += 1 if bracket[0] == b"[" else -1
        if depth == 0:
            text = text[: bracket.end()]
            break
    if not re.search(rb"[0-9]", text):
        return None
    if depth:
        raise Refused
    cuts.cut(SPAN_NUMBERS, at, at + len(text), text.count(b",") + 1, MARK)
    return at + len(text)


def msgpack_parts(body: bytes, room: int) -> Parts | None:
    if room < 0:
        raise ValueError("room: must not be negative")
    cuts = Cuts(body, room)
    try:
        if divide_msgpack(cuts, 0, 0, None) != len(body):
            raise Refused
        return cuts.parts()
    except Refused:
        return None


def divide_msgpack(cuts: Cuts, at: int, depth: int, key: bytes | None) -> int:
    """Goes through a value and gives its end. `depth`: the containers around it."""
    kind, begin, length = header(cuts.body, at)
    if depth == 0 and kind != "map":
        raise Refused
    if kind in ("array", "map"):
        if depth == MAX_DEPTH or (depth == 1 and key == b"id"):
            raise Refused
        for _ in range(length):
            if kind == "map":
                key_kind, key_begin, key_length = header(cuts.body, begin)
                if key_kind != "str":
                    raise Refused
                begin = key_begin + key_length
            name = cuts.body[key_begin:begin] if kind == "map" else None
            begin = divide_msgpack(cuts, begin, depth + 1, name)
        return begin
    end = begin + length
    if depth == 1 and key == b"id":
        if kind != "str" or not PLAIN.fullmatch(cuts.body[begin:end]):
            raise Refused
        cuts.keep(at)
        cuts.done = begin
        cuts.cut(SPAN_ID, begin, end, 0, MSGPACK_ID_MARK)
    elif key == b"data" and kind == "bin" and length:
        cuts.cut(SPAN_BIN, begin, end, 0, b"")
    return end


SIZES = {0xCA: 4, 0xCB: 8, **{0xCC + i: 1 << i % 4 for i in range(8)}}
LENGTHS = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}


def header(body: bytes, at: int) -> tuple[str, int, int]:
    """The kind of a value, where its content begins and its length, all of which is there."""
    if at >= len(body):
        raise Refused
    tag = body[at]
    at += 1
    kind, length = "scalar", 0
    if 0x80 <= tag < 0xC0:
        kind, bits = ("map", 4) if tag < 0x90 else ("array", 4) if tag < 0xA0 else ("str", 5)
        length = tag & ((1 << bits) - 1)
    elif tag in LENGTHS:
        kind, size = LENGTHS[tag]
        if at + size > len(body):
            raise Refused
        length = int.from_bytes(body[at : at + size], "big")
        at += size
    elif tag in SIZES:
        length = SIZES[tag]
    elif 0xC0 <= tag < 0xE0 and tag not in (0xC0, 0xC2, 0xC3):
        raise Refused
    if kind not in ("array", "map") and at + length > len(body):
        raise Refused
    return kind, at, length


def numbers(
    text: bytes, datatype_index: int, count: int, dims: tuple[int, ...] | None
) -> bytes | None:
    if datatype_index not in decode.BY_INDEX:
        raise ValueError(f"datatype_index: expected 0 to {len(DATATYPES) - 1}")
    if count < 0:
        raise ValueError("count: must not be negative")
    if not (text.startswith(b"[") and text.endswith(b"]")) or LONG_EXPONENT.search(text):
        return None
    if not re.fullmatch(rb"[][0-9+\-.,eE \t\n\r]*", text) or count > len(text):
        return None
    datatype = decode.BY_INDEX[datatype_index]
    shape: Any = (count,) if dims is None else dims
    dst = bytearray(count * (datatype.itemsize if datatype.numpy is not None else 0))
    try:
        decode.fill(dst, 0, datatype_index, shape, orjson.loads(text), dims is not None)
    except ValueError:
        return None
    return bytes(dst)
