"""Find the API keys of a user by an index"""

from __future__ import annotations

from outbox_server.shared.database.online_steps import create_index_concurrently

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    create_index_concurrently("ix_api_keys_user_id", "api_keys", ["user_id", "key_id"])
