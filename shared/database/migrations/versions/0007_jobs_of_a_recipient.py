"""Find the jobs of a recipient"""

from __future__ import annotations

from sqlalchemy import text

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    create_index_concurrently(
        "ix_email_jobs_recipient_key",
        "email_jobs",
        ["recipient_key"],
        postgresql_where=text("recipient_key IS NOT NULL"),
    )
