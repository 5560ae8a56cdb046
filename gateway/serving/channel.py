"""Messages between processes: one msgpack map a packet, file descriptors beside it.

A ``SOCK_SEQPACKET`` pair keeps message borders, carries descriptors, and ends when either process
does, which is how each learns that its peer is gone. Every message has the key ``op``.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import Any

import msgpack

MAX_MESSAGE_BYTES = 1 << 17
"""Largest message; bounds the signature of a model. A socket's buffer holds it on a stock kernel."""

MAX_FDS = 16
"""Most descriptors beside one message."""

_FDS_SPACE = socket.CMSG_LEN(MAX_FDS * array.array("i").itemsize)

Message = dict[str, Any]


class MessageTooLarge(Exception):
    """The message does not fit a packet."""


class Channel:
    """One end of a socket pair. Owns its socket; received descriptors belong to the caller."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

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

    def setblocking(self, blocking: bool) -> None:
        """Whether `receive` waits (a worker's thread) or not (an event loop)."""
        self._socket.setblocking(blocking)

    def send(self, op: str, fds: Sequence[int] = (), **fields: Any) -> bool:
        """Send one message; False when the peer is gone.

        Descriptors are duplicated by the kernel: the caller still owns its own.

        Raises:
            MessageTooLarge: over MAX_MESSAGE_BYTES.
            BlockingIOError: not blocking, and the peer does not read.
        """
        packet = msgpack.packb({"op": op, **fields})
        if len(packet) > MAX_MESSAGE_BYTES:
            raise MessageTooLarge(
                f"a message of {len(packet)} bytes, of {MAX_MESSAGE_BYTES} at most"
            )
        try:
            socket.send_fds(self._socket, [packet], list(fds))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self, *, wait: bool = True) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors; None at the end of the channel.

        Where this process had no descriptors left for all of them, it gets none.

        Args:
            wait: False: for this call the channel is not blocking.

        Raises:
            BlockingIOError: not blocking, and nothing is there.
        """
        try:
            # Not socket.recv_fds, which drops its argument for flags (Python 3.11 to 3.13).
            packet, ancillary, flags, _address = self._socket.recvmsg(
                MAX_MESSAGE_BYTES, _FDS_SPACE, 0 if wait else socket.MSG_DONTWAIT
            )
        except ConnectionResetError:
            return None
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if not packet:
            return None
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            fds = array.array("i")
        for fd in fds:
            os.set_inheritable(fd, False)
        return _unpack(packet), list(fds)

    def close(self) -> None:
        """Close this end; the peer's `receive` returns None."""
        self._socket.close()


def _unpack(packet: bytes) -> Message:
    """The message in a packet; one without meaning where a peer sent what is none."""
    try:
        message = msgpack.unpackb(packet)
    except ValueError:
        message = None
    return message if isinstance(message, dict) and "op" in message else {"op": ""}
