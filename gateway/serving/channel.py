"""Messages between processes: one msgpack map a packet, file descriptors beside it.

A ``SOCK_SEQPACKET`` pair keeps message borders, carries descriptors, and ends when either process
does, which is how each learns that its peer is gone. Every message has the key ``op``.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import msgpack

MAX_MESSAGE_BYTES = 1 << 20
"""Largest message; bounds the signature of a model and the receive buffer."""

MAX_FDS = 16
"""Most descriptors beside one message."""

Message = dict[str, Any]


class Channel:
    """One end of a socket pair. Owns its socket; received descriptors belong to the caller."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        with contextlib.suppress(OSError):  # a smaller kernel limit only bounds signatures sooner
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE_BYTES)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two connected ends; neither survives an exec unless it is passed on by name."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """The end that this process was given as a descriptor, which is taken over."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The descriptor, for polling and for passing on."""
        return self._socket.fileno()

    def detach(self) -> int:
        """Give up the socket; the caller owns the returned descriptor."""
        return self._socket.detach()

    def setblocking(self, blocking: bool) -> None:
        """Whether `receive` waits (a worker's thread) or not (an event loop)."""
        self._socket.setblocking(blocking)

    def send(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> bool:
        """Send one message; False when the peer is gone.

        Descriptors are duplicated by the kernel: the caller still owns its own.
        """
        packet = msgpack.packb({"op": op, **fields})
        try:
            socket.send_fds(self._socket, [packet], list(fds))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors; None at the end of the channel.

        Raises:
            BlockingIOError: not blocking, and nothing is there.
        """
        try:
            packet, fds, _flags, _address = socket.recv_fds(
                self._socket, MAX_MESSAGE_BYTES, MAX_FDS
            )
        except ConnectionResetError:
            return None
        if not packet:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        return msgpack.unpackb(packet), fds

    def close(self) -> None:
        """Close this end; the peer's `receive` returns None."""
        self._socket.close()
