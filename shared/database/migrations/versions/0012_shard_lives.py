"""Store which life of Redis is valid, for each shard"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0012"
down_revision = "0011"

_TIME = TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "shard_lives",
        sa.Column("shard", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("life", sa.Text(), nullable=False),
        sa.Column("begun_at", _TIME, server_default=sa.func.now(), nullable=False),
        sa.Column("seen_at", _TIME, server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("shard", name=op.f("pk_shard_lives")),
        sa.UniqueConstraint("life", name=op.f("uq_shard_lives_life")),
    )
