"""Add constraints for new rows"""

from __future__ import annotations

from alembic import op

revision = "9002"
down_revision = "9001"


def upgrade() -> None:
    op.create_check_constraint(
        op.f("ck_email_jobs_next_rank_positive"),
        "email_jobs",
        "next_rank > 0",
        postgresql_not_valid=True,
    )
