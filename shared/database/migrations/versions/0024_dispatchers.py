"""Keep the dispatchers, and which of them made an attempt at which endpoint"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0024"
down_revision = "0023"


def upgrade() -> None:
    op.create_table(
        "dispatchers",
        sa.Column("id", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("dispatcher_id", sa.Text(), nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column(
            "started_at",
            TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("seen_at", TIMESTAMP(timezone=True), nullable=False),
        sa.Column("stopped_at", TIMESTAMP(timezone=True), nullable=True),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("in_flight", sa.Integer(), nullable=False),
        sa.Column("oldest_lease_at", TIMESTAMP(timezone=True), nullable=True),
        sa.Column("sent_per_second", sa.Double(), nullable=False),
        sa.Column("attempts_per_second", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dispatchers")),
    )
    op.create_index(
        op.f("ix_dispatchers_dispatcher_id"), "dispatchers", ["dispatcher_id"], unique=True
    )
    op.create_index(op.f("ix_dispatchers_seen_at"), "dispatchers", ["seen_at"])
    op.add_column("attempts", sa.Column("dispatcher", sa.Integer(), nullable=True))
    op.add_column("attempts", sa.Column("endpoint", sa.Text(), nullable=True))
