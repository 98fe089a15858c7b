"""Keep quotas and domains of users"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

revision = "0009"
down_revision = "0008"

_QUOTAS = ("waiting_jobs", "senders", "calls", "uploads", "watches", "stored_rejections")


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("user_id", sa.Text(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in _QUOTAS),
        sa.Column("sender_domains", ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("stored_rejections_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("updated_at", TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_users")),
        sa.CheckConstraint(
            f"least({', '.join(_QUOTAS)}) >= 0", name=op.f("ck_users_quotas_not_negative")
        ),
        sa.CheckConstraint(
            "stored_rejections_count >= 0", name=op.f("ck_users_count_not_negative")
        ),
    )
