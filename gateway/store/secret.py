"""The server's own secret, kept apart from the database: a copy of that alone opens nothing."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from gateway.errors import ConfigurationError

SECRET_BYTES = 32
SECRET_FILE = "secret"  # noqa: S105 - the name of the file
SECRET_VARIABLE = "GATEWAY_SECRET"  # noqa: S105 - the name of the variable


def server_secret(folder: Path) -> bytes:
    """The 32 bytes of ``GATEWAY_SECRET``, or else of a file in ``folder``, made when it is not there.

    Both hold 64 hexadecimal digits. Gateways that share a database need the same secret; several that make
    the file at once get one.

    Raises:
        ConfigurationError: with one line, when it cannot be read or made.
    """
    given = os.environ.get(SECRET_VARIABLE)
    if given is not None:
        return _parse(given, SECRET_VARIABLE)
    file = folder / SECRET_FILE
    try:
        if not file.exists():
            _make(file)
        return _parse(file.read_text("ascii"), "the secret's file")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"the secret's file cannot be used: {reason}") from None
    except UnicodeDecodeError:
        return _parse("", "the secret's file")


def _parse(text: str, where: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != SECRET_BYTES:
        raise ConfigurationError(f"{where}: expected {2 * SECRET_BYTES} hexadecimal digits")
    return found


def _make(file: Path) -> None:
    """Write it whole and durably under another name, and link it unless somebody was faster."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as writer:
            writer.write(secrets.token_hex(SECRET_BYTES) + "\n")
            writer.flush()
            os.fsync(descriptor)
        try:
            os.link(draft, file)
        except FileExistsError:
            return
    finally:
        draft.unlink()
    parent = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
