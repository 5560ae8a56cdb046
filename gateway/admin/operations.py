"""What the API's operations are made of: one table registers them and describes them."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from gateway.admin.auth import Identity
from gateway.admin.schema import Nothing
from gateway.control.repository import parse_version
from gateway.errors import InvalidRequest
from gateway.names import NAME
from gateway.security.keys import Role
from gateway.security.origin import SAFE_METHODS

PREFIX = "/admin/v1"

_PARAMETER = re.compile(r"\{([a-z]+)\}")


class Match(enum.Enum):
    """Whether an operation is held against the revision of what is there."""

    NONE = "none"
    IF_GIVEN = "if given"  # it makes something new beneath the model
    IF_THERE = "if there"  # it needs If-Match where the model is known
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler answers.

    Attributes:
        document: for `documents.to_json`; None: there is no body.
        status: of the answer.
        revision: for ``ETag``; None: there is none.
        kept: what a repeated POST is answered instead of ``document``, where that holds a secret.
        headers: more of them.
    """

    document: Any
    status: int = 200
    revision: int | None = None
    kept: Any = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One request, checked.

    Attributes:
        http: the request; its body has been read, but for an upload's.
        identity: who is asking.
        revision: that ``If-Match`` named; None: whatever is there.
        body: an instance of `Operation.body`; None: it is an upload.
        query: an instance of `Operation.query`.
    """

    http: web.Request
    identity: Identity
    revision: int | None
    body: Any
    query: Any

    @property
    def actor(self) -> str:
        """For events and the audit log."""
        return self.identity.actor

    @property
    def model(self) -> str:
        """The model that the path names."""
        return self.http.match_info["model"]

    @property
    def version(self) -> int:
        """The version that the path names."""
        return int(self.http.match_info["version"])

    def name(self, parameter: str) -> str:
        """Another name of the path."""
        return self.http.match_info[parameter]


Handler = Callable[[Call], Awaitable[Answer | web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        method: of HTTP.
        path: the whole; names in braces are its parameters.
        summary: what it does, in a line.
        handler: does it.
        answer: type of the answer's document; None: it has no body.
        role: that is needed; None: anybody may.
        body: what the request's body is. Without fields the body may be left out.
        query: what the query is.
        match: see `Match`.
        statuses: of success.
        replays: whether an ``Idempotency-Key`` is honoured.
        is_upload: whether a body of bytes is taken as well.
        is_stream: whether it may answer with server-sent events.
        is_global: whether a key for some models alone is refused.
    """

    method: str
    path: str
    summary: str
    handler: Handler
    answer: Any
    role: Role | None = Role.VIEWER
    body: type[BaseModel] = Nothing
    query: type[BaseModel] = Nothing
    match: Match = Match.NONE
    statuses: tuple[int, ...] = (200,)
    replays: bool = False
    is_upload: bool = False
    is_stream: bool = False
    is_global: bool = False

    @property
    def is_change(self) -> bool:
        """Whether it may change something."""
        return self.method not in SAFE_METHODS

    @property
    def parameters(self) -> list[str]:
        """Of the path."""
        return _PARAMETER.findall(self.path)

    @property
    def pattern(self) -> str:
        """The path for aiohttp's router. A verb follows a colon, so that no name has one."""
        return _PARAMETER.sub(r"{\1:[^/:]*}", self.path)


def check_parameters(operation: Operation, http: web.Request) -> None:
    """Hold the names in a path to their grammar. InvalidRequest: one does not match it."""
    for parameter in operation.parameters:
        text = http.match_info[parameter]
        if parameter == "version":
            if parse_version(text) is None:
                raise InvalidRequest("a version is a whole number from 1 on")
        elif NAME.fullmatch(text) is None:
            raise InvalidRequest(
                f"the {parameter} in the path must match [A-Za-z0-9][A-Za-z0-9_.-]{{0,63}}"
            )
