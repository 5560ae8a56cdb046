"""What alembic runs: in the transaction that `gateway.store.engine` has begun."""

from __future__ import annotations

from alembic import context

from gateway.store.migrations import VERSION_TABLE
from gateway.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
