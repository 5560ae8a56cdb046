"""A worker's mail: a thread that reads its channels, and wakes the worker's loop for each message."""

from __future__ import annotations

import logging
import os
import selectors
import threading
from collections import deque

from gateway._kernels import ring
from gateway.serving.channel import Channel, Message

log = logging.getLogger("gateway.worker")

ORPHAN_BACKSTOP_S = 60.0
"""How long after the supervisor's end, on top of the grace, a worker stays for a front end that hangs."""


class Mailbox:
    """Reads the channels in a thread of its own, and wakes the worker for each message.

    Args:
        supervisor: the channel to the supervisor, whose end makes this process an orphan.
        grace_s: how long an orphan stays for its front ends.
    """

    def __init__(self, supervisor: Channel, consumer: ring.Consumer, grace_s: float) -> None:
        self.letters: deque[tuple[Channel, Message | None, list[int]]] = deque()
        self._consumer = consumer
        self._supervisor = supervisor
        self._orphan_s = grace_s + ORPHAN_BACKSTOP_S
        self._arrived = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(supervisor, selectors.EVENT_READ, supervisor)
        self._orphaned = False

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="mailbox", daemon=True).start()

    def wait(self) -> None:
        """Until the next letter, out of sight of front ends: their wake-ups go to other workers."""
        self._arrived.wait()
        self._arrived.clear()

    def _read(self) -> None:
        try:
            self._read_for_ever()
        except Exception:
            log.exception("the mailbox failed; a worker that cannot hear is better replaced")
            os._exit(1)

    def _read_for_ever(self) -> None:
        while True:
            ready = self._selector.select(self._orphan_s if self._orphaned else None)
            if not ready:
                # The supervisor is gone, and a front end holds on to nothing that we can serve.
                os._exit(0)
            for key, _events in ready:
                channel: Channel = key.data
                received = channel.receive()
                if received is None:
                    self._selector.unregister(channel)
                    self._orphaned |= channel is self._supervisor
                    self.letters.append((channel, None, []))
                else:
                    message, fds = received
                    if message["op"] == "frontend":
                        frontend = Channel.from_fd(fds[0])
                        self._selector.register(frontend, selectors.EVENT_READ, frontend)
                        self.letters.append((frontend, message, []))
                    else:
                        self.letters.append((channel, message, fds))
                self._arrived.set()
                self._consumer.nudge()
