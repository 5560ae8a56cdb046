"""The tables, as the newest migration leaves them. Columns are called as the fields of `store.records`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.types import TypeDecorator

metadata = MetaData()

# SQLite counts up only a column that is called INTEGER, whose values have 64 bits too.
_Serial = BigInteger().with_variant(Integer, "sqlite")


class Json(TypeDecorator[Any]):
    """A value as JSON text; None is NULL.

    Args:
        made: what a value that was read is made into.
    """

    impl = Text
    cache_ok = True

    def __init__(self, made: Callable[[Any], Any] = dict) -> None:
        super().__init__()
        self.made = made

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """For the database."""
        return None if value is None else orjson.dumps(value, default=dict).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """From the database."""
        return None if value is None else self.made(orjson.loads(value))


class Words(TypeDecorator[str]):
    """Text for people, which may hold what others wrote: what no database takes is replaced."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Without lone surrogates, which are not UTF-8, and NUL, which PostgreSQL refuses."""
        if value is None:
            return None
        return value.encode("utf-8", "replace").decode().replace("\0", "�")


changes = Table(
    "changes",
    metadata,
    Column("one", Integer, CheckConstraint("one = 1", name="only_one"), primary_key=True),
    Column("revision", BigInteger, nullable=False),
)
"""One row: how many writes there were."""

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("route", Json()),
    Column("labels", Json(), nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("model", Text, ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("source", Words, nullable=False),
    Column("registered_s", Double, nullable=False),
    Column("is_wanted", Boolean),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("serial", _Serial, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("is_active", Boolean, nullable=False),
    Column("document", Json(), nullable=False),
    Index(
        "one_active_rollout",
        "model",
        unique=True,
        sqlite_where=text("is_active"),
        postgresql_where=text("is_active"),
    ),
    Index("rollouts_of_model", "model", "serial"),
    sqlite_autoincrement=True,
)
"""They outlive their models: no foreign key."""

events = Table(
    "events",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("at_s", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("actor", Words, nullable=False),
    Column("text", Words, nullable=False),
    Column("rollout", Text, nullable=False),
    Column("numbers", Json(), nullable=False),
    Index("events_of_model", "model", "id"),
    Index("events_of_rollout", "rollout", "id"),
    sqlite_autoincrement=True,
)
"""Append-only, by triggers."""

audit = Table(
    "audit",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("at_s", Double, nullable=False),
    Column("actor", Words, nullable=False),
    Column("action", Text, nullable=False),
    Column("resource", Words, nullable=False),
    Column("before", Json()),
    Column("after", Json()),
    sqlite_autoincrement=True,
)
"""Append-only, by triggers."""

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Words, nullable=False),
    Column("role", Text, nullable=False),
    Column("models", Json(tuple), nullable=False),
    Column("digest", Text, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double),
    Column("revoked_s", Double),
)

replays = Table(
    "replays",
    metadata,
    Column("actor", Words, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("body", Json(), nullable=False),
    Column("at_s", Double, nullable=False),
    Index("replays_by_age", "at_s"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("until_s", Double, nullable=False),
)
