"""A front end's place: its listening socket, the process that serves there, and that one's successors."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.control.process import Child
from gateway.control.seat import BACKOFF_S, describe_exit
from gateway.errors import GatewayError
from gateway.serving.channel import Message
from gateway.serving.options import FrontendOptions
from gateway.settings import ServerSettings

log = logging.getLogger("gateway.supervisor")

SPAWN_AGAIN_S = 1.0
"""Pause before another attempt where the system had no process or descriptors for a front end."""


class Frontend:
    """One of the processes that share the data port. Belongs to the supervisor's event loop.

    The socket outlives the process: connections that the kernel gave to a front end that died wait in its
    backlog for the next one.

    Args:
        index: its number, from 0.
        settings: the server's.
        data: its own listening socket on the data port; the caller closes it.
        metrics: the listening socket of the metrics port, which all front ends share; likewise.
        observer: told what becomes of it.
    """

    def __init__(
        self,
        index: int,
        settings: ServerSettings,
        data: socket.socket,
        metrics: socket.socket,
        observer: FrontendObserver,
    ) -> None:
        self.index = index
        self.process: Child | None = None
        self.has_served = False
        """Whether a process has come up here once."""
        self._settings = settings
        self._sockets = (data, metrics)
        self._observer = observer
        self._deaths = 0  # since one came up
        self._is_ending = False

    def start(self) -> None:
        """Start the process, now or when the system has room for it."""
        if self._is_ending:
            return
        try:
            process = Child("gateway.frontend.server", [], self._on_message, self._on_exit)
        except OSError as error:
            log.error("cannot start a front end: %s; trying again", error)
            asyncio.get_running_loop().call_later(SPAWN_AGAIN_S, self.start)
            return
        self.process = process
        sockets = [sock.fileno() for sock in self._sockets]
        self.tell("configure", sockets, options=self._options().to_wire())
        self._observer.on_up(self)

    def tell(self, op: str, fds: Sequence[int] = (), **fields: object) -> None:
        """Send a message to the process; lost where there is none.

        Raises:
            MessageTooLarge: it will never fit a packet.
        """
        if self.process is not None:
            self.process.send(op, fds, **fields)

    def drain(self) -> None:
        """Have the process finish what is in flight and end; no other is started."""
        self._is_ending = True
        self.tell("drain")

    def kill(self) -> None:
        """End the process now; no other is started."""
        self._is_ending = True
        if self.process is not None:
            self.process.kill()

    def _options(self) -> FrontendOptions:
        names = FrontendOptions.__dataclass_fields__.keys() - {"index"}
        settings = {name: getattr(self._settings, name) for name in names}
        return FrontendOptions(index=self.index, **settings)

    def _on_message(self, message: Message) -> None:
        if message["op"] == "serving":
            self._deaths = 0
            self.has_served = True
        self._observer.on_message(self, message)

    def _on_exit(self, status: int) -> None:
        self.process = None
        self._observer.on_gone(self)
        if self._is_ending:
            return
        name = "the front end" if self._settings.frontends == 1 else f"front end {self.index}"
        if not self.has_served:
            reason = f"{name} {describe_exit(status)} at its start"
            self._observer.on_failed(GatewayError(reason))
            return
        pause_s = BACKOFF_S[min(self._deaths, len(BACKOFF_S) - 1)]
        self._deaths += 1
        log.error("%s %s; starting another", name, describe_exit(status))
        asyncio.get_running_loop().call_later(pause_s, self.start)


@dataclass(frozen=True, slots=True)
class FrontendObserver:
    """What the supervisor wants to hear of a front end.

    Attributes:
        on_up: a new process is there, which knows nothing but its options yet.
        on_message: what it said.
        on_gone: its process was reaped.
        on_failed: it could not be started even once.
    """

    on_up: Callable[[Frontend], None]
    on_message: Callable[[Frontend, Message], None]
    on_gone: Callable[[Frontend], None]
    on_failed: Callable[[GatewayError], None]
