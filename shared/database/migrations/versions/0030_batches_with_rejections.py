"""Find the batches of a user that have rejections"""

from __future__ import annotations

from sqlalchemy import text

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "0030"
down_revision = "0029"


def upgrade() -> None:
    create_index_concurrently(
        "ix_batches_rejected",
        "batches",
        ["user_id", "id"],
        postgresql_where=text("rejected_count > 0"),
    )
