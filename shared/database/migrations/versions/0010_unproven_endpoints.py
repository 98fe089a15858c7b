"""Keep the quota of endpoints that are not yet proven"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("users", sa.Column("unproven_endpoints", sa.BigInteger(), nullable=True))
