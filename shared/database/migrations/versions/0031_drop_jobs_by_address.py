"""Drop the index of addresses without senders"""

from __future__ import annotations

from outbox_server.shared.database.online_steps import drop_index_concurrently

revision = "0031"
down_revision = "0030"


def upgrade() -> None:
    # An index costs every new row time. Until they are replaced, processes of an older release
    # search for an address without it, which is slow and changes no result.
    drop_index_concurrently("ix_email_jobs_recipient", "email_jobs")
