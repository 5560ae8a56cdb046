"""Sessions of browsers: a signed token in a cookie, in the place of a key that scripts could read.

The token names a key and when the session ends; nothing is kept of it. Whoever reads one looks the key up
again, so that a session ends with its key. Signed with HMAC-SHA256 under the server's own secret.
"""

from __future__ import annotations

from typing import Any

import jwt

COOKIE = "gateway_session"

SESSION_S = 12 * 3600
"""Time that a session lasts: a working day, so that a browser left open is not a key for good."""

_ALGORITHM = "HS256"


def issue_session(secret: bytes, key_id: str, now_s: float) -> str:
    """A token for whoever has shown this key.

    Args:
        secret: the server's, 32 bytes.
        key_id: the key's id.
        now_s: the wall clock.
    """
    claims: dict[str, Any] = {"sub": key_id, "exp": int(now_s) + SESSION_S}
    return jwt.encode(claims, secret, _ALGORITHM)


def session_key(secret: bytes, token: str, now_s: float) -> str | None:
    """The id of the key that a token was issued for; None for one that is not ours or has ended."""
    try:
        claims = jwt.decode(
            token,
            secret,
            algorithms=[_ALGORITHM],  # never what the token itself asks for
            options={
                "require": ["sub", "exp"],
                "verify_exp": False,
            },  # by the caller's clock, below
        )
    except jwt.PyJWTError:
        return None
    ends_s, key = claims["exp"], claims["sub"]
    if not isinstance(ends_s, int) or ends_s <= now_s:
        return None
    return key if isinstance(key, str) else None
