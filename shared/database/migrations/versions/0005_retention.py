"""Count removed jobs, hash erased addresses, and keep the trace that a batch belongs to"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "purged_counts",
        sa.Column("batch_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("sender_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hour", TIMESTAMP(timezone=True), nullable=False),
        sa.Column("state", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint(
            "batch_id", "sender_id", "hour", "state", name=op.f("pk_purged_counts")
        ),
    )
    op.create_table(
        "erasure_key",
        sa.Column("singleton", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column(
            "key",
            sa.Text(),
            server_default=sa.text("((gen_random_uuid())::text || (gen_random_uuid())::text)"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_erasure_key")),
        sa.CheckConstraint("singleton", name=op.f("ck_erasure_key_one_row")),
    )
    op.add_column("batches", sa.Column("trace_parent", sa.Text(), nullable=True))
    op.create_check_constraint(
        op.f("ck_batches_trace_parent_length"),
        "batches",
        "octet_length(trace_parent) = 55",
        postgresql_not_valid=True,
    )
