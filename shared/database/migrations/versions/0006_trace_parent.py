"""Keep the trace that a batch belongs to"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # A column without a default changes only the catalog. The constraint reads the table of
    # batches once, which is small beside that of the jobs.
    op.add_column("batches", sa.Column("trace_parent", sa.Text(), nullable=True))
    op.create_check_constraint(
        op.f("ck_batches_trace_parent_length"), "batches", "octet_length(trace_parent) = 55"
    )
