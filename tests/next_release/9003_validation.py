"""Check the constraints of old rows"""

from __future__ import annotations

from alembic import op

revision = "9003"
down_revision = "9002"


def upgrade() -> None:
    op.execute("ALTER TABLE email_jobs VALIDATE CONSTRAINT ck_email_jobs_next_rank_positive")
