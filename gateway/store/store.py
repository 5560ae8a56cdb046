"""The store. Everything that one decision changes goes into one `Store.write`, before it is acted on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, Select, Table, delete, func, insert, select, true, update

from gateway.clock import steady_s
from gateway.errors import Conflict, InvalidRequest
from gateway.store import tables
from gateway.store.changes import Change
from gateway.store.engine import open_engine, reading, writing
from gateway.store.records import (
    AuditRecord,
    Document,
    EventRecord,
    KeyRecord,
    ModelRecord,
    ReplayRecord,
    RolloutRecord,
    VersionRecord,
)
from gateway.store.secret import server_secret

PAGE = 100
"""Entries of a list whose reader does not say how many it wants."""

REPLAY_S = 86_400.0
"""Time that the answer to a POST is kept for who sends it again."""

UNANSWERED_S = 3600.0
"""Time after which a POST that was never answered may be sent again: whoever carried it out is gone."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Store:
    """The state of a gateway. One thread uses it at a time; `AsyncStore` sees to that.

    Every method raises Unavailable when the database gives no answer in time. What was written is durable
    when a method returns.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql://…``.
        wall_s: the wall clock, in seconds; ages are better not measured by one that jumps.
    """

    def __init__(self, url: str, wall_s: Callable[[], float] = steady_s) -> None:
        self._url = url
        self._wall_s = wall_s
        self._opened: Engine | None = None

    def open(self) -> None:
        """Connect, and bring the schema up to date. ConfigurationError, one line, when it cannot be."""
        self._opened = open_engine(self._url)

    def close(self) -> None:
        """Disconnect. Harmless when it is not open."""
        if self._opened is not None:
            self._opened.dispose()
            self._opened = None

    def revision(self) -> int:
        """A number that grows with every `write`, also one of another process."""
        with reading(self._engine) as connection:
            return int(connection.scalar(select(tables.changes.c.revision)) or 0)

    def models(self) -> list[ModelRecord]:
        """By name."""
        query = select(tables.models).order_by(tables.models.c.name)
        return self._records(ModelRecord, query)

    def versions(self) -> list[VersionRecord]:
        """Of all models, by model and number."""
        columns = tables.versions.c
        query = select(tables.versions).order_by(columns.model, columns.number)
        return self._records(VersionRecord, query)

    def rollouts(
        self,
        models: Collection[str] | None = None,
        active_only: bool = False,
        before: str | None = None,
        limit: int = PAGE,
    ) -> list[RolloutRecord]:
        """Newest first.

        Args:
            models: only theirs.
            active_only: only those that have not ended.
            before: the id of the last one of the page before. InvalidRequest when these have none such.
            limit: how many at most.
        """
        columns = tables.rollouts.c
        query = _rollouts().order_by(columns.serial.desc()).limit(limit)
        is_theirs = true() if models is None else columns.model.in_(models)
        query = query.where(is_theirs)
        if active_only:
            query = query.where(columns.is_active)
        with reading(self._engine) as connection:
            if before is not None:
                last = select(columns.serial).where(columns.id == before, is_theirs)
                serial = connection.scalar(last)
                if serial is None:
                    raise InvalidRequest("after: expected the id of a rollout of this list")
                query = query.where(columns.serial < serial)
            return [RolloutRecord(**row) for row in connection.execute(query).mappings()]

    def rollout(self, id: str) -> RolloutRecord | None:  # noqa: A002 - it is the field's name
        """One rollout; None when there is none with this id."""
        query = _rollouts().where(tables.rollouts.c.id == id)
        return next(iter(self._records(RolloutRecord, query)), None)

    def events(
        self,
        after: int = 0,
        model: str | None = None,
        rollout: str | None = None,
        limit: int = PAGE,
    ) -> list[EventRecord]:
        """Oldest first, from the one after an id. Nothing is ever added before what was read once."""
        query = _of(_after(tables.events, after, limit), model, rollout)
        return self._records(EventRecord, query)

    def newest_events(
        self, model: str | None = None, rollout: str | None = None, limit: int = PAGE
    ) -> list[EventRecord]:
        """The last ones, oldest first."""
        query = select(tables.events).order_by(tables.events.c.id.desc()).limit(limit)
        return self._records(EventRecord, _of(query, model, rollout))[::-1]

    def audit(self, after: int = 0, limit: int = PAGE) -> list[AuditRecord]:
        """Oldest first, from the one after an id."""
        return self._records(AuditRecord, _after(tables.audit, after, limit))

    def keys(self) -> list[KeyRecord]:
        """Also revoked and expired ones, oldest first."""
        columns = tables.keys.c
        return self._records(KeyRecord, select(tables.keys).order_by(columns.created_s, columns.id))

    def key(self, id: str) -> KeyRecord | None:  # noqa: A002
        """One key; None when there is none with this id."""
        query = select(tables.keys).where(tables.keys.c.id == id)
        return next(iter(self._records(KeyRecord, query)), None)

    def write(self, *changes: Change) -> tuple[int, ...]:
        """Make all of `store.changes` in their order, or none of them.

        Returns:
            The ids of the events among them, in their order.

        Raises:
            PreconditionFailed: a model has another revision than was expected.
            Conflict: a model would have two active rollouts.
            NotFound: a key that is to be revoked is not there.
        """
        with writing(self._engine) as connection:
            counter = tables.changes.c.revision
            connection.execute(update(tables.changes).values(revision=counter + 1))
            given = [change.apply(connection) for change in changes]
        return tuple(id_ for id_ in given if id_ is not None)

    def remember(self, actor: str, key: str, request: str) -> ReplayRecord | None:
        """Begin a POST with an ``Idempotency-Key``.

        Args:
            actor: who asks.
            key: that they chose.
            request: SHA-256 of method, path and body, in hex.

        Returns:
            None: it is new, and must end with `answered` or `forget`. Otherwise its first answer.

        Raises:
            Conflict: the key came with another request, or its first one is still being carried out.
        """
        now_s = self._wall_s()
        replays = tables.replays
        with writing(self._engine) as connection:
            is_over = replays.c.at_s <= now_s - REPLAY_S
            is_left = (replays.c.status == 0) & (replays.c.at_s <= now_s - UNANSWERED_S)
            connection.execute(delete(replays).where(is_over | is_left))
            row = (
                connection.execute(select(replays).where(*_is_replay(actor, key)))
                .mappings()
                .first()
            )
            if row is None:
                reserved = {"actor": actor, "key": key, "request": request, "at_s": now_s}
                connection.execute(insert(replays).values(**reserved, status=0, body={}))
                return None
        first = ReplayRecord(**row)
        if first.request != request:
            raise Conflict("this Idempotency-Key came with another request: choose a new one")
        if not first.status:
            raise Conflict("the first request with this Idempotency-Key is not answered yet")
        return first

    def answered(self, actor: str, key: str, status: int, body: Document) -> None:
        """Keep the answer to what `remember` began."""
        with writing(self._engine) as connection:
            is_it = _is_replay(actor, key)
            values = {"status": status, "body": body}
            connection.execute(update(tables.replays).where(*is_it).values(values))

    def forget(self, actor: str, key: str) -> None:
        """Let what `remember` began be tried again: nothing came of it."""
        with writing(self._engine) as connection:
            connection.execute(delete(tables.replays).where(*_is_replay(actor, key)))

    def forget_unanswered(self) -> None:
        """Let all be tried again that was not answered when the gateway died.

        For whoever is the only one to answer: at its start, with the lease where there is one.
        """
        with writing(self._engine) as connection:
            connection.execute(delete(tables.replays).where(tables.replays.c.status == 0))

    def lease(self, name: str, holder: str, ttl_s: float) -> bool:
        """Take a lease, or hold it longer; whether ``holder`` has it from now on for ``ttl_s``.

        Args:
            name: what for.
            holder: who wants it, unique among the processes that share the database.
            ttl_s: how long, by the clock of the database, which is the same for all.
        """
        leases = tables.leases
        with writing(self._engine) as connection:
            now_s = self._database_s(connection)
            row = connection.execute(select(leases).where(leases.c.name == name)).first()
            if row is not None and row.holder != holder and row.until_s > now_s:
                return False
            _drop_lease(connection, name)
            values = {"name": name, "holder": holder, "until_s": now_s + ttl_s}
            connection.execute(insert(leases).values(values))
            return True

    def release(self, name: str, holder: str) -> None:
        """Give a lease back; harmless when another has it."""
        with writing(self._engine) as connection:
            leases = tables.leases.c
            is_it = (leases.name == name) & (leases.holder == holder)
            connection.execute(delete(tables.leases).where(is_it))

    def _database_s(self, connection: Connection) -> float:
        """The clock that all who share the database agree on; those who share a file have one machine."""
        if connection.dialect.name == "sqlite":
            return self._wall_s()
        return float(connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0)

    def secret(self, folder: Path) -> bytes:
        """The server's own 32 random bytes: see `secret.server_secret`."""
        return server_secret(folder)

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            raise RuntimeError("the store is not open")
        return self._opened

    def _records(self, made: Callable[..., _T], query: Select[Any]) -> list[_T]:
        with reading(self._engine) as connection:
            return [made(**row) for row in connection.execute(query).mappings()]


class AsyncStore:
    """A store for an event loop: its methods run one after another, in a thread of their own.

    Use: ``await store.call(Store.write, change)``.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def open(self) -> None:
        """See `Store.open`."""
        await self.call(Store.open)

    async def close(self) -> None:
        """Disconnect, after everything that was called before. It cannot be opened again."""
        await self.call(Store.close)
        self._thread.shutdown()

    async def call(
        self, method: Callable[Concatenate[Store, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Run a method of `Store` in the thread. Whoever stops waiting does not stop it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, lambda: method(self._store, *args, **kwargs)
        )


def _rollouts() -> Select[Any]:
    columns = tables.rollouts.c
    return select(columns.id, columns.model, columns.is_active, columns.document)


def _after(table: Table, after: int, limit: int) -> Select[Any]:
    return select(table).where(table.c.id > after).order_by(table.c.id).limit(limit)


def _of(events: Select[Any], model: str | None, rollout: str | None) -> Select[Any]:
    """Those of a model, of a rollout, or all."""
    columns = tables.events.c
    if model is not None:
        events = events.where(columns.model == model)
    return events if rollout is None else events.where(columns.rollout == rollout)


def _is_replay(actor: str, key: str) -> tuple[Any, ...]:
    return tables.replays.c.actor == actor, tables.replays.c.key == key


def _drop_lease(connection: Connection, name: str) -> None:
    connection.execute(delete(tables.leases).where(tables.leases.c.name == name))
