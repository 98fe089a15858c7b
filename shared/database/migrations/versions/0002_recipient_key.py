"""Keep the key of recipients whose letters PostgreSQL cannot fold"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Without a default it is a change of the catalog alone, whatever waits.
    op.add_column("email_jobs", sa.Column("recipient_key", sa.Text(), nullable=True))
