"""API keys: how they look, and what is kept of them.

A key is ``igw_<id>_<secret>``: the id is public and names it in lists, the secret has 256 bits. What is
kept is HMAC-SHA256 of the whole text under the server's own secret: a copy of the database alone neither
gives a key nor lets one be tried. A slow hash would add nothing to a secret that cannot be guessed, and
would cost every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from enum import Enum

_KEY = re.compile(r"igw_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")

BEARER = "Bearer "
"""What a key stands behind in ``Authorization``."""


class Role(Enum):
    """What a key may do. Each of the first three may do what those before it may; ``infer`` is apart."""

    VIEWER = "viewer"
    DEPLOYER = "deployer"
    ADMIN = "admin"
    INFER = "infer"

    def covers(self, needed: Role) -> bool:
        """Whether it may do what needs the other role."""
        if Role.INFER in (self, needed):
            # Whoever may change what answers may also ask it.
            return needed is Role.INFER and self is not Role.VIEWER
        return _ORDER.index(self) >= _ORDER.index(needed)


_ORDER = (Role.VIEWER, Role.DEPLOYER, Role.ADMIN)


def make_key() -> tuple[str, str]:
    """A new key: its id and its text."""
    identity = secrets.token_hex(6)
    return identity, f"igw_{identity}_{secrets.token_urlsafe(32)}"


def key_id(text: str) -> str | None:
    """The id of a key; None for what is no key."""
    found = _KEY.fullmatch(text)
    return found[1] if found else None


def key_digest(secret: bytes, text: str) -> str:
    """What is kept of a key, in hex. Compare with `hmac.compare_digest`.

    Args:
        secret: the server's.
        text: the whole key.
    """
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def bearer_of(authorization: str | None) -> str | None:
    """The key in an ``Authorization`` header; None where there is none."""
    if authorization is None or not authorization.startswith(BEARER):
        return None
    return authorization.removeprefix(BEARER).strip() or None
