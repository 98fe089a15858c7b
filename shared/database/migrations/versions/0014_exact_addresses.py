"""Compare addresses by lower case, and keep the column of a batch's addresses"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from outbox_server.shared.database.online_steps import lock_tables

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    lock_tables("email_jobs", "batches", "suppressions")
    # Columns without a default change only the catalog.
    op.add_column("email_jobs", sa.Column("address_key", sa.Text(), nullable=True))
    op.add_column("suppressions", sa.Column("form", sa.SmallInteger(), nullable=True))
    op.add_column("batches", sa.Column("email_column", sa.Text(), nullable=True))
