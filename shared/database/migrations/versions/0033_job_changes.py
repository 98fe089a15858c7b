"""Change many jobs at once, and write their rows later"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import INTERVAL, TIMESTAMP

revision = "0033"
down_revision = "0032"


def upgrade() -> None:
    time = TIMESTAMP(timezone=True)
    op.create_table(
        "job_changes",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("changed_at", time, nullable=False),
        sa.Column("due_at", time, nullable=True),
        sa.Column("delay", INTERVAL(), nullable=True),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_changes")),
        sa.CheckConstraint("kind BETWEEN 1 AND 3", name=op.f("ck_job_changes_kind_known")),
    )
    op.create_index(op.f("ix_job_changes_batch_id"), "job_changes", ["batch_id"])
    op.create_index(op.f("ix_job_changes_sender_id"), "job_changes", ["sender_id"])
    op.create_table(
        "job_change_blocks",
        sa.Column("change_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("block", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("bits", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("change_id", "block", name=op.f("pk_job_change_blocks")),
    )
