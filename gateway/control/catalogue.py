"""What the registry knows of versions beside those that are loaded: digests, sources, what is wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gateway.clock import wall_s
from gateway.control.artifacts import digest_of
from gateway.control.journal import Journal, event
from gateway.control.version import VersionSupervision
from gateway.errors import GatewayError
from gateway.serving.routes import VersionState
from gateway.store.changes import PutVersion
from gateway.store.records import VersionRecord

log = logging.getLogger("gateway.control")

REPOSITORY = "repository"
"""The source of versions that lay in the repository."""


class Catalogue:
    """The records of versions, in memory as in the store. Belongs to the event loop.

    Args:
        journal: where they are written.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._records: dict[tuple[str, int], VersionRecord] = {}
        self._digesting: set[asyncio.Task[None]] = set()
        self._one_by_one = asyncio.Semaphore(1)

    def replace(self, records: Iterable[VersionRecord]) -> None:
        """Take these for all there are."""
        self._records = {(record.model, record.number): record for record in records}

    def get(self, model: str, number: int) -> VersionRecord | None:
        """A version's record."""
        return self._records.get((model, number))

    def of(self, model: str) -> Iterator[VersionRecord]:
        """The records of a model's versions."""
        return (record for (name, _), record in self._records.items() if name == model)

    def keep(self, record: VersionRecord) -> None:
        """It was written."""
        self._records[record.model, record.number] = record

    def drop(self, model: str, number: int | None = None) -> None:
        """One version, or all of a model, was dropped."""
        for key in [k for k in self._records if k[0] == model and number in (None, k[1])]:
            del self._records[key]

    def loaded(self, version: VersionSupervision) -> None:
        """A version is READY: find out its digest, and whether it is what it was. Soon, beside the loop."""
        task = asyncio.get_running_loop().create_task(self._digest(version))
        self._digesting.add(task)
        task.add_done_callback(self._digesting.discard)

    def close(self) -> None:
        """Leave the rest for the next start."""
        for task in self._digesting:
            task.cancel()

    async def _digest(self, version: VersionSupervision) -> None:
        model, number = version.model, version.number
        try:
            async with self._one_by_one:
                digest, nbytes = await asyncio.to_thread(digest_of, version.path)
            known = self.get(model, number)
            if known is not None and known.digest == digest:
                return
            if known is None:
                record = VersionRecord(model, number, digest, nbytes, REPOSITORY, wall_s())
                await self._journal.write(PutVersion(record))
            elif known.source == REPOSITORY:
                # Whoever lays files into the repository may replace them before a start.
                record = replace(known, digest=digest, nbytes=nbytes)
                text = f"version {number} in the repository has other content than before"
                await self._journal.write(PutVersion(record), event("version.changed", model, text))
            else:
                if version.state is VersionState.READY:  # it may have gone meanwhile
                    version.fail("its file is not the one that was registered")
                return
            self.keep(record)
        except OSError as error:
            log.error("model '%s' version %d: no digest: %s", model, number, error.strerror)
        except GatewayError as error:
            log.error("model '%s' version %d: %s", model, number, error.message)
