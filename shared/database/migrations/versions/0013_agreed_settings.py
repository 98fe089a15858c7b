"""Keep the settings that are the same in every process, and what operators changed"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.create_table(
        "agreed_settings",
        sa.Column("singleton", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("shards", sa.Integer(), nullable=False),
        sa.Column("rate_window_ms", sa.BigInteger(), nullable=False),
        sa.Column("min_gap_ms", sa.BigInteger(), nullable=False),
        sa.Column("user_hourly_limit", sa.BigInteger(), nullable=False),
        sa.Column("user_gap_ms", sa.BigInteger(), nullable=False),
        sa.Column("uncertain_policy", sa.Text(), nullable=False),
        sa.Column("key_space", sa.Text(), server_default="", nullable=False),
        sa.Column("old_key_spaces", ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("limits_changed_at", TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_agreed_settings")),
        sa.CheckConstraint("singleton", name=op.f("ck_agreed_settings_one_row")),
        sa.CheckConstraint(
            "shards BETWEEN 1 AND 4096", name=op.f("ck_agreed_settings_shards_in_bounds")
        ),
        sa.CheckConstraint(
            "rate_window_ms > 0", name=op.f("ck_agreed_settings_rate_window_positive")
        ),
        sa.CheckConstraint(
            "least(min_gap_ms, user_hourly_limit, user_gap_ms) >= 0",
            name=op.f("ck_agreed_settings_limits_not_negative"),
        ),
        sa.CheckConstraint(
            "uncertain_policy IN ('resend', 'hold')",
            name=op.f("ck_agreed_settings_uncertain_policy_known"),
        ),
    )
    op.create_table(
        "audit_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column(
            "happened_at",
            TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("identity", sa.Text(), server_default="", nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), server_default="", nullable=False),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("address_key", sa.Text(), nullable=True),
        sa.Column("before", JSONB(), nullable=True),
        sa.Column("after", JSONB(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    op.create_index(op.f("ix_audit_events_action_id"), "audit_events", ["action", "id"])
    for first in ([], ["user_id"], ["target"]):
        columns = [*first, "happened_at", "id"]
        op.create_index(op.f("ix_audit_events_" + "_".join(columns)), "audit_events", columns)
