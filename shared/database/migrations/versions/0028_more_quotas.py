"""Count the events and suppressions of each user, and keep their quotas"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from outbox_server.shared.database.online_steps import lock_tables

revision = "0028"
down_revision = "0027"

# Triggers, so that no statement can forget to count, not even one of the release before this one.
# A user is counted once its suppressions were counted for the first time
# (shared/quotas/storage.py). Every writer holds the user's advisory lock.
_ADDED = """
CREATE FUNCTION outbox_count_new_suppressions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE suppression_counts c SET n = c.n + g.n
    FROM (SELECT user_id, count(*) AS n FROM changed GROUP BY user_id) g
    WHERE c.user_id = g.user_id;
    RETURN NULL;
END $$
"""
_REMOVED = """
CREATE FUNCTION outbox_count_old_suppressions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE suppression_counts c SET n = greatest(c.n - g.n, 0)
    FROM (SELECT user_id, count(*) AS n FROM changed GROUP BY user_id) g
    WHERE c.user_id = g.user_id;
    RETURN NULL;
END $$
"""
_TRIGGERS = (
    """
    CREATE TRIGGER outbox_new_suppressions AFTER INSERT ON suppressions
    REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION outbox_count_new_suppressions()
    """,
    """
    CREATE TRIGGER outbox_old_suppressions AFTER DELETE ON suppressions
    REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION outbox_count_old_suppressions()
    """,
)


def upgrade() -> None:
    lock_tables("users", "webhooks", "suppressions")
    # Nullable columns change only the catalog.
    for name in ("stored_events", "suppressions", "webhooks"):
        op.add_column("users", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("webhooks", sa.Column("old_secret", sa.LargeBinary(), nullable=True))
    op.add_column(
        "webhooks",
        sa.Column("old_secret_until", sa.TIMESTAMP(timezone=True), nullable=True),
    )
    op.create_table(
        "job_event_counts",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("n", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("removed_to", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_job_event_counts")),
        sa.CheckConstraint("n >= 0", name=op.f("ck_job_event_counts_n_not_negative")),
    )
    op.create_table(
        "job_event_counting",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("counted_to", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_event_counting")),
        sa.CheckConstraint("id = 1", name=op.f("ck_job_event_counting_one_row")),
    )
    op.create_table(
        "suppression_counts",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_suppression_counts")),
        sa.CheckConstraint("n >= 0", name=op.f("ck_suppression_counts_n_not_negative")),
    )
    op.execute(_ADDED)
    op.execute(_REMOVED)
    for trigger in _TRIGGERS:
        op.execute(trigger)
