"""The entry point of Alembic: one process at a time migrates, each migration in a transaction.

The lock is held by the session. A migration may end its transaction to build an index concurrently
(`op.get_context().autocommit_block()`).
"""

from __future__ import annotations

import time

from alembic import context

from outbox_server.shared.database.models import Base

# Any constant. The process with this lock migrates; the others wait and then have nothing to do.
_ADVISORY_LOCK = 7_402_311_915
_POLL_S = 0.1

engine = create_engine(
    context.config.get_main_option("sqlalchemy.url") or "", poolclass=pool.NullPool
)
with engine.connect() as connection:
    # Not pg_advisory_lock: a statement that waits has a snapshot, and the build of an index would
    # wait for its end.
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _ADVISORY_LOCK}):
        connection.rollback()
        time.sleep(_POLL_S)
    connection.commit()
    context.configure(
        connection=connection, target_metadata=Base.metadata, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
