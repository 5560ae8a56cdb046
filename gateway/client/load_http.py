"""HTTP/1.1 for load generation: requests that are made once, and answers read for little but their end.

A general client makes objects of every header, which costs several times what the sending does. Here one
search finds the head's end and two more the fields that say where the answer ends (RFC 9112, 6.3). Bodies
are counted, not kept, apart from the beginning of those that are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from gateway.client.errors import BadAnswer

MAX_HEAD_BYTES = 64 << 10
"""Longest head of an answer, and longest line between the chunks of its body."""

MAX_TEXT_BYTES = 4 << 10
"""How much is kept of the body of an answer that is an error."""

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})[ \r]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*\bchunked[ \t]*\r\n", re.IGNORECASE)
_CONNECTION = re.compile(rb"\r\nconnection:[^\r]*\b(close|keep-alive)\b", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")

_WITHOUT_BODY = frozenset({204, 304})
_UNTIL_CLOSED = -1


def request_bytes(
    method: str,
    authority: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A request as it goes over a kept-alive connection.

    Args:
        method: in capitals.
        authority: ``host[:port]``, as the server shall see it in ``Host``.
        path: begins with a slash and is quoted.
        body: sent with its ``Content-Length``.
        headers: others; names and values are sent as they are.
    """
    fields = {"Host": authority, **(headers or {}), "Content-Length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class _Part(Enum):
    """What of an answer comes next."""

    HEAD = "head"
    BODY = "body"
    CHUNKS = "chunks"
    TRAILERS = "trailers"


class AnswerReader:
    """Finds the end of each answer on one connection. One request is in flight at a time.

    Between two answers `status`, `answer_bytes` (head and body, as received), `keeps_alive` and `text`
    (the beginning of the body, where the status is not 2xx) are those of the last one.
    """

    __slots__ = (
        "_left",
        "_part",
        "_pending",
        "answer_bytes",
        "keeps_alive",
        "status",
        "text",
    )

    def __init__(self) -> None:
        self.status = 0
        self.answer_bytes = 0
        self.keeps_alive = True
        self.text = b""
        self._part = _Part.HEAD
        self._pending = b""  # the beginning of a head or line whose end has not come
        self._left = 0  # of the body or chunk

    def feed(self, data: bytes) -> bool:
        """Take what was received; whether the answer is complete with it.

        Raises:
            BadAnswer: it is not HTTP/1.x, or something follows the answer's end.
        """
        if self._part is _Part.HEAD:
            return self._feed_head(data)
        self.answer_bytes += len(data)
        if self._part is _Part.BODY:
            return self._feed_body(data)
        return self._feed_chunks(data)

    def ends_here(self) -> bool:
        """Whether an answer that lasts until the connection is closed is complete, now that it is."""
        return self._part is _Part.BODY and self._left == _UNTIL_CLOSED

    def _feed_head(self, data: bytes) -> bool:
        if self._pending:
            data = self._pending + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise BadAnswer(f"the head of an answer is longer than {MAX_HEAD_BYTES} bytes")
            self._pending = data
            return False
        self._pending = b""
        self.answer_bytes = len(data)
        self._read_head(data[: end + 2])
        rest = data[end + 4 :]
        if self._part is _Part.HEAD:  # 1xx: the answer proper follows
            return self._feed_head(rest)
        return self._feed_body(rest) if self._part is _Part.BODY else self._feed_chunks(rest)

    def _read_head(self, head: bytes) -> None:
        """Status, and how the end is found. ``head`` ends with the last field's line end."""
        first = _STATUS.match(head)
        if first is None:
            raise BadAnswer("the server does not answer in HTTP/1.x")
        self.status, self.text = int(first[2]), b""
        if self.status < 200:
            return
        said = _CONNECTION.search(head)
        self.keeps_alive = first[1] == b"1" if said is None else said[1].lower() == b"keep-alive"
        self._part = _Part.BODY
        if self.status in _WITHOUT_BODY:
            self._left = 0
        elif _CHUNKED.search(head):
            self._part, self._left = _Part.CHUNKS, 0
        elif length := _LENGTH.search(head):
            self._left = int(length[1])
        else:
            self._left, self.keeps_alive = _UNTIL_CLOSED, False

    def _feed_body(self, data: bytes) -> bool:
        self._keep(data)
        if self._left == _UNTIL_CLOSED:
            return False
        self._left -= len(data)
        if self._left > 0:
            return False
        return self._end(-self._left)

    def _feed_chunks(self, data: bytes) -> bool:
        """Read chunks, their extensions and trailers (RFC 9112, 7.1)."""
        at = 0
        while at < len(data):
            if self._left:  # of the chunk, with the line end behind it
                step = min(self._left, len(data) - at)
                self._keep(data[at : at + min(step, max(0, self._left - 2))])
                self._left -= step
                at += step
                continue
            end = data.find(b"\n", at) + 1
            self._pending += data[at:end] if end else data[at:]
            if len(self._pending) > MAX_HEAD_BYTES:
                raise BadAnswer(f"a line between chunks is longer than {MAX_HEAD_BYTES} bytes")
            if not end:
                return False
            line, self._pending, at = self._pending.rstrip(b"\r\n"), b"", end
            if self._part is _Part.TRAILERS:
                if not line:
                    return self._end(len(data) - at)
            else:
                self._begin_chunk(line)
        return False

    def _begin_chunk(self, line: bytes) -> None:
        size = _CHUNK_SIZE.fullmatch(line)
        if size is None:
            raise BadAnswer("expected the size of a chunk in the server's answer")
        self._left = int(size[1], 16)
        if self._left:
            self._left += len(b"\r\n")
        else:
            self._part = _Part.TRAILERS

    def _keep(self, data: bytes) -> None:
        if self.status >= 300 and len(self.text) < MAX_TEXT_BYTES:
            self.text = (self.text + data)[:MAX_TEXT_BYTES]

    def _end(self, left_over: int) -> bool:
        if left_over:
            raise BadAnswer(f"{left_over} bytes follow the end of an answer")
        self._part = _Part.HEAD
        return True
