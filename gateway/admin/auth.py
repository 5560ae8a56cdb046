"""Who is asking, and whether they may.

A key comes as ``Authorization: Bearer`` or, for a browser, as a session in a cookie. While no key exists
whoever is on this machine is the administrator: the first thing that is done there is to make a key.

Failed attempts are counted for each address, and beyond a number answered with 429 and left out of the
audit log, so that nobody fills it. A good key is let through all the same: 256 bits are not guessed, and
a program with an old key must not lock out the operator beside it.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.errors import Forbidden, GatewayError, Unauthorized
from gateway.security.keys import Role, bearer_of
from gateway.security.origin import SAFE_METHODS, is_loopback
from gateway.security.sessions import COOKIE, session_key
from gateway.store.changes import AddAudit
from gateway.store.records import AuditRecord, KeyRecord
from gateway.store.store import Store

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

log = logging.getLogger("gateway.admin")

MAX_FAILURES = 10
"""Failed attempts of an address in `WINDOW_S` that are answered with 401; those beyond with 429."""

WINDOW_S = 60.0

MAX_ADDRESSES = 4096
"""Addresses that are remembered; the one that was heard of least lately is forgotten first."""

MAX_AUDITED = 100
"""Failed attempts that the audit log gets in `WINDOW_S`, of all addresses together."""

LOOPBACK = "loopback"
"""The actor who needed no key."""

CSRF_HEADER, CSRF_VALUE = "X-Requested-With", "gateway"
"""What a page's script sends with a change, where its browser sends no ``Origin``."""

_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


class TooManyAttempts(GatewayError):
    """This address has failed too often; answered with ``Retry-After``."""

    status = 429
    code = "too_many_attempts"
    retryable = True


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is asking.

    Attributes:
        actor: for events and the audit log.
        role: what they may do.
        models: that they may touch; empty: all.
        key: id of their key; None: they needed none.
        is_session: it came in a cookie, which a browser sends by itself.
    """

    actor: str
    role: Role
    models: frozenset[str] = frozenset()
    key: str | None = None
    is_session: bool = False

    @classmethod
    def of(cls, key: KeyRecord, *, is_session: bool = False) -> Identity:
        """Whoever has this key."""
        return cls(key.name, Role(key.role), frozenset(key.models), key.id, is_session)

    def may_touch(self, model: str) -> bool:
        """Whether the key is for this model."""
        return not self.models or model in self.models

    def require(self, role: Role) -> None:
        """Forbidden: it needs another role."""
        if not self.role.covers(role):
            raise Forbidden(f"this needs a key with the role {role.value}")

    def require_model(self, model: str) -> None:
        """Forbidden: the key is for other models."""
        if not self.may_touch(model):
            raise Forbidden("this key is for other models")

    def require_all_models(self) -> None:
        """Forbidden: the key is for some models only."""
        if self.models:
            raise Forbidden("this needs a key that is for all models")


class Attempts:
    """Failed attempts by address, in memory that is bounded."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._audited = (now_s(), 0)

    def failed(self, address: str) -> bool:
        """Count one more; whether it is beyond what is answered with 401."""
        begin_s, count = self._window(self._failures.pop(address, None))
        self._failures[address] = begin_s, count + 1
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
        return count >= MAX_FAILURES

    def is_audited(self) -> bool:
        """Count an entry of the audit log; whether there is room for it."""
        begin_s, count = self._window(self._audited)
        self._audited = begin_s, count + 1
        return count < MAX_AUDITED

    def _window(self, last: tuple[float, int] | None) -> tuple[float, int]:
        now_s = self._now_s()
        if last is None or now_s - last[0] >= WINDOW_S:
            return now_s, 0
        return last


class Guard:
    """Tells who is asking.

    Args:
        plane: has the keys.
        is_local: whether only this machine reaches the listener.
        wall_s: the wall clock.
        now_s: a clock that only goes on.
    """

    def __init__(
        self,
        plane: ControlPlane,
        is_local: bool,
        wall_s: Callable[[], float] = time.time,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plane = plane
        self._is_local = is_local
        self.wall_s = wall_s
        self._attempts = Attempts(now_s)

    async def identify(self, http: web.Request) -> Identity:
        """Who sent a request.

        Raises:
            Unauthorized: nobody that is known.
            TooManyAttempts: likewise, once more too often.
            Forbidden: a change by a cookie that a foreign page may have caused.
        """
        authorization = http.headers.getall("Authorization", [])
        if authorization:
            text = bearer_of(authorization[0]) if len(authorization) == 1 else None
            return Identity.of(await self.key_of(http, text))
        if (session := self._session(http)) is not None:
            _check_csrf(http)
            return session
        if self._needs_no_key(http):
            return Identity(LOOPBACK, Role.ADMIN)
        raise Unauthorized("a key is needed: Authorization: Bearer igw_…")

    async def key_of(self, http: web.Request, text: str | None) -> KeyRecord:
        """The valid key that a request shows. Raises as `identify`."""
        key = self._plane.key_of(text) if text is not None else None
        if key is not None:
            return key
        address = http.remote or ""
        if self._attempts.failed(address):
            raise TooManyAttempts("too many failed attempts: try again in a minute")
        if self._attempts.is_audited():
            await self._audit(address)
        raise Unauthorized("the key is not known, has expired or was revoked")

    def holds(self, identity: Identity) -> bool:
        """Whether somebody who was identified a while ago still would be."""
        if identity.key is None:
            return not self._plane.has_keys()
        return self._plane.key_by_id(identity.key) is not None

    def _session(self, http: web.Request) -> Identity | None:
        token = http.cookies.get(COOKIE)
        if token is None:
            return None
        key_id = session_key(self._plane.session_secret, token, self.wall_s())
        key = self._plane.key_by_id(key_id) if key_id is not None else None
        return None if key is None else Identity.of(key, is_session=True)

    def _needs_no_key(self, http: web.Request) -> bool:
        if not self._is_local or self._plane.has_keys():
            return False
        # A proxy on this machine speaks for whoever is behind it.
        is_forwarded = any(name in http.headers for name in _FORWARDED)
        return not is_forwarded and is_loopback(http.remote or "")

    async def _audit(self, address: str) -> None:
        entry = AuditRecord(self.wall_s(), "unknown", "auth.fail", address, None, None)
        try:
            await self._plane.store.call(Store.write, AddAudit(entry))
        except GatewayError as error:
            log.error("a failed attempt was not audited: %s", error)


def _check_csrf(http: web.Request) -> None:
    """An ``Origin`` that is there has been checked to be ours."""
    if http.method in SAFE_METHODS or "Origin" in http.headers:
        return
    if http.headers.get(CSRF_HEADER) != CSRF_VALUE:
        raise Forbidden(f"a change by a session needs Origin or {CSRF_HEADER}: {CSRF_VALUE}")
