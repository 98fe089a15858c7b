"""Many waiting jobs to suppressed addresses are ended in several transactions."""

from __future__ import annotations

import pytest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import (
    CreateSuppressionRequest,
    EraseRecipientRequest,
    ImportSuppressionsRequest,
)

from outbox_server.services.scheduler.storage import suppressing, suppression_imports
from outbox_server.shared.states import JobState
from tests.scheduler_stack import Scheduler

ADDRESS = "many@b.org"
_AT_ONCE = 2


async def suppress(scheduler: Scheduler, how: str) -> int | None:
    """Suppress the address. Return how many jobs were ended, if the answer says so."""
    if how == "create":
        await scheduler.suppressions.CreateSuppression(
            CreateSuppressionRequest(user_id="ann", suppression=Suppression(email=ADDRESS))
        )
        return None
    if how == "erase":
        answer = await scheduler.suppressions.EraseRecipient(
            EraseRecipientRequest(user_id="ann", email=ADDRESS)
        )
        return int(answer.suppressed_count)
    message = ImportSuppressionsRequest(user_id="ann", chunk=f"email\n{ADDRESS}\n".encode())
    imported = await scheduler.suppressions.ImportSuppressions(iter([message]))
    return int(imported.suppressed_job_count)


@pytest.mark.parametrize("how", ["create", "import", "erase"])
@pytest.mark.parametrize("by_index", [True, False])
async def test_jobs_are_ended_in_parts(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, how: str, by_index: bool
) -> None:
    monkeypatch.setattr(suppressing, "SWEPT_AT_ONCE", _AT_ONCE)
    if not by_index:
        monkeypatch.setattr(suppressing, "MOST_BY_INDEX", 1)
        monkeypatch.setattr(suppression_imports, "_MOST_OF_ADDRESS", 1)
    rows = f"email\n{ADDRESS}\nother@b.org\n{ADDRESS.upper()}\n{ADDRESS}\n"
    for user in ("ann", "ben", "ann"):
        sender = await scheduler.sender(user, email=f"{user}@example.com")
        await scheduler.schedule(sender, rows, duplicates=2)
    # Each transaction that ended jobs has a row here.
    await scheduler.define("CREATE TABLE ended (transaction xid8, job bigint)")
    try:
        await scheduler.define(
            "CREATE FUNCTION note_end() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO ended VALUES (pg_current_xact_id(), NEW.id); RETURN NEW; END $$"
        )
        await scheduler.define(
            "CREATE TRIGGER note_end AFTER UPDATE OF state ON email_jobs"
            " FOR EACH ROW EXECUTE FUNCTION note_end()"
        )
        ended = await suppress(scheduler, how)
        parts = scheduler.rows("SELECT count(*) FROM ended GROUP BY transaction")
    finally:
        await scheduler.define("DROP TABLE ended")
        await scheduler.define("DROP FUNCTION IF EXISTS note_end CASCADE")
    assert ended in {None, 6}
    assert sum(jobs for (jobs,) in parts) == 6
    assert max(jobs for (jobs,) in parts) <= _AT_ONCE
    states = scheduler.rows(
        "SELECT b.user_id, j.state, count(*) FROM email_jobs j JOIN batches b ON b.id = j.batch_id"
        " GROUP BY 1, 2 ORDER BY 1, 2"
    )
    assert states == [
        ("ann", JobState.SCHEDULED, 2),
        ("ann", JobState.SUPPRESSED, 6),
        ("ben", JobState.SCHEDULED, 4),
    ]
    counted = scheduler.value(
        "SELECT sum((after->>'suppressed_count')::int) FROM audit_events"
        " WHERE after ? 'suppressed_count' AND action <> 'ScheduleBatch'"
    )
    assert counted in {None, 6}
