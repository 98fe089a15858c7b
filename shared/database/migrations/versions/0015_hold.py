"""Keep the heartbeat of the dispatchers, and what is held after a restore"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0015"
down_revision = "0014"

_TIME = TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "heartbeat",
        sa.Column("singleton", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("beat_at", _TIME, nullable=False),
        sa.Column("written_by", sa.BigInteger(), nullable=False),
        sa.Column("system_identifier", sa.BigInteger(), nullable=True),
        sa.Column("timeline", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_heartbeat")),
        sa.CheckConstraint("singleton", name=op.f("ck_heartbeat_one_row")),
    )
    op.create_table(
        "hold",
        sa.Column("singleton", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("held_at", _TIME, server_default=sa.func.now(), nullable=False),
        sa.Column("reason", sa.SmallInteger(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("singleton", name=op.f("pk_hold")),
        sa.CheckConstraint("singleton", name=op.f("ck_hold_one_row")),
        sa.CheckConstraint("reason BETWEEN 1 AND 3", name=op.f("ck_hold_reason_known")),
    )
    op.create_table(
        "held_sends",
        # No foreign key: retention may remove the job.
        sa.Column("email_job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("email_job_id", name=op.f("pk_held_sends")),
    )
    op.create_table(
        "hold_releases",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("sender_id", sa.BigInteger(), nullable=True),
        sa.Column("batch_id", sa.BigInteger(), nullable=True),
        sa.Column("due_from", _TIME, nullable=True),
        sa.Column("due_before", _TIME, nullable=True),
        sa.Column("sending", sa.Boolean(), nullable=True),
        sa.Column("released_at", _TIME, server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hold_releases")),
    )
