"""Check the trace parents of old batches"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE batches VALIDATE CONSTRAINT ck_batches_trace_parent_length")
