"""Build an index over all jobs"""

from __future__ import annotations

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "9004"
down_revision = "9003"


def upgrade() -> None:
    create_index_concurrently("ix_email_jobs_next_rank", "email_jobs", ["next_rank", "id"])
