"""Keep limits that a user has for all its senders, and the shard of such senders"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from outbox_server.shared.database.online_steps import lock_tables

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    lock_tables("users", "senders")
    # Columns without a default change only the catalog.
    op.add_column("users", sa.Column("hourly_limit", sa.BigInteger(), nullable=True))
    op.add_column("users", sa.Column("min_gap_ms", sa.BigInteger(), nullable=True))
    op.add_column("senders", sa.Column("shard_key", sa.BigInteger(), nullable=True))
