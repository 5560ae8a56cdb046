"""The API keys, in memory: asked at every request of the admin port, read again when they change."""

from __future__ import annotations

import hmac
from typing import Any

from gateway.clock import wall_s
from gateway.security.keys import Role, key_digest, key_id
from gateway.store.records import KeyRecord


class Keyring:
    """All keys.

    Args:
        secret: the server's, under which digests are made.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._keys: dict[str, KeyRecord] = {}

    def replace(self, keys: list[KeyRecord]) -> bool:
        """Take these for all there are; whether that changes anything."""
        new = {key.id: key for key in keys}
        is_changed = new != self._keys
        self._keys = new
        return is_changed

    @property
    def has_any(self) -> bool:
        """Whether a key was ever made: from then on one is asked for, valid or not."""
        return bool(self._keys)

    @property
    def has_admin(self) -> bool:
        """Whether somebody could administer the server by a key."""
        return any(key.role == Role.ADMIN.value and _is_valid(key) for key in self._keys.values())

    def all(self) -> list[KeyRecord]:
        """Every key, revoked and expired ones too."""
        return list(self._keys.values())

    def by_id(self, identity: str) -> KeyRecord | None:
        """A valid key."""
        found = self._keys.get(identity)
        return found if found is not None and _is_valid(found) else None

    def by_text(self, text: str) -> KeyRecord | None:
        """The valid key that this is. Takes as long for a wrong one as for a right one."""
        digest = key_digest(self._secret, text)
        found = self.by_id(key_id(text) or "")
        expected = found.digest if found is not None else "0" * len(digest)
        return found if hmac.compare_digest(expected, digest) and found is not None else None

    def to_wire(self, *, required: bool) -> dict[str, Any]:
        """What front ends are told: the valid keys that may be used on the data port."""
        covering = [
            key
            for key in self._keys.values()
            if _is_valid(key) and Role(key.role).covers(Role.INFER)
        ]
        return {
            "required": required,
            "secret": self._secret if required else b"",
            "keys": [
                {
                    "digest": key.digest,
                    "name": key.name,
                    "role": key.role,
                    "models": list(key.models),
                    "expires_s": key.expires_s,
                }
                for key in (covering if required else ())
            ],
        }


def _is_valid(key: KeyRecord) -> bool:
    return key.revoked_s is None and (key.expires_s is None or key.expires_s > wall_s())
