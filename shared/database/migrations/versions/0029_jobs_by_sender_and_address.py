"""Find the jobs of a sender to an address"""

from __future__ import annotations

from sqlalchemy import text

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    create_index_concurrently(
        "ix_email_jobs_address",
        "email_jobs",
        [text("hashtextextended(COALESCE(recipient_key, lower(recipient)), sender_id)")],
    )
