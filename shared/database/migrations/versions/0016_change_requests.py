"""Keep the requests that changed something, by which repeated calls are recognised"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.create_table(
        "change_requests",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("address_key", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("scope", "request_id", name=op.f("pk_change_requests")),
    )
    op.create_index(op.f("ix_change_requests_created_at"), "change_requests", ["created_at"])
    op.create_index(
        op.f("ix_change_requests_user_id_address_key"),
        "change_requests",
        ["user_id", "address_key"],
    )
    op.create_index(
        op.f("ix_change_requests_scope_created_at"), "change_requests", ["scope", "created_at"]
    )
