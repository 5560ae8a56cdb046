"""Brings a database's schema up to date.

Apart from `engine`, which imports this where the schema is not the newest: alembic takes a tenth of a
second to import, and most starts need nothing of it.
"""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from gateway.errors import ConfigurationError
from gateway.store.migrations import FOLDER


def migrate(connection: Connection, made: str | None) -> None:
    """Make the migrations that are not made yet, in the transaction that the connection is in.

    Args:
        connection: nobody else may migrate meanwhile.
        made: the newest that was made; None: none.

    Raises:
        ConfigurationError: it is none that is known here.
    """
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    if made is not None and made not in {known.revision for known in script.walk_revisions()}:
        raise ConfigurationError(
            "state: a newer gateway has written the database: use that, or another database"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
