"""The entry point of Alembic: runs migrations on the connection of `shared.database.migrating`."""

from __future__ import annotations

from alembic import context

from outbox_server.shared.database.models import Base

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"], target_metadata=Base.metadata, **attributes["options"]
)
with context.begin_transaction():
    context.run_migrations()
