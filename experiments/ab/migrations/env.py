"""What Alembic runs around the steps. The connection, and its transaction, are handed in by `store.migrate`."""

from __future__ import annotations

from alembic import context

from experiments.ab.store import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
context.run_migrations()
