"""How the commands ask the admin port: one request after the other, each on a connection of its own."""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

import click

from gateway.cli.bench_server import printable
from gateway.client.addresses import parse_addresses
from gateway.client.errors import BadAnswer, from_status
from gateway.errors import (
    ConfigurationError,
    Conflict,
    GatewayError,
    PreconditionFailed,
    Unauthorized,
    Unavailable,
)
from gateway.names import NAME
from gateway.security.keys import BEARER, key_id

DEFAULT_URL = "http://127.0.0.1:8081"

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 900.0
"""Time between two pieces of an answer: a load is answered when it is done."""

MAX_ANSWER_BYTES = 64 << 20
"""Longest answer that is read; the largest are lists of events."""

PAGE_ENTRIES = 200
"""Entries that are asked for at a time, where a whole list is wanted."""

BLOCK_BYTES = 1 << 20
"""Of a file, how much is read and sent at a time."""

Document = dict[str, Any]


class Unreachable(Unavailable):
    """Nobody answers at the admin port's address, or no longer."""

    code = "unreachable"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of status 2xx: its ETag, empty where it has none, and its JSON, {} where it has none."""

    etag: str
    document: Document


class AdminClient:
    """Asks one server's admin port.

    Args:
        url: of the admin port, with or without ``http://``.
        key: an API key; None: none is sent.

    Raises:
        ConfigurationError: one of them cannot be read.
    """

    def __init__(self, url: str, key: str | None) -> None:
        try:
            (address,) = parse_addresses(url)
        except ValueError as error:
            raise ConfigurationError(f"--admin-url: {error}") from None
        self.url = address.url
        self._parts = urlsplit(address.url)
        if key is not None and key_id(key) is None:
            raise ConfigurationError(
                "--key or GATEWAY_API_KEY: expected a key that begins with igw_"
            )
        self._headers = {} if key is None else {"Authorization": BEARER + key}

    def get(self, path: str, **query: object) -> Document:
        """A resource beneath ``/admin/v1``; a query value of None is left out."""
        return self._ask("GET", _with_query(path, query)).document

    def all_of(self, path: str, name: str, **query: object) -> list[Document]:
        """A whole list, page after page; ``name`` is its key in each."""
        entries: list[Document] = []
        after: object = None
        while True:
            page = self.get(path, limit=PAGE_ENTRIES, after=after, **query)
            entries += page[name]
            after = page.get("next")
            if after is None or not page[name]:
                return entries

    def etag(self, model: str) -> str:
        """What a change of the model, or of anything beneath it, is held against."""
        return self._ask("GET", model_path(model)).etag

    def post(self, path: str, body: Document | None = None, etag: str | None = None) -> Document:
        """Create something, or do something with what is there.

        Args:
            path: beneath ``/admin/v1``.
            body: JSON.
            etag: `etag` of what is changed, ``*`` for whatever is there; None for what is new.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex, **_if_match(etag)}
        return self._ask("POST", path, body, headers).document

    def put(self, path: str, body: Document, etag: str | None = None) -> Document:
        """Set something; for ``etag`` see `post`."""
        return self._ask("PUT", path, body, _if_match(etag)).document

    def delete(self, path: str, etag: str) -> Document:
        """Remove something; for ``etag`` see `post`."""
        return self._ask("DELETE", path, None, _if_match(etag)).document

    def upload(self, path: str, file: Path) -> Document:
        """Put a file, with its digest, by which a broken upload is found.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                stream.seek(0)
                headers = {
                    "Content-Type": "application/octet-stream",
                    "Content-Length": str(file.stat().st_size),
                    "x-content-sha256": digest,
                }
                return self._send("PUT", path, stream, headers).document
        except OSError as error:
            raise ConfigurationError(f"{file}: cannot be read: {error.strerror}") from None

    def _ask(
        self,
        method: str,
        path: str,
        body: Document | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer to a request. One that may be repeated is, once, where nobody answers it."""
        raw = None if body is None else json.dumps(body).encode()
        sent = {} if raw is None else {"Content-Type": "application/json"}
        sent.update(headers or {})
        is_repeatable = method == "GET" or "Idempotency-Key" in sent
        try:
            return self._send(method, path, raw, sent)
        except Unreachable:
            if not is_repeatable:
                raise
        return self._send(method, path, raw, sent)

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | BinaryIO | None,
        headers: Mapping[str, str],
    ) -> Answer:
        target = f"{self._parts.path}/admin/v1{path}"
        try:
            with closing(self._connection()) as connection:
                connection.connect()
                connection.sock.settimeout(ANSWER_TIMEOUT_S)
                # It may refuse a long body before the end of it: its answer says why.
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, target, body, {**self._headers, **headers})
                answer = connection.getresponse()
                raw = answer.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or "no answer"
            raise Unreachable(
                f"{self.url} does not answer ({reason}): is the server running, and is this its "
                "admin port? --admin-url names another"
            ) from None
        if len(raw) > MAX_ANSWER_BYTES:
            raise BadAnswer(f"{self.url} answers with more than {MAX_ANSWER_BYTES} bytes")
        document = _document(raw)
        if not 200 <= answer.status < 300:
            raise _refusal(answer.status, document)
        if document is None:
            raise BadAnswer(
                f"{self.url} answers with something else than JSON: is it an admin port?"
            )
        return Answer(answer.headers.get("ETag", ""), document)

    def _connection(self) -> http.client.HTTPConnection:
        kind = (
            http.client.HTTPConnection
            if self._parts.scheme == "http"
            else http.client.HTTPSConnection
        )
        return kind(
            self._parts.hostname or "",
            self._parts.port,
            timeout=CONNECT_TIMEOUT_S,
            blocksize=BLOCK_BYTES,
        )


def model_path(model: str, *more: object) -> str:
    """The path of a model, or of what is beneath it, quoted."""
    return "/models/" + "/".join(quote(str(part), safe=":") for part in (model, *more))


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}


def _with_query(path: str, query: Mapping[str, object]) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _document(raw: bytes) -> Document | None:
    """The JSON object; {} for an empty answer, None for anything else."""
    if not raw:
        return {}
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _refusal(status: int, document: Document | None) -> GatewayError:
    """The error that an answer stands for, with what the user can do about it."""
    said = printable(str((document or {}).get("error", f"the server answers {status}")))
    match status:
        case Unauthorized.status:
            return Unauthorized(f"{said}; give a key with --key or GATEWAY_API_KEY")
        case PreconditionFailed.status:
            return PreconditionFailed(
                "somebody else, or a rollout, has changed the model meanwhile: nothing was done; "
                "look at it and try again"
            )
        case Conflict.status:
            return Conflict(said)
    return from_status(status, said, (document or {}).get("code"))


def _named(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A name that fits the grammar, so that it cannot lead to another resource."""
    if value is not None and NAME.fullmatch(value) is None:
        raise click.BadParameter("expected letters, digits, '_', '.' and '-', at most 64")
    return value


def name_argument(name: str, *, required: bool = True) -> Callable[..., Any]:
    """An argument of a command that is the name or the id of something."""
    return click.argument(name, callback=_named, required=required)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--json``, the parameter ``is_json``."""
    return click.option("--json", "is_json", is_flag=True, help="One JSON document on stdout.")(
        command
    )


def address_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--admin-url`` and ``--key``, the parameters ``admin_url`` and ``key``."""
    with_key = click.option(
        "--key",
        envvar="GATEWAY_API_KEY",
        metavar="KEY",
        help="API key [$GATEWAY_API_KEY, which others cannot see in the list of processes].",
    )(command)
    return click.option(
        "--admin-url",
        envvar="GATEWAY_ADMIN_URL",
        metavar="URL",
        default=DEFAULT_URL,
        help=f"The server's admin port [$GATEWAY_ADMIN_URL or {DEFAULT_URL}].",
    )(with_key)


def asks_server(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a command that asks a server, and gives it the client as first argument."""

    @functools.wraps(command)
    def with_client(admin_url: str, key: str | None, **parameters: Any) -> Any:
        return command(AdminClient(admin_url, key), **parameters)

    return address_options(json_option(with_client))
