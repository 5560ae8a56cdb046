"""The two databases that a store can be in, and what differs between them.

Writing transactions follow one another, by SQLite's own lock or an advisory one in PostgreSQL. Ids that
ascend within them then become visible in their order, so that whoever has read up to an event never
misses one before it; and to look and then write needs no upserts and no retries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Text,
    column,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    table,
)
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
)

from gateway.errors import ConfigurationError, Unavailable
from gateway.store.migrations import VERSION_TABLE, newest

SQLITE, POSTGRESQL = "sqlite:///", "postgresql://"

LOCK_TIMEOUT_S = 10
"""Longest wait for another process's transaction, and for a connection."""
STATEMENT_TIMEOUT_S = 30
"""Longest that PostgreSQL may take for a statement."""

_WRITES = "gateway_writes"
_ADVISORY_LOCK = 0x67617465776179  # "gateway"; the database is the gateway's own


def open_engine(url: str) -> Engine:
    """Connect, and bring the schema up to date; processes that do so at once wait for each other.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql://…``.

    Raises:
        ConfigurationError: with one line, when this cannot be done.
    """
    if url.startswith(SQLITE):
        engine = _sqlite(url.removeprefix(SQLITE))
    elif url.startswith(POSTGRESQL):
        engine = _postgresql(url)
    else:
        raise ConfigurationError(f"state: expected {SQLITE}PATH or {POSTGRESQL}…")
    try:
        _migrate(engine)
    except DBAPIError as error:
        engine.dispose()
        reason = " ".join(str(error.orig).split())
        raise ConfigurationError(f"state: the database cannot be used: {reason}") from None
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads. Raises Unavailable when the database cannot be asked."""
    with _told(), engine.begin() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that nobody else writes during, and that is durable when this ends without an error.

    Raises Unavailable when the database cannot be written; then nothing was, as far as is known.
    """
    with _told(), engine.connect() as plain:
        connection = plain.execution_options(**{_WRITES: True})
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
            yield connection


@contextmanager
def _told() -> Iterator[None]:
    """What went wrong with the database rather than with us, as an error that may pass."""
    try:
        yield
    except DBAPIError as error:
        mishaps = (OperationalError, InterfaceError, InternalError)
        if isinstance(error, mishaps) or type(error) is DatabaseError:
            raise Unavailable("the state database gives no answer: try again later") from error
        raise


def _sqlite(path: str) -> Engine:
    if not path:
        raise ConfigurationError(f"state: expected a path after {SQLITE}")
    file = Path(path)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives the files that it makes beside this one the same mode.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"state: the database file cannot be written: {reason}") from None
    # Not parsed as a URL: a path may hold "?" and "%".
    url = URL.create("sqlite", database=path)
    engine = create_engine(
        url, pool_size=1, max_overflow=0, connect_args={"timeout": LOCK_TIMEOUT_S}
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `_begin` does
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that began by reading cannot wait for a writer: it would have read the past.
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(text: str) -> Engine:
    try:
        url = make_url(text).set(drivername="postgresql+psycopg")
        engine = create_engine(
            url.update_query_dict({"connect_timeout": str(LOCK_TIMEOUT_S)} | dict(url.query)),
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",
        )
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"state: expected {POSTGRESQL}USER:PASSWORD@HOST:PORT/DATABASE"
        ) from None
    except ImportError:
        raise ConfigurationError(
            "state: PostgreSQL needs a driver: pip install 'inference-gateway[postgres]'"
        ) from None

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
        connection.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'")
        connection.commit()

    return engine


def _migrate(engine: Engine) -> None:
    with engine.connect() as plain:
        connection = plain.execution_options(**{_WRITES: True})
        with connection.begin():
            _lock_and_check(connection)
            made = None
            if inspect(connection).has_table(VERSION_TABLE):
                noted = table(VERSION_TABLE, column("version_num", Text))
                made = connection.scalar(select(noted.c.version_num))
            if made != newest():
                from gateway.store.migrate import migrate

                migrate(connection, made)


def _lock_and_check(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
        return
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    if found != "ok":
        raise ConfigurationError("state: the database file is damaged: restore it from a backup")
