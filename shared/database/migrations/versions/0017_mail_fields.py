"""Keep further headers of mails, and what callers call their batches and jobs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from outbox_server.shared.database.online_steps import lock_tables

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    lock_tables("email_jobs", "batches")
    # Columns without a default, or with a constant one, change only the catalog.
    op.add_column("batches", sa.Column("reply_to", sa.Text(), nullable=True))
    op.add_column("batches", sa.Column("headers", JSONB(), nullable=True))
    op.add_column("batches", sa.Column("name_column", sa.Text(), nullable=True))
    op.add_column("batches", sa.Column("external_id", sa.Text(), nullable=True))
    op.add_column("batches", sa.Column("labels", JSONB(), nullable=True))
    op.add_column(
        "batches",
        sa.Column("row_labels", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.add_column("email_jobs", sa.Column("external_id", sa.Text(), nullable=True))
    op.add_column("email_jobs", sa.Column("external_key", sa.BigInteger(), nullable=True))
    op.add_column("email_jobs", sa.Column("labels", JSONB(), nullable=True))
