"""Find finished jobs by their age, count the removed ones, and hash erased addresses"""

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
    # The table has one row at most.
    op.add_column(
        "installation",
        sa.Column(
            "erasure_key",
            sa.Text(),
            server_default=sa.text("((gen_random_uuid())::text || (gen_random_uuid())::text)"),
            nullable=False,
        ),
    )
    # Concurrently, so that mail is sent meanwhile. An interrupted migration begins again: it leaves
    # an index that is not valid, which is dropped first.
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_email_jobs_finished")
        op.create_index(
            "ix_email_jobs_finished",
            "email_jobs",
            ["finished_at"],
            postgresql_where=sa.text("state IN (3, 4, 6, 7, 8)"),
            postgresql_concurrently=True,
        )
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_email_jobs_recipient_key")
        op.create_index(
            "ix_email_jobs_recipient_key",
            "email_jobs",
            ["recipient_key"],
            postgresql_where=sa.text("recipient_key IS NOT NULL"),
            postgresql_concurrently=True,
        )
