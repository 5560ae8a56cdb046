"""What front ends may still hold of a version: slots of workers that are gone, and its lanes.

A front end is known by its index. It has to let go of a thing if it lived when the thing ended, and has
done so when it says it or dies: a process takes its lanes with it, and its successor never had them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from gateway._kernels import ring


class Outstanding:
    """The front ends that have yet to say something, from the moment in which they are asked."""

    def __init__(self, frontends: Iterable[int]) -> None:
        self._frontends = set(frontends)
        self._ended = asyncio.Event()
        self._check()

    def __contains__(self, frontend: int) -> bool:
        return frontend in self._frontends

    def settle(self, frontend: int) -> None:
        """It has said so, or is gone."""
        self._frontends.discard(frontend)
        self._check()

    async def wait(self) -> None:
        """Until none is left."""
        await self._ended.wait()

    def _check(self) -> None:
        if not self._frontends:
            self._ended.set()


class Holders:
    """The numbers of one version's workers, and who has not let go of them or of the version yet.

    A worker's number, its incarnation, marks the slots that it holds. It is used again only when no
    front end can still find a slot of its last bearer's.
    """

    def __init__(self) -> None:
        self._last_incarnation = 0
        self._living: set[int] = set()
        self._unreclaimed: dict[int, set[int]] = {}  # front ends, by a dead worker's incarnation
        self._undrained: Outstanding | None = None  # None until it is unloaded

    def next_incarnation(self) -> int:
        """A number for a worker that is about to start."""
        while True:
            self._last_incarnation = self._last_incarnation % ring.MAX_INCARNATION + 1
            in_use = self._living | self._unreclaimed.keys()
            if self._last_incarnation not in in_use:
                self._living.add(self._last_incarnation)
                return self._last_incarnation

    def worker_ended(self, incarnation: int, frontends: Iterable[int]) -> None:
        """A worker is gone, and these front ends are told so; none where no front end knew it."""
        self._living.discard(incarnation)
        undrained = self._undrained
        holders = {each for each in frontends if undrained is None or each in undrained}
        if holders:
            self._unreclaimed[incarnation] = holders

    def reclaimed(self, incarnation: int, frontend: int) -> None:
        """A front end holds nothing of this worker any more."""
        holders = self._unreclaimed.get(incarnation, set())
        holders.discard(frontend)
        if not holders:
            self._unreclaimed.pop(incarnation, None)

    def begin_drain(self, frontends: Iterable[int]) -> None:
        """The version is unloaded, and these front ends are told to let go of it."""
        self._undrained = Outstanding(frontends)

    def drained(self, frontend: int) -> None:
        """A front end holds no request, lane or worker of the version any more."""
        if self._undrained is not None:  # otherwise it speaks of what had this number before
            self.frontend_gone(frontend)

    def frontend_gone(self, frontend: int) -> None:
        """A front end's process has ended, and its lanes with it."""
        for incarnation in list(self._unreclaimed):
            self.reclaimed(incarnation, frontend)
        if self._undrained is not None:
            self._undrained.settle(frontend)

    async def wait_drained(self) -> None:
        """Until every front end has let go of the version that is unloaded."""
        if self._undrained is not None:
            await self._undrained.wait()
