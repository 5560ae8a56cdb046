"""API keys on the data port: who may ask for inferences, and who may load and unload models.

The supervisor tells which keys there are; nobody is asked during a request. Metadata, health and metrics
stay open: load balancers have no keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gateway.clock import wall_ms
from gateway.errors import Forbidden, Unauthorized
from gateway.frontend.answers import Handler
from gateway.security.keys import Role, bearer_of, key_digest, key_id

MAX_CACHED = 4096
"""Authorization headers of which it is remembered whose key they hold. Only good ones are: strangers can
neither fill this nor push anybody out of it."""

_ASKS = re.compile(
    r"/v2/models/[^/]*(?:/versions/[^/]*)?/infer"
    r"|/v1/models/[^/:]*(?:/(?:versions|labels)/[^/:]*)*:(?:predict|classify|regress)"
)
_CHANGES = re.compile(r"/v2/repository/models/[^/]*/(?:load|unload)")


@dataclass(frozen=True, slots=True)
class Key:
    """What a front end knows of a key.

    Attributes:
        role: what it may do.
        models: that it is for; empty: all.
        expires_s: wall time at which it ends; None: never.
    """

    role: Role
    models: frozenset[str]
    expires_s: float | None


class Guard:
    """The keys of the data port. ``is_required``: whether one is needed at all; at first it is not."""

    def __init__(self) -> None:
        self.is_required = False
        self._secret = b""
        self._keys: dict[str, Key] = {}  # by digest
        self._cached: dict[str, Key] = {}  # by the header's value

    def update(self, *, required: bool, secret: bytes, keys: Iterable[Mapping[str, Any]]) -> None:
        """Take these keys in place of those known.

        Args:
            required: whether requests need one.
            secret: what digests are made with.
            keys: each with ``digest``, ``role``, ``models`` and ``expires_s``.
        """
        self.is_required, self._secret = required, secret
        self._keys = {
            key["digest"]: Key(Role(key["role"]), frozenset(key["models"]), key["expires_s"])
            for key in keys
        }
        self._cached.clear()

    def check(self, authorization: str | None, needed: Role, model: str | None) -> None:
        """Nothing, where the key in an ``Authorization`` header may do it.

        Args:
            authorization: the header; None: there is none.
            needed: the role that is needed.
            model: that it is done with; None: not known yet.

        Raises:
            Unauthorized: no key, or one that is not known or has expired.
            Forbidden: a key with another role, or for other models.
        """
        key = self._key(authorization)
        if key is None or (key.expires_s is not None and key.expires_s * 1000 <= wall_ms()):
            raise Unauthorized("an API key is needed: send Authorization: Bearer <key>")
        if not key.role.covers(needed):
            raise Forbidden(f"this key has the role {key.role.value}, which does not allow it")
        if key.models and model is not None and model not in key.models:
            raise Forbidden("this key is for other models")

    def _key(self, authorization: str | None) -> Key | None:
        """The key that a header holds; None for one that is not known."""
        if authorization is None:
            return None
        cached = self._cached.get(authorization)
        if cached is not None:
            return cached
        text = bearer_of(authorization)
        if text is None or key_id(text) is None:
            return None
        # Looked up by its digest: without the secret nobody can aim at one, so time tells nothing.
        key = self._keys.get(key_digest(self._secret, text))
        if key is not None:
            if len(self._cached) >= MAX_CACHED:
                self._cached.clear()
            self._cached[authorization] = key
        return key


GUARD = web.AppKey("guard", Guard)


@web.middleware
async def guarding(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Checks the key before anything else of a request, its verb and its model's name included."""
    guard = request.app[GUARD]
    if guard.is_required:
        needed = role_needed(request.rel_url.raw_path)
        if needed is not None:
            guard.check(
                request.headers.get("Authorization"), needed, request.match_info.get("model")
            )
    return await handler(request)


def role_needed(path: str) -> Role | None:
    """The role that a path of the data port needs, whatever the verb; None: it is open to all."""
    if _ASKS.fullmatch(path):
        return Role.INFER
    return Role.DEPLOYER if _CHANGES.fullmatch(path) else None
