"""Pause batches and senders until a time, and change batches"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

from outbox_server.shared.database.online_steps import lock_tables

revision = "0026"
down_revision = "0025"


def upgrade() -> None:
    lock_tables("batches", "senders")
    # Nullable columns, and constant defaults, change only the catalog.
    time = TIMESTAMP(timezone=True)
    op.add_column("senders", sa.Column("paused_until", time, nullable=True))
    op.add_column("batches", sa.Column("paused_at", time, nullable=True))
    op.add_column("batches", sa.Column("paused_until", time, nullable=True))
    op.add_column(
        "batches",
        sa.Column("respreading", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.add_column("batches", sa.Column("spread_count", sa.BigInteger(), nullable=True))
    op.add_column(
        "batches", sa.Column("revision", sa.BigInteger(), server_default="1", nullable=False)
    )
    op.create_table(
        "batch_respreads",
        sa.Column("batch_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("start_at", time, nullable=False),
        sa.Column("spacing_ms", sa.BigInteger(), nullable=False),
        sa.Column("done_to", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("placed", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("batch_id", name=op.f("pk_batch_respreads")),
    )
