"""Keep the key of recipients whose letters PostgreSQL cannot fold"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # A column without a default changes only the catalog, so this is fast for any number of rows.
    op.add_column("email_jobs", sa.Column("recipient_key", sa.Text(), nullable=True))
