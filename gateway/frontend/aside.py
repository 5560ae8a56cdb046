"""Where the fast lane steps aside: a connection's own aiohttp handler, and when its turn is over.

The handler is made on a connection's first unusual request, and speaks to the same transport. It is given
exactly one message, as far as that can be told from the outside: its head, and the bytes that one plain
``Content-Length`` announces. When that has been read and answered the connection goes back. A message whose
end only aiohttp knows (chunked, or framed in a way that is refused) keeps the connection with aiohttp.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from aiohttp import web

from gateway._kernels.fastlane import Connection

log = logging.getLogger("gateway.frontend")

MAX_HEAD_BYTES = 1 << 17
"""Of a head whose end is looked for; aiohttp's own limit, a setting, is below it."""

_LENGTH = re.compile(rb"\r\ncontent-length[ \t]*:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n)", re.IGNORECASE)
_ANY_LENGTH = re.compile(rb"\r\ncontent-length", re.IGNORECASE)
_FRAMED_OTHERWISE = re.compile(rb"\r\n(?:transfer-encoding|upgrade)", re.IGNORECASE)


def message_bytes(head: bytes) -> int | None:
    """Bytes of the message that begins with this head (which ends with an empty line); None: unknown."""
    if _FRAMED_OTHERWISE.search(head):
        return None
    lengths = _LENGTH.findall(head)
    if len(_ANY_LENGTH.findall(head)) != len(lengths) or len(lengths) > 1:
        return None
    return len(head) + (int(lengths[0]) if lengths else 0)


class Aside:
    """A connection's time with aiohttp.

    Args:
        connection: whose.
        server: what makes requests of messages.
        options: of aiohttp's handler.
    """

    def __init__(self, connection: Connection, server: web.Server, options: dict[str, Any]) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self.handler = _Handler(self, server, loop=self._loop, **options)
        self.handler.connection_made(connection.transport)
        self._head: bytes | None = (
            None  # what has come of it; None: nothing is looked for in it any more
        )
        self._left: int | None = None  # bytes of the message to come; None: not known
        self._is_answered = False

    def begin(self) -> None:
        """What is fed next begins a message."""
        self._head, self._left, self._is_answered = b"", None, False

    def feed(self, data: bytes) -> bytes:
        """Give aiohttp what of the data is the message's. Returns what lies behind it."""
        if self._head is not None:
            self._find_end(self._head, data)
        if self._left is None:
            self._give(data)
            return b""
        mine, rest = data[: self._left], data[self._left :]
        self._left -= len(mine)
        self._give(mine)
        self._leave()
        return rest

    @property
    def is_incomplete(self) -> bool:
        """Whether not even the head of a message has come."""
        return self._head is not None

    def _give(self, data: bytes) -> None:
        """Aiohttp's parser raises more than it says, for instance of a URL that it cannot take apart."""
        try:
            self.handler.data_received(data)
        except Exception:
            log.debug("aiohttp failed on a message", exc_info=True)  # quotes the client
            self._connection.transport.abort()

    def answered(self, *, is_kept: bool) -> None:
        """Aiohttp has written the answer; ``is_kept``: and keeps the connection."""
        self._is_answered = is_kept
        self._leave()

    def _find_end(self, fed: bytes, data: bytes) -> None:
        """Set how many bytes of the message are left, once its head is there."""
        head = fed + data
        begin = len(head) - len(head.lstrip(b"\r\n"))  # aiohttp skips empty lines
        end = head.find(b"\r\n\r\n", begin)
        if end < 0:
            self._head = head if len(head) <= MAX_HEAD_BYTES else None
            return
        self._head = None
        size = message_bytes(head[begin : end + 4])
        if size is not None:
            self._left = begin + size - len(fed)

    def _leave(self) -> None:
        if self._left == 0 and self._is_answered:
            self._is_answered = False
            # Two turns on: aiohttp sets its keep-alive timer in the next one, and that is to be cancelled.
            self._loop.call_soon(self._loop.call_soon, self._resume)

    def _resume(self) -> None:
        self.handler.keep_alive(True)
        self._connection.resume()


class _Handler(web.RequestHandler):
    """aiohttp's handler, which says when it has answered."""

    __slots__ = ("_aside",)

    def __init__(self, aside: Aside, server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._aside = aside

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the answer."""
        written, is_reset = await super().finish_response(request, resp, start_time)
        self._aside.answered(is_kept=bool(written.keep_alive) and not is_reset)
        return written, is_reset
