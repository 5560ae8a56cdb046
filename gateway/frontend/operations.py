"""Operations on models: asked of the supervisor over the link, and awaited here by number."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Literal

from gateway.errors import Conflict, GatewayError, InvalidRequest, NotFound, Unavailable
from gateway.serving.channel import Channel

MAX_OPERATIONS = 256
"""Operations that may wait at the same time; each takes memory here and in the supervisor."""

_REFUSALS = {kind.code: kind for kind in (Conflict, InvalidRequest, NotFound, Unavailable)}
"""What the supervisor may answer, by code; anything else is a fault of ours."""


class Operations:
    """What this front end's clients have asked the supervisor to do. Belongs to the event loop.

    Args:
        channel: to the supervisor; not blocking.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = count(1)
        self._pending: dict[int, asyncio.Future[None]] = {}
        self._is_orphaned = False

    async def run(self, action: Literal["load", "unload"], model: str) -> None:
        """Have the supervisor load or unload a model. A caller who goes away stops nothing.

        Raises:
            NotFound: to load: there is no such model.
            InvalidRequest: it cannot be loaded, with the reason; what was served still is.
            Unavailable: the supervisor is gone, busy, starting or shutting down.
        """
        if len(self._pending) >= MAX_OPERATIONS:
            raise Unavailable(f"{MAX_OPERATIONS} operations on models are waiting already")
        number = next(self._numbers)
        ended = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            self._ask(number, action, model)
            await ended
        finally:
            del self._pending[number]

    def _ask(self, number: int, action: str, model: str) -> None:
        try:
            sent = not self._is_orphaned and self._channel.send(
                "operation", number=number, action=action, model=model
            )
        except BlockingIOError:
            raise Unavailable("the supervisor is busy") from None
        if not sent:
            raise Unavailable("the supervisor is gone; models stay as they are")

    def ended(self, number: int, code: str, text: str) -> None:
        """The supervisor's word on an operation: the code of its error, or none."""
        future = self._pending.get(number)
        if future is None or future.done():
            return  # whoever asked is gone
        if code:
            future.set_exception(_REFUSALS.get(code, GatewayError)(text))
        else:
            future.set_result(None)

    def orphaned(self) -> None:
        """The supervisor is gone: nobody will answer."""
        self._is_orphaned = True
        for future in self._pending.values():
            if not future.done():
                future.set_exception(Unavailable("the supervisor is gone; models stay as they are"))
