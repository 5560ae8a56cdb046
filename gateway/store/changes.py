"""What `Store.write` can be asked to change. All changes of one write are made, or none."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Connection, Table, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from gateway.errors import Conflict, NotFound, PreconditionFailed
from gateway.store import tables
from gateway.store.records import (
    AuditRecord,
    EventRecord,
    KeyRecord,
    ModelRecord,
    RolloutRecord,
    VersionRecord,
)


class Change(Protocol):
    """One change."""

    def apply(self, connection: Connection) -> int | None:
        """Make it, in a transaction that nobody else writes in; the id of an event that it added."""


@dataclass(frozen=True, slots=True)
class PutModel:
    """Write a model as it is to be, its ``revision`` as well.

    Raises PreconditionFailed when ``expected_revision`` is given and is not the one that is stored; a model
    that is not stored has revision 0.
    """

    record: ModelRecord
    expected_revision: int | None = None

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        is_it = tables.models.c.name == self.record.name
        stored = connection.scalar(select(tables.models.c.revision).where(is_it)) or 0
        if self.expected_revision not in (None, stored):
            raise PreconditionFailed(
                f"the model has revision {stored}, not {self.expected_revision}: read it again"
            )
        _put(connection, tables.models, is_it, _values(self.record))


@dataclass(frozen=True, slots=True)
class DropModel:
    """Forget a model and its versions; its rollouts and events stay. Without it nothing happens."""

    name: str

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        connection.execute(delete(tables.models).where(tables.models.c.name == self.name))


@dataclass(frozen=True, slots=True)
class PutVersion:
    """Write a version. A model that is not stored is made, with revision 0."""

    record: VersionRecord

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        name = self.record.model
        models = tables.models
        if connection.scalar(select(models.c.name).where(models.c.name == name)) is None:
            connection.execute(insert(models).values(_values(ModelRecord(name))))
        is_it = _is_version(name, self.record.number)
        _put(connection, tables.versions, is_it, _values(self.record))


@dataclass(frozen=True, slots=True)
class DropVersion:
    """Forget a version. Without it nothing happens."""

    model: str
    number: int

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        connection.execute(delete(tables.versions).where(_is_version(self.model, self.number)))


@dataclass(frozen=True, slots=True)
class PutRollout:
    """Write a rollout. Raises Conflict when it is active and another one of the model is."""

    record: RolloutRecord

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        is_it = tables.rollouts.c.id == self.record.id
        try:
            _put(connection, tables.rollouts, is_it, _values(self.record))
        except IntegrityError:
            raise Conflict(
                "the model has another active rollout: end it by abort or promote first"
            ) from None


@dataclass(frozen=True, slots=True)
class AddEvent:
    """Add an event; its id is given here."""

    record: EventRecord

    def apply(self, connection: Connection) -> int:
        """See `Change`."""
        return _add(connection, tables.events, self.record)


@dataclass(frozen=True, slots=True)
class AddAudit:
    """Add an entry to the audit log; its id is given here."""

    record: AuditRecord

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        _add(connection, tables.audit, self.record)


@dataclass(frozen=True, slots=True)
class PutKey:
    """Write a key."""

    record: KeyRecord

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        is_it = tables.keys.c.id == self.record.id
        _put(connection, tables.keys, is_it, _values(self.record))


@dataclass(frozen=True, slots=True)
class RevokeKey:
    """Revoke a key; one that was revoked keeps its time. Raises NotFound without such a key."""

    id: str
    at_s: float

    def apply(self, connection: Connection) -> None:
        """See `Change`."""
        keys = tables.keys
        is_it = keys.c.id == self.id
        if connection.scalar(select(keys.c.id).where(is_it)) is None:
            raise NotFound("there is no key with this id: list the keys")
        is_valid = keys.c.revoked_s.is_(None)
        connection.execute(update(keys).where(is_it, is_valid).values(revoked_s=self.at_s))


def _is_version(model: str, number: int) -> ColumnElement[bool]:
    return (tables.versions.c.model == model) & (tables.versions.c.number == number)


def _values(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _put(
    connection: Connection, table: Table, is_it: ColumnElement[bool], values: dict[str, Any]
) -> None:
    """Update or insert: nobody else writes in between, so that no dialect's own upsert is needed."""
    if not connection.execute(update(table).where(is_it).values(values)).rowcount:
        connection.execute(insert(table).values(values))


def _add(connection: Connection, table: Table, record: EventRecord | AuditRecord) -> int:
    values = _values(record)
    del values["id"]
    given = connection.execute(insert(table).values(values)).inserted_primary_key
    if given is None:
        raise RuntimeError("the database gave no id to what was added")
    return int(given[0])
