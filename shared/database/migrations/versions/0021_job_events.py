"""Record every change of a job, in the transaction that makes it"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

from outbox_server.shared.database.online_steps import lock_tables

revision = "0021"
down_revision = "0020"

_TIME = TIMESTAMP(timezone=True)

# A trigger, so that no statement can forget its event, not even one of the release before this one.
# The lock is held until the end of the transaction. Readers see by it which ids may still appear
# (shared/events/storage.py): it is taken before the id is drawn.
_OF_JOBS = """
CREATE FUNCTION outbox_record_job_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7402311917);
    INSERT INTO job_events
        (user_id, sender_id, batch_id, email_job_id, state, attempt, due_at, happened_at)
    SELECT s.user_id, NEW.sender_id, NEW.batch_id, NEW.id, NEW.state, NEW.attempt,
        CASE WHEN NEW.state = 1 THEN NEW.scheduled_at END, clock_timestamp()
    FROM senders s WHERE s.id = NEW.sender_id;
    RETURN NULL;
END $$
"""
# At the end of the transaction: an upload holds its transaction open for long.
_OF_BATCHES = """
CREATE FUNCTION outbox_record_batch_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7402311917);
    INSERT INTO job_events
        (user_id, sender_id, batch_id, state, attempt, due_at, job_count, happened_at)
    SELECT b.user_id, b.sender_id, b.id, 1, 0, b.start_at, b.accepted_count, clock_timestamp()
    FROM batches b WHERE b.id = NEW.id;
    RETURN NULL;
END $$
"""
# A claim is no event, nor is its return without an attempt.
_JOB_TRIGGER = """
CREATE TRIGGER outbox_job_events AFTER UPDATE ON email_jobs FOR EACH ROW
WHEN (
    NEW.state <> 2
    AND (
        NEW.state <> OLD.state
        OR (NEW.state = 1 AND NEW.scheduled_at <> OLD.scheduled_at)
    )
    AND NOT (OLD.state = 2 AND NEW.state = 1 AND NEW.attempt < OLD.attempt)
)
EXECUTE FUNCTION outbox_record_job_event()
"""
_BATCH_TRIGGER = """
CREATE CONSTRAINT TRIGGER outbox_batch_events AFTER INSERT ON batches
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION outbox_record_batch_event()
"""


def upgrade() -> None:
    lock_tables("email_jobs", "batches")
    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("email_job_id", sa.BigInteger(), nullable=True),
        sa.Column("happened_at", _TIME, nullable=False),
        sa.Column("due_at", _TIME, nullable=True),
        sa.Column("job_count", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index(op.f("ix_job_events_user_id_id"), "job_events", ["user_id", "id"])
    op.execute(_OF_JOBS)
    op.execute(_OF_BATCHES)
    op.execute(_BATCH_TRIGGER)
    op.execute(_JOB_TRIGGER)
