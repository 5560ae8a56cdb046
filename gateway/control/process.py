"""A child process: started with one end of a channel, watched by its pidfd, reaped here."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any, BinaryIO

import msgpack

from gateway.serving.channel import MAX_MESSAGE_BYTES, Channel, Message, MessageTooLarge

_UNUSED = {
    # NumPy's OpenBLAS would start threads in every process, for nothing we call.
    "OPENBLAS_NUM_THREADS": "1",
    # aiohttp would read all certificate authorities, for its client: a tenth of a front end's start.
    "SSL_CERT_FILE": os.devnull,
}
"""What keeps libraries from preparing what no child of ours uses."""


def start_process(
    module: str, channel: int, arguments: Sequence[str], output: BinaryIO | None = None
) -> subprocess.Popen[bytes]:
    """Start a module of ours as ``python -m module --channel FD``.

    Args:
        module: its dotted name.
        channel: descriptor of its end of the channel; the caller still owns it.
        arguments: further ones, for whoever reads ``ps``.
        output: where what it prints goes; None: where our own does.

    Raises:
        OSError: no process, memory or descriptors for it.
    """
    return subprocess.Popen(
        # -P: the working directory is no place to import from.
        [sys.executable, "-P", "-m", module, "--channel", str(channel), *arguments],
        pass_fds=[channel],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        process_group=0,  # a terminal's Ctrl-C is for us, who end what we started
        env={**_UNUSED, **os.environ},
    )


class Child:
    """One process that runs a module of ours. Belongs to the supervisor's event loop.

    Args:
        module: run as ``python -m module --channel FD``.
        arguments: further ones, for whoever reads ``ps``.
        on_message: called with each message; no child of ours sends descriptors, and what it sends
            all the same is closed.
        on_exit: called once, after the process was reaped, with its exit status as
            `subprocess.Popen.returncode` has it: negative for a signal.

    Raises:
        OSError: no process, memory or descriptors for it; nothing is left behind.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        on_message: Callable[[Message], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[str, list[int], dict[str, Any]]] = deque()
        with ExitStack() as undo:
            self._channel, theirs = Channel.pair()
            undo.callback(self._channel.close)
            with closing(theirs):
                self._process = start_process(module, theirs.fileno(), arguments)
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self.pid = self._process.pid
            self.pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        self._channel.setblocking(False)
        self._loop.add_reader(self.pidfd, self._on_dead)
        self._loop.add_reader(self._channel.fileno(), self._on_readable)

    def send(self, op: str, fds: Sequence[int] = (), **fields: Any) -> None:
        """Send a message, in order, now or when the child has room for it; lost if it has ended.

        The caller keeps its descriptors and may close them at once.

        Raises:
            MessageTooLarge: it will never fit a packet.
        """
        if not self._unsent and self._try_send(op, fds, fields):
            return
        nbytes = len(msgpack.packb({"op": op, **fields}))
        if nbytes > MAX_MESSAGE_BYTES:  # said here, where somebody can act on it
            raise MessageTooLarge(f"a message of {nbytes} bytes, of {MAX_MESSAGE_BYTES} at most")
        if not self._unsent:
            self._loop.add_writer(self._channel.fileno(), self._on_writable)
        self._unsent.append((op, [os.dup(fd) for fd in fds], fields))

    def _try_send(self, op: str, fds: Sequence[int], fields: dict[str, Any]) -> bool:
        try:
            self._channel.send(op, fds, **fields)
        except BlockingIOError:
            return False
        return True

    def _on_writable(self) -> None:
        while self._unsent:
            op, fds, fields = self._unsent[0]
            if not self._try_send(op, fds, fields):
                return
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)
        self._loop.remove_writer(self._channel.fileno())

    @property
    def is_alive(self) -> bool:
        """Whether it was not reaped yet."""
        return self._process.returncode is None

    def kill(self) -> None:
        """End it now."""
        if self.is_alive:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _on_readable(self) -> None:
        while True:
            try:
                received = self._channel.receive()
            except BlockingIOError:
                return
            if received is None:
                self._loop.remove_reader(self._channel.fileno())
                return
            message, fds = received
            for fd in fds:
                os.close(fd)
            self._on_message(message)

    def _on_dead(self) -> None:
        self._on_readable()  # its last words
        self._loop.remove_reader(self.pidfd)
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        status = self._process.wait()
        os.close(self.pidfd)
        self._channel.close()
        for _op, fds, _fields in self._unsent:
            for fd in fds:
                os.close(fd)
        self._on_exit(status)
