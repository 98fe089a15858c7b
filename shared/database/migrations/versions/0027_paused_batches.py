"""Find the paused batches of a sender"""

from __future__ import annotations

from sqlalchemy import text

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "0027"
down_revision = "0026"


def upgrade() -> None:
    create_index_concurrently(
        "ix_batches_paused",
        "batches",
        ["sender_id"],
        postgresql_where=text("paused_at IS NOT NULL OR respreading"),
    )
