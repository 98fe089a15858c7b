"""Drop the index of folded addresses without senders, in a new installation"""

from __future__ import annotations

from outbox_server.shared.database.online_steps import drop_index_if_unused

revision = "0032"
down_revision = "0031"


def upgrade() -> None:
    drop_index_if_unused("ix_email_jobs_recipient_key", "email_jobs")
