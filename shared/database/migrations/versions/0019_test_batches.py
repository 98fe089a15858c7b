"""Mark the batches of test mails"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.add_column(
        "batches", sa.Column("test", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
