"""How the database came to its present form, one file a step; run by `gateway.store.migrate`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent

VERSION_TABLE = "gateway_schema"
"""Where the newest migration that was made is noted; alembic's own name may be another program's."""


def newest() -> str:
    """The newest migration that there is: each file begins with its number of four digits."""
    return max(path.name for path in (FOLDER / "versions").glob("[0-9]*.py"))[:4]
