"""Keep the mail of a batch back until all its changes are written"""

from __future__ import annotations

from alembic import op

revision = "0034"
down_revision = "0033"

# A trigger, so that a scheduler of the release before, which does not know `job_changes`, cannot
# end what keeps the mail of a batch back either. Failed jobs that are retried (kind 3) keep nothing
# back. A change is stored after the batch was locked, so this reads it: each query of the function
# sees what was committed before.
_KEEP = """
CREATE FUNCTION outbox_keep_batch_held() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.respreading := EXISTS (SELECT FROM batch_respreads WHERE batch_id = NEW.id)
        OR EXISTS (SELECT FROM job_changes WHERE batch_id = NEW.id AND kind <> 3);
    RETURN NEW;
END $$
"""
_TRIGGER = """
CREATE TRIGGER outbox_keep_batches_held BEFORE UPDATE ON batches FOR EACH ROW
WHEN (OLD.respreading AND NOT NEW.respreading) EXECUTE FUNCTION outbox_keep_batch_held()
"""


def upgrade() -> None:
    op.execute(_KEEP)
    op.execute(_TRIGGER)
