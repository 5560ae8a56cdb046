"""Outputs that do not fit a slot: the worker puts them into a memfd of their own and passes that on.

The descriptor goes over the channel between worker and front end before the slot is published, so it
is there when the front end meets a slot that says so. A worker is not trusted: the memfd must be sealed
against shrinking, or reading it could fault, and be as large as the outputs claim.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from mmap import mmap

from gateway.serving import memory
from gateway.serving.channel import Channel

MAX_SPILL_BYTES = 1 << 40
"""Most bytes of one batch's outputs; keeps a worker's claim from exhausting the address space."""

MAX_UNCLAIMED = 1024
"""Spills that nobody has claimed yet; bounds the descriptors that workers can make this process hold."""


class Spills:
    """The spilled outputs that workers have announced, and no slot has claimed yet."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], int] = {}  # descriptors by lane and slot

    def take(self, channel: Channel | None, lane: int, slot: int) -> mmap | None:
        """The outputs of a slot, mapped; None where its worker passed on nothing usable.

        Args:
            channel: to the worker that ran it; None when that was gone before.
            lane: number of the lane.
            slot: its index there.
        """
        if channel is not None:
            self._read(channel)
        fd = self._found.pop((lane, slot), None)
        if fd is None:
            return None
        try:
            return _map(fd)
        finally:
            os.close(fd)

    def _read(self, channel: Channel) -> None:
        with suppress(BlockingIOError):
            while (received := channel.receive(wait=False)) is not None:
                message, fds = received
                lane, slot = message.get("lane"), message.get("slot")
                is_spill = message["op"] == "spill" and len(fds) == 1
                has_room = len(self._found) < MAX_UNCLAIMED
                if is_spill and has_room and isinstance(lane, int) and isinstance(slot, int):
                    self._put((lane, slot), fds[0])
                else:
                    for fd in fds:
                        os.close(fd)

    def _put(self, key: tuple[int, int], fd: int) -> None:
        unclaimed = self._found.pop(key, None)
        if unclaimed is not None:  # of a run whose answer nobody wanted any more
            os.close(unclaimed)
        self._found[key] = fd

    def close(self) -> None:
        """Give back what nobody claimed."""
        for fd in self._found.values():
            os.close(fd)
        self._found.clear()


def _map(fd: int) -> mmap | None:
    try:
        is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        nbytes = os.fstat(fd).st_size
        if not is_sealed or not 0 < nbytes <= MAX_SPILL_BYTES:
            return None
        return memory.map_read_only(fd, nbytes)
    except OSError:
        return None


@contextmanager
def viewed(spill: mmap) -> Iterator[memoryview]:
    """The bytes of a spill, which is unmapped at the end."""
    view = memoryview(spill)
    try:
        yield view
    finally:
        with suppress(BufferError):  # a view lives on in a traceback: unmapped with it
            view.release()
            spill.close()


def send(channel: Channel, lane: int, slot: int, fd: int) -> None:
    """Pass a slot's outputs on to its front end, before the slot is published."""
    channel.send("spill", (fd,), lane=lane, slot=slot)
