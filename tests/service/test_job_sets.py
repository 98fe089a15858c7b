"""Cancelling, retrying and rescheduling all jobs that match a filter."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import sender_pb2
from outbox.v1.batch_service_pb2 import GetBatchRequest
from outbox.v1.email_job_service_pb2 import (
    CancelEmailJobsRequest,
    RescheduleEmailJobsRequest,
    RetryEmailJobsRequest,
)

from outbox_server.services.scheduler import job_sets
from outbox_server.services.scheduler.storage import job_set_rows
from outbox_server.services.scheduler.storage import job_sets as storage
from outbox_server.services.scheduler.sweeping import Sweeper
from outbox_server.shared.database.counts import batch_counts
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from outbox_server.shared.states import JobState
from tests.commands import outbox
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

LATER = Timestamp(seconds=2_000_000_000)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running:
        yield running
        # The counts of all batches equal a recount of the rows.
        engine = create_engine(running.settings)

        async def swept() -> bool:
            # The scheduler may hold the lock of a batch in its own turn.
            return not await Sweeper(engine).sweep_all()

        await eventually(swept)
        async with engine.connect() as connection:
            ids = [batch for (batch,) in running.rows("SELECT id FROM batches")]
            counts = await batch_counts(connection, ids)
        await engine.dispose()
        rows = running.rows("SELECT batch_id, state, count(*) FROM email_jobs GROUP BY 1, 2")
        assert {(b, s): n for b, s, n in rows} == {
            (batch, state): n
            for batch, each in counts.items()
            for state, n in enumerate(
                (
                    *(each.scheduled, each.sending, each.sent, each.failed),
                    *(each.uncertain, each.cancelled, each.suppressed, each.expired),
                ),
                1,
            )
            if n
        }


async def schedule(
    scheduler: Scheduler, sender: sender_pb2.Sender, rows: int = 4, **options: Any
) -> str:
    """Schedule a batch; return its id."""
    csv = "email\n" + "".join(f"user{number}@b.org\n" for number in range(1, rows + 1))
    return (await scheduler.schedule(sender, csv, **options)).batch.batch_id


def fail(scheduler: Scheduler, batch: str) -> None:
    """Move the even rows of a batch to FAILED."""
    even = "batch_id = %s AND row_number %% 2 = 0"
    scheduler.end_jobs(JobState.FAILED, even, int(batch))


def states(scheduler: Scheduler, batch: str) -> list[int]:
    rows = scheduler.rows(
        "SELECT state FROM email_jobs WHERE batch_id = %s ORDER BY row_number", int(batch)
    )
    return [state for (state,) in rows]


async def cancel(scheduler: Scheduler, **fields: Any) -> tuple[int, int]:
    """Cancel in as many parts as needed; return the number of jobs and of parts."""
    return await in_parts(
        scheduler.jobs.CancelEmailJobs, CancelEmailJobsRequest(**fields), "cancelled_count"
    )


async def in_parts(call: Any, request: Any, count: str) -> tuple[int, int]:
    jobs, parts = 0, 0
    while True:
        answer = await call(request)
        jobs, parts = jobs + getattr(answer, count), parts + 1
        request.page_token = answer.next_page_token
        if not request.page_token:
            return jobs, parts


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every part small, and every call end after one part."""
    monkeypatch.setattr(job_set_rows, "ROWS_AT_ONCE", 2)
    # So that a part may end within a block.
    monkeypatch.setattr(job_set_rows, "BLOCK_JOBS", 1)
    monkeypatch.setattr(job_set_rows, "_FOUND_AT_ONCE", 2)
    monkeypatch.setattr(storage, "_CANCELLED_BATCHES", 2)
    monkeypatch.setattr(job_sets, "_TIME_S", 0.0)


@pytest.mark.usefixtures("small_parts")
async def test_jobs_that_match_are_cancelled_in_parts_and_no_others(scheduler: Scheduler) -> None:
    sender, foreign = await scheduler.sender("ann"), await scheduler.sender("bob")
    mine, theirs = await schedule(scheduler, sender, 7), await schedule(scheduler, foreign, 7)
    fail(scheduler, mine)
    wanted = "row_number > 2 OR recipient = user1@b.org"
    assert await cancel(scheduler, user_id="ann", filter=wanted, validate_only=True) == (4, 5)
    assert states(scheduler, mine) == [1, 4, 1, 4, 1, 4, 1]
    assert await cancel(scheduler, user_id="ann", filter=wanted) == (4, 5)
    assert states(scheduler, mine) == [6, 4, 6, 4, 6, 4, 6]
    assert states(scheduler, theirs) == [1] * 7
    # Nothing is left to cancel, and no waiting job has another state.
    for dry in (True, False):
        sending = {"filter": "state = SENDING", "validate_only": dry}
        assert await cancel(scheduler, user_id="ann", **sending) == (0, 1)
    assert (await cancel(scheduler, user_id="ann", filter=wanted))[0] == 0
    # Without a user, for the sender of the other user.
    assert await cancel(scheduler, sender_id=foreign.sender_id, filter="row_number = 7") == (1, 5)
    assert await cancel(scheduler, user_id="ann", sender_id=foreign.sender_id) == (0, 1)
    assert states(scheduler, theirs) == [1] * 6 + [6]


@pytest.mark.usefixtures("small_parts")
async def test_a_filter_about_batches_cancels_them_at_once(scheduler: Scheduler) -> None:
    sender, foreign = await scheduler.sender("ann"), await scheduler.sender("bob")
    mine = [await schedule(scheduler, sender, 3) for _ in range(5)]
    theirs = await schedule(scheduler, foreign, 3)
    fail(scheduler, mine[0])
    wanted = "state = SCHEDULED AND create_time > 2026-01-01T00:00:00Z"
    assert await cancel(scheduler, user_id="ann", filter=wanted, validate_only=True) == (14, 3)
    kept = f"NOT batch_id = {mine[4]}"
    assert await cancel(scheduler, user_id="ann", filter=kept) == (11, 3)
    for batch in mine[:4]:
        found = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch))
        assert found.counts.scheduled_count == 0
        assert found.HasField("cancel_time")
    assert states(scheduler, mine[4]) == [1] * 3
    assert states(scheduler, theirs) == [1] * 3
    assert await cancel(scheduler, user_id="ann", filter=wanted) == (3, 1)
    late = "create_time > 2040-01-01T00:00:00Z"
    assert await cancel(scheduler, user_id="bob", filter=late) == (0, 1)


@pytest.mark.parametrize("field", ["batch_id", "sender_id"])
async def test_a_batch_whose_open_jobs_are_all_in_flight_is_cancelled(
    scheduler: Scheduler, field: str
) -> None:
    """Its jobs are not tried again when their attempts fail."""
    sender = await scheduler.sender("ann")
    batch = await schedule(scheduler, sender, 2)
    scheduler.execute(
        "UPDATE email_jobs SET state = 2, attempt = 1, lease_until = now() + interval '1 h'"
    )
    which = {"batch_id": batch, "sender_id": sender.sender_id}[field]
    assert await cancel(scheduler, **{field: which}, validate_only=True) == (0, 1)
    assert await cancel(scheduler, **{field: which}) == (0, 1)
    found = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch))
    assert found.HasField("cancel_time")
    assert found.counts.sending_count == 2
    # Both attempts fail, and the jobs wait again, if the caller had not cancelled them.
    scheduler.execute("UPDATE email_jobs SET state = 1, lease_until = NULL")
    found = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch))
    assert (found.counts.scheduled_count, found.counts.cancelled_count) == (0, 2)


@pytest.mark.usefixtures("small_parts")
async def test_failed_jobs_that_match_are_retried(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    batches = [await schedule(scheduler, sender, 6) for _ in range(2)]
    for batch in batches:
        fail(scheduler, batch)
    fields: dict[str, Any] = {"user_id": "ann", "filter": "row_number > 2"}
    call, count = scheduler.jobs.RetryEmailJobs, "retried_count"
    counted = RetryEmailJobsRequest(**fields, validate_only=True)
    assert (await in_parts(call, counted, count))[0] == 4
    assert states(scheduler, batches[0]) == [1, 4] * 3
    assert (await in_parts(call, RetryEmailJobsRequest(**fields), count))[0] == 4
    for batch in batches:
        assert states(scheduler, batch) == [1, 4, 1, 1, 1, 1]
    # Jobs of a cancelled batch are never sent.
    await cancel(scheduler, user_id="ann", batch_id=batches[0])
    jobs = await in_parts(
        call, RetryEmailJobsRequest(user_id="ann", filter="row_number < 9"), count
    )
    assert jobs[0] == 1
    assert 4 in states(scheduler, batches[0])
    refusal = await refusal_of(
        call(RetryEmailJobsRequest(user_id="ann", filter="row_number = 1", email_job_ids=["1"]))
    )
    assert (refusal.reason, list(refusal.violations)) == ("FILTER_INVALID", ["email_job_ids"])


def due_times(scheduler: Scheduler, batch: str) -> list[datetime]:
    rows = scheduler.rows(
        "SELECT scheduled_at FROM email_jobs WHERE batch_id = %s ORDER BY row_number", int(batch)
    )
    return [time for (time,) in rows]


@pytest.mark.usefixtures("small_parts")
async def test_waiting_jobs_that_match_get_another_due_time(scheduler: Scheduler) -> None:
    sender, foreign = await scheduler.sender("ann"), await scheduler.sender("bob")
    start = datetime.now(UTC) + timedelta(hours=1)
    options: dict[str, Any] = {
        "schedule_time": to_timestamp(start),
        "expire_after": Duration(seconds=60),
    }
    batch = await schedule(scheduler, sender, 5, **options)
    theirs = await schedule(scheduler, foreign, 5, **options)
    fail(scheduler, batch)
    before = due_times(scheduler, batch)
    call, count = scheduler.jobs.RescheduleEmailJobs, "rescheduled_count"
    fields: dict[str, Any] = {"user_id": "ann", "filter": "row_number > 1"}
    counted = RescheduleEmailJobsRequest(**fields, schedule_time=LATER, validate_only=True)
    assert (await in_parts(call, counted, count))[0] == 2
    assert due_times(scheduler, batch) == before
    request = RescheduleEmailJobsRequest(**fields, schedule_time=LATER)
    assert (await in_parts(call, request, count))[0] == 2
    later = LATER.ToDatetime(UTC)
    assert due_times(scheduler, batch) == [before[0], before[1], later, before[3], later]
    assert scheduler.value(
        "SELECT max(expires_at) FROM email_jobs WHERE batch_id = %s", int(batch)
    ) == later + timedelta(seconds=60)
    last_due = "SELECT last_due_at FROM batches WHERE id = %s"
    assert scheduler.value(last_due, int(batch)) == later
    hour = Duration(seconds=3600)
    request = RescheduleEmailJobsRequest(batch_id=batch, delay=hour)
    assert (await in_parts(call, request, count))[0] == 3
    assert due_times(scheduler, batch)[0] == before[0] + timedelta(hours=1)
    assert due_times(scheduler, batch)[4] == later + timedelta(hours=1)
    # No job becomes due in the past.
    request = RescheduleEmailJobsRequest(batch_id=batch, delay=Duration(seconds=-30 * 86_400))
    assert (await in_parts(call, request, count))[0] == 3
    assert due_times(scheduler, batch)[0] > datetime.now(UTC) - timedelta(minutes=5)
    assert due_times(scheduler, theirs) == [before[0]] * 5
    await eventually(lambda: scheduler.value("SELECT count(*) = 0 FROM head_markers"))


async def test_a_set_needs_a_filter_a_user_and_a_time(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    batch = await schedule(scheduler, sender)
    jobs = scheduler.jobs
    for call, reason in (
        (jobs.CancelEmailJobs(CancelEmailJobsRequest(user_id="ann")), "FILTER_REQUIRED"),
        (jobs.CancelEmailJobs(CancelEmailJobsRequest(filter="row_number = 1")), "USER_ID_REQUIRED"),
        (
            jobs.CancelEmailJobs(CancelEmailJobsRequest(user_id="ann", filter="nothing = 1")),
            "FILTER_INVALID",
        ),
        (
            jobs.CancelEmailJobs(CancelEmailJobsRequest(batch_id=batch, page_token="x")),
            "PAGE_TOKEN_INVALID",
        ),
        (
            jobs.RescheduleEmailJobs(RescheduleEmailJobsRequest(batch_id=batch)),
            "NEW_TIME_INVALID",
        ),
        (
            jobs.RescheduleEmailJobs(
                RescheduleEmailJobsRequest(batch_id=batch, delay=Duration(seconds=367 * 86_400))
            ),
            "NEW_TIME_INVALID",
        ),
    ):
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
    assert states(scheduler, batch) == [1] * 4


@pytest.mark.usefixtures("small_parts")
async def test_the_commands_list_and_change_all_parts(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    batch = await schedule(scheduler, sender, 7)

    async def run(*words: str) -> Any:
        ended = await outbox(scheduler, *words, "--user", "ann", "-o", "json")
        assert ended.exit_code == 0, ended
        return json.loads(ended.stdout)

    wanted = ("--filter", "row_number > 2")
    page = await run("jobs", "list", *wanted, "--order-by", "create_time desc", "--page-size", "2")
    assert [job["row_number"] for job in page["email_jobs"]] == ["7", "6"]
    done = await run("jobs", "reschedule", *wanted, "--at", "2033-05-18T03:33:20Z")
    assert done["rescheduled_count"] == "5"
    assert due_times(scheduler, batch)[6] == LATER.ToDatetime(UTC)
    assert (await run("jobs", "cancel", *wanted))["cancelled_count"] == "5"
    assert states(scheduler, batch) == [1, 1] + [6] * 5
    fail(scheduler, batch)
    retried = await run("jobs", "retry", "--filter", "row_number = 2", "--dry-run")
    assert retried["retried_count"] == "1"
    assert states(scheduler, batch) == [1, 4] + [6] * 5
