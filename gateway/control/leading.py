"""Who leads rollouts where several gateways share one database: the one that holds a lease.

A file of SQLite has one gateway, which needs none. The lease outlives its holder by `TTL_S` at most. It is
timed by the database's clock, and here from before it was asked for by one that does not jump: whoever
holds it ceases to lead before another may begin.
"""

from __future__ import annotations

import secrets

from gateway.clock import steady_s
from gateway.errors import Unavailable
from gateway.store.place import SQLITE
from gateway.store.store import AsyncStore, Store

LEASE = "rollouts"

TTL_S = 10.0
"""Time that the lease of a gateway that is gone keeps others from leading."""

RENEW_S = 3.0
"""Pause between two renewals; three may fail before the lease is lost."""


class Leadership:
    """This gateway's claim to lead rollouts.

    Args:
        store: open.
        url: of its database.
    """

    def __init__(self, store: AsyncStore, url: str) -> None:
        self._store = store
        self._is_shared = not url.startswith(SQLITE)
        self._holder = secrets.token_hex(8)
        self._until_s = self._renewed_s = 0.0

    @property
    def is_held(self) -> bool:
        """Whether rollouts are led here."""
        return not self._is_shared or steady_s() < self._until_s

    def check(self) -> None:
        """Unavailable where another gateway leads."""
        if not self.is_held:
            raise Unavailable("another gateway leads the rollouts of this database: ask that one")

    async def renew(self) -> None:
        """Take the lease, or hold it longer, where it is time to."""
        now_s = steady_s()
        if not self._is_shared or now_s - self._renewed_s < RENEW_S:
            return
        self._renewed_s = now_s
        if await self._store.call(Store.lease, LEASE, self._holder, TTL_S):
            self._until_s = now_s + TTL_S

    async def give_up(self) -> None:
        """Let another one lead at once."""
        if self._is_shared and self._until_s:
            await self._store.call(Store.release, LEASE, self._holder)
