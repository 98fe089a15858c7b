"""Find the jobs with an external id"""

from __future__ import annotations

from sqlalchemy import text

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    create_index_concurrently(
        "ix_email_jobs_external_key",
        "email_jobs",
        ["external_key", "batch_id", "id"],
        postgresql_where=text("external_key IS NOT NULL"),
    )
