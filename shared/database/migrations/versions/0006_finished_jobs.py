"""Find finished jobs by their age"""

from __future__ import annotations

from sqlalchemy import text

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    create_index_concurrently(
        "ix_email_jobs_finished",
        "email_jobs",
        ["finished_at"],
        postgresql_where=text("state IN (3, 4, 6, 7, 8)"),
    )
