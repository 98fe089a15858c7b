"""Keep cooldowns of senders, deferred mail, reply classes and private CAs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

from outbox_server.shared.database.online_steps import lock_tables

revision = "0003"
down_revision = "0002"

_TIME = TIMESTAMP(timezone=True)


def upgrade() -> None:
    lock_tables("attempts", "email_jobs", "senders")
    # Columns without a default change only the catalog, so this is fast for any number of rows.
    op.add_column("email_jobs", sa.Column("deferred_since", _TIME, nullable=True))
    op.add_column("attempts", sa.Column("reply_class", sa.SmallInteger(), nullable=True))
    op.add_column("senders", sa.Column("smtp_ca", sa.Text(), nullable=True))
    op.create_table(
        "cooldowns",
        sa.Column("sender_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("since", _TIME, nullable=False),
        sa.Column("next_probe_at", _TIME, nullable=False),
        sa.Column("refusals", sa.Integer(), server_default="1", nullable=False),
        sa.Column("smtp_code", sa.SmallInteger(), nullable=True),
        sa.Column("enhanced_code", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.CheckConstraint("refusals > 0", name=op.f("ck_cooldowns_refusals_positive")),
        sa.PrimaryKeyConstraint("sender_id", name=op.f("pk_cooldowns")),
    )
