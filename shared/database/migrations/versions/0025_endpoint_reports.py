"""Keep what dispatchers have lately counted at each SMTP endpoint"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

revision = "0025"
down_revision = "0024"


def upgrade() -> None:
    op.create_table(
        "endpoint_reports",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("dispatcher", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("replies", ARRAY(sa.Integer()), nullable=False),
        sa.Column("latencies", ARRAY(sa.Integer()), nullable=False),
        sa.Column("circuit_open_at", TIMESTAMP(timezone=True), nullable=True),
        sa.Column("next_probe_at", TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint(
            "user_id", "host", "port", "dispatcher", name=op.f("pk_endpoint_reports")
        ),
    )
    op.create_index(op.f("ix_endpoint_reports_dispatcher"), "endpoint_reports", ["dispatcher"])
