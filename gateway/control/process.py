"""A child process: started with one end of a channel, watched by its pidfd, reaped here."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from gateway.serving.channel import Channel, Message


class Child:
    """One process that runs a module of ours. Belongs to the supervisor's event loop.

    Args:
        module: run as ``python -m module --channel FD``.
        arguments: further ones, for whoever reads ``ps``.
        on_message: called with each message and its descriptors, which it owns.
        on_exit: called once, after the process was reaped, with its exit status as
            `subprocess.Popen.returncode` has it: negative for a signal.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        on_message: Callable[[Message, list[int]], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self.channel, theirs = Channel.pair()
        fd = theirs.fileno()
        self._process = subprocess.Popen(
            # -P: the working directory is no place to import from.
            [sys.executable, "-P", "-m", module, "--channel", str(fd), *arguments],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C is the supervisor's to handle
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )
        theirs.close()
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.channel.setblocking(False)
        self._loop.add_reader(self.pidfd, self._on_dead)
        self._loop.add_reader(self.channel.fileno(), self._on_readable)

    @property
    def is_alive(self) -> bool:
        """Whether it was not reaped yet."""
        return self._process.returncode is None

    def kill(self) -> None:
        """End it now."""
        if self.is_alive:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _on_readable(self) -> None:
        while self.channel.fileno() >= 0:
            try:
                received = self.channel.receive()
            except BlockingIOError:
                return
            if received is None:
                self._loop.remove_reader(self.channel.fileno())
                return
            self._on_message(*received)

    def _on_dead(self) -> None:
        self._on_readable()  # its last words
        self._loop.remove_reader(self.pidfd)
        self._loop.remove_reader(self.channel.fileno())
        status = self._process.wait()
        os.close(self.pidfd)
        self.channel.close()
        self._on_exit(status)
