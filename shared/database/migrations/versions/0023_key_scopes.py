"""Let API keys expire, and only read"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0023"
down_revision = "0022"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("expires_at", TIMESTAMP(timezone=True), nullable=True))
    op.add_column(
        "api_keys",
        sa.Column("read_only", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
