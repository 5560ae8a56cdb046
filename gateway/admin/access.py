"""API keys, and sessions of browsers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from gateway.admin.auth import Guard, Identity
from gateway.admin.endpoint import KEY_REVISION
from gateway.admin.models import page_of
from gateway.admin.operations import PREFIX, Answer, Call, Match, Operation
from gateway.admin.schema import (
    KeyBody,
    KeyPage,
    KeyView,
    PageQuery,
    SessionBody,
    SessionView,
)
from gateway.errors import InvalidRequest, Unauthorized
from gateway.security.keys import Role
from gateway.security.sessions import COOKIE, SESSION_S, issue_session

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

_KEYS = f"{PREFIX}/keys"
_SESSION = f"{PREFIX}/session"


class AccessHandlers:
    """The operations on keys and sessions.

    Args:
        plane: has the keys.
        guard: tells who is asking.
    """

    def __init__(self, plane: ControlPlane, guard: Guard) -> None:
        self._plane = plane
        self._guard = guard

    def operations(self) -> list[Operation]:
        """All of them."""
        admin = Role.ADMIN
        return [
            Operation(
                "GET", _KEYS, "API keys, oldest first", self.keys, KeyPage, admin, query=PageQuery,
                is_global=True,
            ),
            Operation(
                "POST", _KEYS, "Make an API key; its text is told this once", self.create, KeyView,
                admin, KeyBody, statuses=(201,), replays=True, is_global=True,
            ),
            Operation(
                "DELETE", f"{_KEYS}/{{id}}", "Revoke an API key", self.revoke, KeyView, admin,
                match=Match.ALWAYS, is_global=True,
            ),
            Operation("GET", _SESSION, "Who the caller is", self.session, SessionView, None),
            Operation(
                "POST", _SESSION, "Exchange a key for a cookie", self.begin, SessionView, None,
                SessionBody,
            ),
            Operation("DELETE", _SESSION, "Drop the cookie", self.end, None, None, statuses=(204,)),
        ]  # fmt: skip

    async def keys(self, call: Call) -> Answer:
        """A page of them, revoked ones too."""
        records = self._plane.keys()
        found = [KeyView.of(record) for record in records]
        after = call.query.after
        if after is not None:
            at = next((at for at, key in enumerate(found) if key.id == after), None)
            if at is None:
                raise InvalidRequest("after: must be the id of a key")
            found = found[at + 1 :]
        page, token = page_of(found, call.query.limit, lambda key: key.id)
        return Answer({"keys": page, "next": token})

    async def create(self, call: Call) -> Answer:
        """The text goes to whoever asked, and is kept nowhere: a repeated request does not get it."""
        body = call.body
        if body.expires_s is not None and body.expires_s <= self._guard.wall_s():
            raise InvalidRequest("expires_s: must be in the future, in seconds of the wall clock")
        record, text = await self._plane.create_key(
            body.name, body.role, body.models, body.expires_s, call.actor
        )
        return Answer(KeyView.of(record, text), 201, revision=KEY_REVISION, kept=KeyView.of(record))

    async def revoke(self, call: Call) -> Answer:
        """At once, with all sessions that began with it."""
        record = await self._plane.revoke_key(call.name("id"), call.actor)
        return Answer(KeyView.of(record), revision=KEY_REVISION)

    async def session(self, call: Call) -> Answer:
        """Nobody is an answer as well."""
        try:
            identity = await self._guard.identify(call.http)
        except Unauthorized:
            return Answer(SessionView(None, None, True))
        return Answer(_view(identity))

    async def begin(self, call: Call) -> Answer:
        """Set the cookie."""
        key = await self._guard.key_of(call.http, call.body.key)
        identity = Identity.of(key, is_session=True)
        identity.require(Role.VIEWER)
        token = issue_session(self._plane.session_secret, key.id, self._guard.wall_s())
        return Answer(_view(identity), headers=(("Set-Cookie", _cookie(call.http, token)),))

    async def end(self, call: Call) -> Answer:
        """Have the browser forget it."""
        return Answer(None, 204, headers=(("Set-Cookie", _cookie(call.http, None)),))


def _view(identity: Identity) -> SessionView:
    return SessionView(identity.actor, identity.role, False)


def _cookie(http: web.Request, token: str | None) -> str:
    """A cookie that scripts cannot read and other sites' pages do not send."""
    response = web.Response()
    # The Origin, which was checked, says how the browser came; a proxy may have ended its TLS.
    is_secure = http.secure or http.headers.get("Origin", "").startswith("https://")
    response.set_cookie(
        COOKIE,
        token or "",
        max_age=SESSION_S if token is not None else 0,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=is_secure,
    )
    return response.cookies[COOKIE].OutputString()
