"""Drop the index of addresses without senders, in a new installation"""

from __future__ import annotations

from outbox_server.shared.database.online_steps import drop_index_if_unused

revision = "0031"
down_revision = "0030"


def upgrade() -> None:
    # An index costs every new row time, and this release does not use this one.
    drop_index_if_unused("ix_email_jobs_recipient", "email_jobs")
