"""Add columns and a table"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from outbox_server.shared.database import schema
from outbox_server.shared.database.online_steps import lock_tables

revision = "9001"
down_revision = schema.REVISION


def upgrade() -> None:
    lock_tables("attempts", "email_jobs")
    op.add_column("email_jobs", sa.Column("next_note", sa.Text(), nullable=True))
    op.add_column(
        "email_jobs", sa.Column("next_rank", sa.SmallInteger(), server_default="1", nullable=False)
    )
    op.add_column("attempts", sa.Column("next_note", sa.Text(), nullable=True))
    op.create_table(
        "next_things",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_next_things")),
    )
    op.create_index(op.f("ix_next_things_batch_id"), "next_things", ["batch_id"])
