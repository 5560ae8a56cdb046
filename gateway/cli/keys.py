"""``gateway keys``: makes, lists and revokes API keys, on a running server or in its database.

The database is for the first key: beyond loopback a server does not start without one.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from gateway.cli import admin_tables as tables
from gateway.cli.admin_client import (
    AdminClient,
    Document,
    address_options,
    json_option,
    name_argument,
)
from gateway.errors import ConfigurationError, GatewayError
from gateway.names import NAME
from gateway.security.keys import Role, key_digest, make_key

if TYPE_CHECKING:
    from gateway.store.place import Place
    from gateway.store.records import AuditRecord, KeyRecord
    from gateway.store.store import Store

ACTOR = "command line"
"""Who changed the keys, in the audit log, where no server was asked."""

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class KeyBook(Protocol):
    """Where keys are kept. A key is shown as a `KeyRecord` without its digest."""

    def create(
        self, name: str, role: str, models: Sequence[str], expires_s: float | None
    ) -> tuple[Document, str]:
        """A new key, valid until then on the wall clock (None: for good), and its text."""

    def all(self) -> list[Document]:
        """Every key, revoked ones as well."""

    def revoke(self, key_id: str) -> Document:
        """End a key. NotFound: there is none with this id."""


class ServerKeys:
    """Those of a running server."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def create(
        self, name: str, role: str, models: Sequence[str], expires_s: float | None
    ) -> tuple[Document, str]:
        """See `KeyBook`."""
        body = {"name": name, "role": role, "models": list(models), "expires_s": expires_s}
        made = self._client.post("/keys", body)
        text = made.pop("key")
        if text is None:  # the first answer was lost, and the second never tells
            raise GatewayError(f"the key was made and got lost: revoke {made['id']}, make another")
        return made, text

    def all(self) -> list[Document]:
        """See `KeyBook`."""
        return self._client.all_of("/keys", "keys")

    def revoke(self, key_id: str) -> Document:
        """See `KeyBook`."""
        return self._client.delete(f"/keys/{key_id}", etag="*")


class StoredKeys:
    """Those in a database.

    Args:
        store: open.
        secret: the server's own.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self._secret = secret

    def create(
        self, name: str, role: str, models: Sequence[str], expires_s: float | None
    ) -> tuple[Document, str]:
        """See `KeyBook`."""
        from gateway.store.changes import AddAudit, PutKey
        from gateway.store.records import KeyRecord

        key_id, text = make_key()
        record = KeyRecord(
            id=key_id,
            name=name,
            role=role,
            models=tuple(models),
            digest=key_digest(self._secret, text),
            created_s=time.time(),
            expires_s=expires_s,
        )
        shown = _shown(record)
        self._store.write(PutKey(record), AddAudit(_audit("key.create", key_id, None, shown)))
        return shown, text

    def all(self) -> list[Document]:
        """See `KeyBook`."""
        return list(map(_shown, self._store.keys()))

    def revoke(self, key_id: str) -> Document:
        """See `KeyBook`."""
        from gateway.store.changes import AddAudit, RevokeKey

        before = self._store.key(key_id)
        seen = None if before is None else _shown(before)
        self._store.write(
            RevokeKey(key_id, time.time()),
            AddAudit(_audit("key.revoke", key_id, seen, None)),
        )
        return next(key for key in self.all() if key["id"] == key_id)


def _shown(record: KeyRecord) -> Document:
    return {name: value for name, value in asdict(record).items() if name != "digest"}


def _audit(
    action: str, key_id: str, before: Document | None, after: Document | None
) -> AuditRecord:
    from gateway.store.records import AuditRecord

    return AuditRecord(time.time(), ACTOR, action, f"keys/{key_id}", before, after)


@contextmanager
def _stored(state: str | None, repository: Path | None) -> Iterator[StoredKeys]:
    """The keys of the server that has these settings."""
    from gateway.store.store import Store

    place = _place(state, repository)
    store = Store(place.url)
    store.open()
    try:
        yield StoredKeys(store, store.secret(place.folder))
    finally:
        store.close()


def _place(state: str | None, repository: Path | None) -> Place:
    """Where a server with these settings has its database and its secret."""
    from gateway.settings import load_server_settings
    from gateway.store.place import SQLITE, STATE_FOLDER, place_at

    if repository is not None:
        settings = load_server_settings(model_repository=repository, state=state)
        return place_at(settings.state, repository / STATE_FOLDER)
    if state is None or not state.startswith(SQLITE):
        raise ConfigurationError("--state: of such a database, --model-repository is needed, too")
    return place_at(state, Path())


def _on_keys(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say where the keys are, and gives the command their `KeyBook`."""

    @functools.wraps(command)
    def with_book(
        admin_url: str,
        key: str | None,
        state: str | None,
        model_repository: Path | None,
        **parameters: Any,
    ) -> Any:
        if state is None and model_repository is None:
            return command(ServerKeys(AdminClient(admin_url, key)), **parameters)
        with _stored(state, model_repository) as book:
            return command(book, **parameters)

    with_repository = click.option(
        "--model-repository",
        metavar="DIR",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Instead of a server: the database of the one that serves DIR.",
    )(with_book)
    with_state = click.option(
        "--state", metavar="URL", help="Instead of a server: its database, as its setting says."
    )(with_repository)
    return address_options(json_option(with_state))


def _names(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    if not all(NAME.fullmatch(value) for value in values):
        raise click.BadParameter("expected the name of a model")
    return values


def _from_now(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """The moment that is a time such as ``12h`` or ``30d`` away, in seconds of the wall clock."""
    if value is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", value)
    if match is None:
        raise click.BadParameter("expected a time such as 12h or 30d")
    return time.time() + int(match[1]) * _SECONDS[match[2]]


@click.group("keys")
def keys() -> None:
    """API keys: who may see, change and ask."""


@keys.command("create")
@name_argument("name")
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    required=True,
    help="viewer reads; deployer also loads and rolls out; admin may do all; infer only asks models.",
)
@click.option(
    "--model",
    "models",
    metavar="M",
    callback=_names,
    multiple=True,
    help="Only for this model; may be repeated [all].",
)
@click.option("--expires", "expires_s", metavar="T", callback=_from_now, help="As 12h or 30d.")
@_on_keys
def create(
    book: KeyBook,
    name: str,
    role: str,
    models: tuple[str, ...],
    expires_s: float | None,
    *,
    is_json: bool,
) -> None:
    """Make a key and print it, and nothing else, on stdout: it is shown this once."""
    made, text = book.create(name, role, models, expires_s)
    tables.show({**made, "key": text}, is_json)
    if not is_json:
        click.echo(text)
        click.echo(f"Key {made['id']} of {name}, {role}. It cannot be shown again.", err=True)


@keys.command("list")
@_on_keys
def list_keys(book: KeyBook, *, is_json: bool) -> None:
    """Every key, without its secret."""
    found = book.all()
    tables.show({"keys": found}, is_json, lambda: tables.keys(found, time.time()))


@keys.command("revoke")
@name_argument("key_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_on_keys
def revoke(book: KeyBook, key_id: str, *, yes: bool, is_json: bool) -> None:
    """End a key for good, by its id."""
    if not yes:
        click.confirm(f"Revoke key {key_id} for good?", abort=True, err=True)
    revoked = book.revoke(key_id)
    tables.show(revoked, is_json, lambda: f"key {key_id} is revoked")
