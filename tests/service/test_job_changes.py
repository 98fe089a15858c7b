"""A change of many jobs is stored at once and their rows are written later; no caller is misled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from outbox.v1 import batch_pb2, email_job_pb2, email_job_service_pb2_grpc
from outbox.v1.batch_service_pb2 import CancelBatchRequest, GetBatchRequest, UpdateBatchRequest
from outbox.v1.email_job_service_pb2 import (
    CancelEmailJobRequest,
    CancelEmailJobsRequest,
    GetEmailJobRequest,
    ListEmailJobsRequest,
    RescheduleEmailJobsRequest,
    RetryEmailJobsRequest,
)
from outbox.v1.hold_service_pb2 import BeginHoldRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.scheduler import job_sets, respreading
from outbox_server.services.scheduler.servicers import batch_control
from outbox_server.services.scheduler.storage import job_changes, job_set_rows
from outbox_server.services.scheduler.storage import job_sets as storage
from outbox_server.services.scheduler.storage.cancelling import sweep
from outbox_server.services.scheduler.storage.holds import HeldFilter, cancel_held
from outbox_server.services.scheduler.storage.respreading import respread_part
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from outbox_server.shared.states import BatchState, JobChangeKind, JobState
from tests.dispatchers import DispatcherProcess, options, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.world import World, jobs_in

SCHEDULED, CANCELLED = int(JobState.SCHEDULED), int(JobState.CANCELLED)


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store every change, and write none of its rows. A part writes 64 ids."""

    async def nothing(_: job_sets.JobSets, *__: Any) -> timedelta:
        return timedelta(hours=1)

    monkeypatch.setattr(job_sets.JobSets, "_write_all", nothing)
    monkeypatch.setattr(storage, "_WRITTEN_WITH_THE_CHANGE", 0)
    monkeypatch.setattr(job_changes, "WRITTEN_AT_ONCE", 1)


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(
        database_url, redis_url, min_gap="0", user_waiting_jobs=1_000_000
    ) as running_one:
        yield running_one


@pytest.fixture
async def world(scheduler: Scheduler) -> AsyncIterator[World]:
    async with World(scheduler.settings) as world:
        yield world
        await world.check_counts()


async def schedule(scheduler: Scheduler, rows: int, user: str = "ann", **fields: Any) -> str:
    csv = "email\n" + "".join(f"r{n}@b.org\n" for n in range(1, rows + 1))
    fields = {"subject": "Hello", "body": "Hi", **fields}
    sender = await scheduler.sender(user, hourly_limit=1_000_000)
    return (await scheduler.schedule(sender, csv, **fields)).batch.batch_id


async def get(scheduler: Scheduler, batch: str) -> batch_pb2.Batch:
    return await scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch))


async def jobs_of(
    scheduler: Scheduler, batch: str, wanted: str = "row_number > 0"
) -> list[email_job_pb2.EmailJob]:
    request = ListEmailJobsRequest(batch_id=batch, filter=wanted, page_size=1000)
    return list((await scheduler.jobs.ListEmailJobs(request)).email_jobs)


async def write(world: World, *, parts: int | None = None) -> None:
    """Write the rows of all changes, or some parts of the oldest one."""
    for change in (await world.sql("SELECT id FROM job_changes ORDER BY id"))[: parts and 1]:
        done, ended = 0, None
        while ended is None and done != parts:
            async with world.engine.begin() as connection:
                ended = await job_changes.write_part(connection, change.id)
            done += 1


def in_days(days: int) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)


def rows_of(scheduler: Scheduler, batch: str) -> list[int]:
    return [
        state
        for (state,) in scheduler.rows(
            "SELECT state FROM email_jobs WHERE batch_id = %s ORDER BY row_number", int(batch)
        )
    ]


@pytest.mark.usefixtures("unwritten")
async def test_jobs_that_are_being_cancelled_are_cancelled_for_every_reader(
    scheduler: Scheduler, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several parts of one batch.
    monkeypatch.setattr(job_set_rows, "ROWS_AT_ONCE", 50)
    batch, theirs = await schedule(scheduler, 200), await schedule(scheduler, 3, "bob")
    cancel = CancelEmailJobsRequest(user_id="ann", filter="row_number > 150")
    answer = await scheduler.jobs.CancelEmailJobs(cancel)
    assert (answer.cancelled_count, answer.next_page_token) == (50, "")
    assert rows_of(scheduler, batch) == [SCHEDULED] * 200
    await world.check_counts()
    # They are not cancelled twice.
    assert (await scheduler.jobs.CancelEmailJobs(cancel)).cancelled_count == 0
    cancel.filter = "row_number > 100 AND row_number < 160"
    assert (await scheduler.jobs.CancelEmailJobs(cancel)).cancelled_count == 50

    for parts in (1, None):
        found = await get(scheduler, batch)
        assert (found.counts.scheduled_count, found.counts.cancelled_count) == (100, 100)
        states = [job.state for job in await jobs_of(scheduler, batch)]
        assert states == [SCHEDULED] * 100 + [CANCELLED] * 100
        cancelled = await jobs_of(scheduler, batch, "state = CANCELLED")
        assert [job.row_number for job in cancelled] == list(range(101, 201))
        assert all(job.HasField("finish_time") for job in cancelled)
        assert len(await jobs_of(scheduler, batch, "state = SCHEDULED")) == 100
        await world.check_counts()
        one = GetEmailJobRequest(email_job_id=cancelled[0].email_job_id)
        assert (await scheduler.jobs.GetEmailJob(one)).state == CANCELLED
        await write(world, parts=parts)
    assert rows_of(scheduler, batch) == [SCHEDULED] * 100 + [CANCELLED] * 100
    assert not (await get(scheduler, batch)).rescheduling
    assert rows_of(scheduler, theirs) == [SCHEDULED] * 3
    assert scheduler.value("SELECT count(*) FROM job_change_blocks") == 0
    events = scheduler.rows(
        "SELECT email_job_id FROM job_events WHERE state = 6 AND batch_id = %s", int(batch)
    )
    assert len(set(events)) == len(events) == 100


@pytest.mark.usefixtures("unwritten")
async def test_other_changes_of_jobs_whose_rows_are_not_written_are_exact(
    scheduler: Scheduler, world: World
) -> None:
    """A cancelled job cannot be suppressed or cancelled again, and a whole batch ends them all."""
    batch = await schedule(scheduler, 100)
    later = RescheduleEmailJobsRequest(batch_id=batch, delay=Duration(seconds=7200))
    assert (await scheduler.jobs.RescheduleEmailJobs(later)).rescheduled_count == 100
    other = await schedule(scheduler, 1, "bob")
    foreign = RescheduleEmailJobsRequest(batch_id=other, delay=Duration(seconds=7200))
    assert (await scheduler.jobs.RescheduleEmailJobs(foreign)).rescheduled_count == 1
    cancel = CancelEmailJobsRequest(user_id="ann", filter="row_number <= 40")
    assert (await scheduler.jobs.CancelEmailJobs(cancel)).cancelled_count == 40
    for row in (1, 50):
        address = Suppression(email=f"r{row}@b.org")
        request = CreateSuppressionRequest(user_id="ann", suppression=address)
        await scheduler.suppressions.CreateSuppression(request)
        job = (await jobs_of(scheduler, batch, f"row_number = {row + 1}"))[0].email_job_id
        await scheduler.jobs.CancelEmailJob(CancelEmailJobRequest(email_job_id=job))
        await world.check_counts()
    counts = (await get(scheduler, batch)).counts
    assert (counts.scheduled_count, counts.cancelled_count) == (58, 41)
    assert counts.suppressed_count == 1
    assert (await scheduler.jobs.RescheduleEmailJobs(later)).rescheduled_count == 58
    # The loop writes in turns: of each user the oldest change.
    ids = [change for (change,) in scheduler.rows("SELECT id FROM job_changes ORDER BY id")]
    async with world.engine.begin() as connection:
        assert list(await job_changes.oldest_of_users(connection)) == ids[:2]
    await write(world, parts=1)
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch))
    done = await get(scheduler, batch)
    assert (done.counts.cancelled_count, done.counts.suppressed_count) == (99, 1)
    assert not done.rescheduling
    await eventually(lambda: not scheduler.rows("SELECT 1 FROM batch_cancellations"))
    assert scheduler.value("SELECT batch_id FROM job_changes") == int(other)
    assert sorted(rows_of(scheduler, batch)) == [CANCELLED] * 99 + [int(JobState.SUPPRESSED)]


@pytest.mark.usefixtures("unwritten")
async def test_jobs_wait_for_their_new_time_before_it_is_written(
    scheduler: Scheduler, world: World, inbox: Inbox
) -> None:
    """As after kill -9 of the scheduler: nothing is sent at the old time, and each delay counts."""
    batch = await schedule(scheduler, 130)
    before = [job.schedule_time.ToDatetime(UTC) for job in await jobs_of(scheduler, batch)]
    hours = RescheduleEmailJobsRequest(user_id="ann", filter="row_number > 65")
    hours.delay.FromTimedelta(timedelta(hours=2))
    for _ in range(2):
        assert (await scheduler.jobs.RescheduleEmailJobs(hours)).rescheduled_count == 65
    assert (await get(scheduler, batch)).rescheduling
    urls = scheduler.settings.database_url, scheduler.settings.redis_url
    async with running(settings_of(options(*urls, inbox.url))) as dispatcher:
        await eventually(dispatcher.serving)
        await write(world, parts=1)
        assert inbox.mails == []
        await write(world)
        await world.loader.load([scheduler.value("SELECT min(id) FROM senders")], committed=True)
        await eventually(lambda: len(inbox.mails) == 65)
    after = [job.schedule_time.ToDatetime(UTC) for job in await jobs_of(scheduler, batch)]
    assert after[:65] == before[:65]
    late = [new - old for new, old in zip(after[65:], before[65:], strict=True)]
    assert timedelta(hours=4) <= min(late)
    assert max(late) < timedelta(hours=4, minutes=5)
    assert not (await get(scheduler, batch)).rescheduling


async def fail(world: World, batch: str) -> None:
    """Let all waiting jobs of a batch fail."""
    await world.sql(
        "WITH moved AS (UPDATE email_jobs SET state = 4, finished_at = now(), attempt = 1"
        " WHERE batch_id = %s RETURNING sender_id, batch_id)"
        " INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)"
        " SELECT sender_id, batch_id, date_trunc('hour', now()), s,"
        " CASE s WHEN 1 THEN -count(*) ELSE count(*) END"
        " FROM moved, unnest(ARRAY[1, 4]) AS s GROUP BY 1, 2, s",
        int(batch),
    )


@pytest.mark.usefixtures("unwritten")
async def test_the_last_of_several_new_due_times_is_the_one_that_counts(
    scheduler: Scheduler, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any, **__: Any) -> None:
        pass

    monkeypatch.setattr(respreading.Respreader, "_respread", nothing)
    monkeypatch.setattr(batch_control, "_RESPREAD_IN_CALL", 0)
    first, second, third = (in_days(days) for days in (1, 2, 3))

    async def reschedule(batch: str, wanted: str, time: datetime) -> int:
        request = RescheduleEmailJobsRequest(
            batch_id=batch, filter=wanted, schedule_time=to_timestamp(time)
        )
        return (await scheduler.jobs.RescheduleEmailJobs(request)).rescheduled_count

    async def update(batch: str, time: datetime) -> None:
        changed = batch_pb2.Batch(batch_id=batch, schedule_time=to_timestamp(time))
        await scheduler.batches.UpdateBatch(UpdateBatchRequest(batch=changed))

    async def times(batch: str) -> list[datetime]:
        await write(world)
        async with world.engine.begin() as connection:
            await respread_part(connection, int(batch))
        found = await get(scheduler, batch)
        assert not found.rescheduling
        return [job.schedule_time.ToDatetime(UTC) for job in await jobs_of(scheduler, batch)]

    twice = await schedule(scheduler, 70)
    assert await reschedule(twice, "", first) == 70
    assert await reschedule(twice, "row_number = 1", second) == 1
    # The filter compares the new times.
    assert await reschedule(twice, f'schedule_time > "{first.isoformat()}"', third) == 1
    assert await times(twice) == [third] + [first] * 69

    whole = await schedule(scheduler, 70)
    assert await reschedule(whole, "", first) == 70
    await update(whole, second)
    assert await reschedule(whole, "row_number = 1", third) == 1
    assert await times(whole) == [third] + [second] * 69

    retried = await schedule(scheduler, 70)
    await fail(world, retried)
    retry = RetryEmailJobsRequest(batch_id=retried, filter="row_number > 0")
    assert (await scheduler.jobs.RetryEmailJobs(retry)).retried_count == 70
    await update(retried, second)
    async with world.engine.begin() as connection:
        assert await respread_part(connection, int(retried)) == 0
    assert await times(retried) == [second] * 70


@pytest.mark.usefixtures("unwritten")
async def test_a_cancellation_means_the_jobs_as_earlier_changes_leave_them(
    scheduler: Scheduler, world: World
) -> None:
    some = await schedule(scheduler, 10)
    later = RescheduleEmailJobsRequest(batch_id=some, filter="row_number > 6")
    later.schedule_time.FromDatetime(in_days(2))
    assert (await scheduler.jobs.RescheduleEmailJobs(later)).rescheduled_count == 4
    cancel = CancelEmailJobsRequest(batch_id=some)
    cancel.filter = f'schedule_time < "{in_days(1).isoformat()}"'
    assert (await scheduler.jobs.CancelEmailJobs(cancel)).cancelled_count == 6

    # Jobs that were retried before are cancelled, one by one or with their batch.
    for wanted, count in (("row_number > 0", 10), ('recipient = "r1@b.org"', 1), ("", 0)):
        batch = await schedule(scheduler, 10)
        await fail(world, batch)
        retry = RetryEmailJobsRequest(batch_id=batch, filter="row_number > 0")
        assert (await scheduler.jobs.RetryEmailJobs(retry)).retried_count == 10
        cancel, cancelled = CancelEmailJobsRequest(batch_id=batch, filter=wanted), 0
        while True:
            # The first call may end after it has written the retries.
            answer = await scheduler.jobs.CancelEmailJobs(cancel)
            cancelled += answer.cancelled_count
            cancel.page_token = answer.next_page_token
            if not cancel.page_token:
                break
        assert cancelled == count
        await write(world)
        left = rows_of(scheduler, batch).count(SCHEDULED)
        assert left == (10 - count if wanted else 0)
    await world.check_counts()


@pytest.mark.usefixtures("unwritten")
async def test_counts_are_exact_beside_an_older_release_and_a_cancelled_hold(
    scheduler: Scheduler, world: World
) -> None:
    """An older release cancels a batch without a look at its changes; so does `CancelHeld`."""
    batch = await schedule(scheduler, 10)
    cancel = CancelEmailJobsRequest(batch_id=batch, filter="row_number > 4")
    assert (await scheduler.jobs.CancelEmailJobs(cancel)).cancelled_count == 6
    await world.sql(
        "WITH cancelled AS (UPDATE batches SET state = %s, cancelled_at = now() WHERE id = %s"
        " RETURNING id, sender_id, cancelled_at) INSERT INTO batch_cancellations"
        " (batch_id, sender_id, cancelled_at) SELECT * FROM cancelled",
        int(BatchState.CANCELLED),
        int(batch),
    )
    await world.check_counts()
    async with world.engine.begin() as connection:
        await sweep(connection, int(batch))
    await world.check_counts()
    await write(world)
    await world.check_counts()

    batch = await schedule(scheduler, 10)
    await scheduler.holds.BeginHold(BeginHoldRequest())
    cancel.batch_id = batch
    async with world.engine.begin() as connection:
        held = await cancel_held(connection, HeldFilter(batch_id=int(batch)), 0)
        assert (held.jobs, held.last_id) == (10, 0)
        call = asyncio.ensure_future(scheduler.jobs.CancelEmailJobs(cancel))
        await eventually(
            lambda: call.done() or scheduler.rows("SELECT 1 FROM pg_locks WHERE NOT granted")
        )
    assert (await call).cancelled_count == 0
    await world.check_counts()


@pytest.mark.usefixtures("unwritten")
async def test_an_older_scheduler_cannot_end_what_keeps_the_mail_of_a_batch_back(
    scheduler: Scheduler, world: World
) -> None:
    """It ends new times of a batch without a look at changes of some of its jobs."""
    batch = await schedule(scheduler, 10)
    cancel = CancelEmailJobsRequest(batch_id=batch, filter="row_number > 4")
    assert (await scheduler.jobs.CancelEmailJobs(cancel)).cancelled_count == 6
    end = "UPDATE batches SET respreading = false, spread_count = 10 WHERE id = %s"
    await world.sql(end, int(batch))
    assert (await get(scheduler, batch)).rescheduling
    retry = "UPDATE job_changes SET kind = %s WHERE batch_id = %s"
    for kind in (JobChangeKind.RETRY, JobChangeKind.CANCEL):
        # Failed jobs that are retried keep nothing back.
        await world.sql(retry, int(kind), int(batch))
        await world.sql("UPDATE batches SET respreading = true WHERE id = %s", int(batch))
        await world.sql(end, int(batch))
        held = (await get(scheduler, batch)).rescheduling
        assert held is (kind is JobChangeKind.CANCEL)
    await write(world)
    assert not (await get(scheduler, batch)).rescheduling


@pytest.mark.usefixtures("unwritten")
async def test_retries_that_are_not_written_count_for_the_quota_and_end_with_their_batch(
    database_url: str, redis_url: str
) -> None:
    async with (
        running_scheduler(database_url, redis_url, user_waiting_jobs=100) as scheduler,
        World(scheduler.settings) as world,
    ):
        batch = await schedule(scheduler, 90)
        await fail(world, batch)
        retry = RetryEmailJobsRequest(user_id="ann", filter="row_number <= 60")
        assert (await scheduler.jobs.RetryEmailJobs(retry)).retried_count == 60
        assert (await scheduler.jobs.RetryEmailJobs(retry)).retried_count == 0
        assert not (await get(scheduler, batch)).rescheduling
        # Neither kind of intake may use the room of jobs that will wait.
        for csv in ("email\n" + "x@b.org\n" * 41, "email\n" + "x@b.org\n" * 39):
            sender = await scheduler.sender("ann", hourly_limit=1_000_000)
            call = scheduler.schedule(sender, csv, subject="Hello", body="Hi", duplicates=2)
            if csv.count("@") == 41:
                refused = await refusal_of(call)
                assert refused.reason == "USER_WAITING_JOBS_EXCEEDED"
            else:
                other = (await call).batch.batch_id
        retry.filter = "row_number > 60"
        refused = await refusal_of(scheduler.jobs.RetryEmailJobs(retry))
        assert (refused.code, refused.reason) == (
            "RESOURCE_EXHAUSTED",
            "USER_WAITING_JOBS_EXCEEDED",
        )
        await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=other))
        assert (await scheduler.jobs.RetryEmailJobs(retry)).retried_count == 30
        await write(world, parts=1)
        await world.check_counts()
        await world.sql("UPDATE senders SET deleted_at = now()")
        await write(world)
        counts = (await get(scheduler, batch)).counts
        assert counts.scheduled_count + counts.failed_count == 90
        assert 0 < counts.scheduled_count <= 64
        assert not scheduler.rows("SELECT 1 FROM job_changes")
        await world.check_counts()


@pytest.mark.usefixtures("unwritten")
async def test_a_job_whose_retry_is_not_written_is_neither_retried_twice_nor_lost_to_a_cancel(
    scheduler: Scheduler, world: World
) -> None:
    batch = await schedule(scheduler, 90)
    await fail(world, batch)

    async def retry(**fields: Any) -> tuple[int, int]:
        answer = await scheduler.jobs.RetryEmailJobs(RetryEmailJobsRequest(**fields))
        assert not answer.next_page_token
        return answer.retried_count, answer.skipped_count

    assert await retry(batch_id=batch, filter="row_number <= 70") == (70, 0)
    ids = [job.email_job_id for job in await jobs_of(scheduler, batch)]
    # A stored retry is the one retry of its jobs, however they are named.
    assert await retry(user_id="ann", email_job_ids=ids[:1]) == (0, 1)
    assert await retry(user_id="ann", email_job_ids=[ids[1], ids[80]]) == (1, 1)
    assert await retry(batch_id=batch) == (19, 71)
    assert await retry(sender_id=str(scheduler.value("SELECT id FROM senders"))) == (0, 90)

    # Whoever cancels a job that will be sent again can rely on the answer.
    cancel = [CancelEmailJobRequest(email_job_id=job, identity="ann") for job in ids[:2]]
    for job in await asyncio.gather(*map(scheduler.jobs.CancelEmailJob, cancel)):
        assert job.state == CANCELLED
    await write(world)
    assert rows_of(scheduler, batch) == [CANCELLED] * 2 + [SCHEDULED] * 88
    # No other retry is left.
    assert not scheduler.rows("SELECT 1 FROM job_changes")


async def test_hundreds_of_concurrent_cancellations_share_a_few_transactions(
    scheduler: Scheduler, world: World
) -> None:
    batches = [await schedule(scheduler, rows, user) for rows, user in ((1, "ann"), (1, "bob"))]
    await fail(world, batches[0])
    batches.append(await schedule(scheduler, 340))
    [[failed], [his], hers] = [
        [job.email_job_id for job in await jobs_of(scheduler, batch)] for batch in batches
    ]

    async def outcome(job: str, **fields: Any) -> str:
        request = CancelEmailJobRequest(email_job_id=job, user_id="ann", identity=job, **fields)
        call = asyncio.ensure_future(scheduler.jobs.CancelEmailJob(request))
        await asyncio.wait([call])
        return (await refusal_of(call)).reason if call.exception() else ""

    twice = {"request_id": "twice"}
    answers = await asyncio.gather(
        *map(outcome, hers[:-2]),
        # The same job, jobs that it is too late for, or that are not hers, and one request_id.
        *map(outcome, (hers[0], failed, his, "77")),
        *(outcome(hers[-2], **twice) for _ in range(2)),
    )
    assert answers[:339] == [""] * 339
    assert answers[339:] == ["TOO_LATE_TO_CANCEL", *["EMAIL_JOB_NOT_FOUND"] * 2, "", ""]
    assert await outcome(hers[-2], **twice) == ""
    assert await outcome(hers[-1], **twice) == "REQUEST_ID_REUSED"
    cancelled = scheduler.rows("SELECT id::text FROM email_jobs WHERE state = 6 ORDER BY id")
    assert len(cancelled) == 339
    events = scheduler.rows(
        "SELECT target, identity FROM audit_events WHERE action = 'CancelEmailJob'"
    )
    assert sorted(events) == sorted((f"email-jobs/{job}", job) for (job,) in cancelled)
    # A statement has one time, so a group has one. Alone, each call would have its own.
    assert scheduler.value("SELECT count(DISTINCT finished_at) FROM email_jobs") < 170
    await eventually(lambda: not scheduler.rows("SELECT 1 FROM head_markers"))


async def test_a_sender_has_a_limited_number_of_changes_that_are_not_written(
    scheduler: Scheduler, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further calls first write rows; so the work of others that read the jobs is bounded."""
    monkeypatch.setattr(storage, "_WRITTEN_WITH_THE_CHANGE", 0)
    monkeypatch.setattr(job_changes, "MOST_UNWRITTEN", 3)
    batch = await schedule(scheduler, 10)
    for row in range(1, 9):
        request = CancelEmailJobsRequest(batch_id=batch, filter=f"row_number = {row}")
        assert (await scheduler.jobs.CancelEmailJobs(request)).cancelled_count == 1
        assert scheduler.value("SELECT count(*) FROM job_changes") <= 3
    await eventually(lambda: not scheduler.rows("SELECT 1 FROM job_changes"))
    assert rows_of(scheduler, batch) == [CANCELLED] * 8 + [SCHEDULED] * 2
    await world.check_counts()


async def test_a_scheduler_that_is_killed_while_mail_is_sent_cancels_exactly_what_it_answered(
    scheduler: Scheduler, world: World, inbox: Inbox, tmp_path: Path
) -> None:
    """kill -9 in the middle of 6,600 rows, while a dispatcher sends mail of the same batch."""
    urls = scheduler.settings.database_url, scheduler.settings.redis_url
    settings = dict(zip(("database_url", "redis_url"), urls, strict=True))
    settings |= {"auth": "off", "min_gap": "0", "user_waiting_jobs": "1000000"}
    async with running(settings_of(options(*urls, inbox.url))):
        batch = await schedule(scheduler, 7_000)
        await eventually(lambda: len(inbox.mails) > 20)
        process = DispatcherProcess(settings, tmp_path / "scheduler.log", "scheduler")
        await process.start()
        async with grpc.aio.insecure_channel(await process.address()) as channel:
            stub = email_job_service_pb2_grpc.EmailJobServiceStub(channel)
            answer = await stub.CancelEmailJobs(
                CancelEmailJobsRequest(user_id="ann", filter="row_number > 400")
            )
            assert answer.next_page_token == ""
            found = (await get(scheduler, batch)).counts
            assert found.cancelled_count == answer.cancelled_count
            await process.kill()
        await eventually(lambda: not scheduler.rows("SELECT 1 FROM job_changes"))
        await eventually(world.done)
    states = {
        job: JobState(state) for job, state in scheduler.rows("SELECT id, state FROM email_jobs")
    }
    sent = {job for job, state in states.items() if state is JobState.SENT}
    assert set(states.values()) == {JobState.SENT, JobState.CANCELLED}
    assert len(states) - len(sent) == answer.cancelled_count
    assert jobs_in(inbox.mails) == dict.fromkeys(sent, 1)
    assert len(sent) >= 400
