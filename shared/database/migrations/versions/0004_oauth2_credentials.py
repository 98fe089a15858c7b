"""Keep the OAuth 2.0 credentials of endpoints, and the access tokens that dispatchers share"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0004"
down_revision = "0003"

_TIME = TIMESTAMP(timezone=True)


def upgrade() -> None:
    # A table of its own: the last release neither reads nor writes it, and no row is rewritten.
    op.create_table(
        "oauth2_credentials",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("token_url", sa.Text(), nullable=False),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("client_secret", sa.LargeBinary(), nullable=True),
        sa.Column("refresh_token", sa.LargeBinary(), nullable=True),
        sa.Column("access_token", sa.LargeBinary(), nullable=True),
        sa.Column("version", sa.Uuid(), server_default=sa.func.gen_random_uuid(), nullable=False),
        sa.Column("refresh_at", _TIME, nullable=True),
        sa.Column("expires_at", _TIME, nullable=True),
        sa.Column("lease_until", _TIME, nullable=True),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("retry_at", _TIME, nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("refused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.CheckConstraint(
            "(access_token IS NULL) = (expires_at IS NULL)"
            " AND (access_token IS NULL) = (refresh_at IS NULL)",
            name=op.f("ck_oauth2_credentials_token_and_times_together"),
        ),
        sa.CheckConstraint(
            "(error IS NULL) = (retry_at IS NULL)",
            name=op.f("ck_oauth2_credentials_error_and_retry_together"),
        ),
        sa.CheckConstraint(
            "failures >= 0", name=op.f("ck_oauth2_credentials_failures_not_negative")
        ),
        sa.ForeignKeyConstraint(
            ["sender_id"], ["senders.id"], name=op.f("fk_oauth2_credentials_sender_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_oauth2_credentials")),
    )
    op.create_index(
        op.f("ix_oauth2_credentials_sender_id"), "oauth2_credentials", ["sender_id"], unique=True
    )
