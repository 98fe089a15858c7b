"""RetryEmailJobs and ResolveEmailJob: jobs that leave a final state, and their counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import timedelta

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from outbox.v1 import email_job_pb2, email_job_service_pb2
from outbox.v1.batch_service_pb2 import CancelBatchRequest
from outbox.v1.email_job_service_pb2 import (
    UNCERTAIN_RESOLUTION_RESEND,
    UNCERTAIN_RESOLUTION_SENT,
    ResolveEmailJobRequest,
    RetryEmailJobsRequest,
    RetryEmailJobsResponse,
)
from outbox.v1.sender_service_pb2 import DeleteSenderRequest

from outbox_server.services.dispatcher.storage import AttemptRecord, settle
from outbox_server.services.scheduler.storage import job_set_rows
from outbox_server.services.stats.storage import fold_once
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.marked_jobs import mark_refs, raw
from tests.retrying import retry_failed
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.world import World

USER = "anna"
LEASE = timedelta(seconds=60)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running:
        yield running


@pytest_asyncio.fixture
async def world(scheduler: Scheduler) -> AsyncIterator[World]:
    async with World(scheduler.settings) as world:
        yield world
        await world.check_counts()


async def end(world: World, jobs: Sequence[int], state: JobState, attempt: int = 1) -> None:
    """End an attempt at each of these jobs, as a dispatcher does."""
    refs = [JobRef(job, attempt) for job in jobs]
    async with world.engine.begin() as connection:
        marked = await mark_refs(connection, refs, LEASE)
    assert len(marked) == len(jobs)
    now = time.monotonic()
    outcome = {
        JobState.SENT: AttemptOutcome.SENT,
        JobState.FAILED: AttemptOutcome.TEMPORARY_FAILURE,
        JobState.UNCERTAIN: AttemptOutcome.IN_DOUBT,
    }[state]
    records = [
        AttemptRecord(
            job=job.job,
            sender_id=job.sender_id,
            state=state,
            failures=4,
            outcome=outcome,
            counted=True,
            started=now,
            ended=now,
        )
        for job in marked
    ]
    async with world.engine.begin() as connection:
        await settle(await raw(connection), records, now)


def retry(scheduler: Scheduler, **fields: object) -> Awaitable[RetryEmailJobsResponse]:
    return scheduler.jobs.RetryEmailJobs(RetryEmailJobsRequest(**fields))  # type: ignore[arg-type]


def resolve(
    scheduler: Scheduler,
    job: int | str,
    resolution: email_job_service_pb2.UncertainResolution.ValueType,
    user_id: str = USER,
) -> Awaitable[email_job_pb2.EmailJob]:
    request = ResolveEmailJobRequest(email_job_id=str(job), resolution=resolution, user_id=user_id)
    return scheduler.jobs.ResolveEmailJob(request)


async def batch_of(world: World, job: int) -> str:
    return str((await world.job(job)).batch_id)


async def test_retried_jobs_of_a_batch_wait_again_and_are_claimed(
    scheduler: Scheduler, world: World
) -> None:
    sender = await world.sender()
    jobs = await world.schedule(sender, 5)
    others = await world.schedule(sender, 2)
    await end(world, [*jobs[:3], others[0]], JobState.FAILED)
    await end(world, jobs[3:4], JobState.SENT)
    before = time.time()
    answer = await retry(scheduler, batch_id=await batch_of(world, jobs[0]))
    assert (answer.retried_count, answer.skipped_count) == (3, 2)
    assert await world.in_state(JobState.SCHEDULED) == {*jobs[:3], jobs[4], others[1]}
    for job in jobs[:3]:
        row = await world.job(job)
        # The attempt numbers continue; the backoff starts again.
        assert (row.attempt, row.failures, row.finished_at) == (1, 0, None)
        assert before - 1 < row.scheduled_at.timestamp() < time.time() + 1
    (queue,) = world.queues
    assert await world.loader.rebuild(queue)
    claimed = {claim.job for claim in (await queue.claim(10)).claims}
    assert claimed >= {JobRef(job, 2) for job in jobs[:3]}


async def test_a_retried_job_expires_after_the_expire_after_of_its_batch(
    scheduler: Scheduler, world: World
) -> None:
    sender = await scheduler.sender(USER)
    csv = "email,schedule_time\na@b.org,\nc@d.org,2050-01-01T00:00:00Z\n"
    hour = Duration(seconds=3600)
    answer = await scheduler.schedule(sender, csv, expire_after=hour)
    assert answer.batch.expire_after == hour
    rows = await world.sql("SELECT id, expires_at - scheduled_at AS left FROM email_jobs")
    assert [row.left for row in rows] == [timedelta(hours=1)] * 2
    job = rows[0].id
    await end(world, [job], JobState.FAILED)
    await world.sql("UPDATE email_jobs SET expires_at = now() WHERE id = %s", job)
    assert (await retry(scheduler, email_job_ids=[str(job)], user_id=USER)).retried_count == 1
    row = await world.job(job)
    assert row.expires_at - row.scheduled_at == timedelta(hours=1)
    for wrong in (Duration(), Duration(seconds=-5), Duration(seconds=367 * 86400)):
        refusal = await refusal_of(scheduler.schedule(sender, csv, expire_after=wrong))
        assert refusal.reason == "EXPIRE_AFTER_INVALID"


async def test_a_retry_loads_its_jobs_into_redis_by_itself(
    scheduler: Scheduler, world: World
) -> None:
    (queue,) = world.queues
    assert await world.loader.rebuild(queue)
    sender = await world.sender()
    (job,) = await world.schedule(sender, load=False)
    await end(world, [job], JobState.FAILED)
    await retry(scheduler, sender_id=str(sender))
    assert [claim.job for claim in (await queue.claim(10)).claims] == [JobRef(job, 2)]


async def test_all_filters_of_a_retry_must_match(scheduler: Scheduler, world: World) -> None:
    one, other = await world.sender(), await world.sender()
    mine = await world.schedule(one, 3)
    more = await world.schedule(one, 2)
    theirs = await world.schedule(other, 2)
    await end(world, [*mine, *more, *theirs], JobState.FAILED)
    batch = await batch_of(world, mine[0])
    for fields, counts in (
        ({"batch_id": batch, "sender_id": str(other)}, (0, 0)),
        ({"batch_id": batch, "user_id": "bob"}, (0, 0)),
        ({"sender_id": "999999"}, (0, 0)),
        ({"batch_id": "x"}, (0, 0)),
        ({"email_job_ids": [str(mine[0]), str(theirs[0]), "9999", "x"], "user_id": USER}, (2, 0)),
        ({"email_job_ids": [str(mine[1]), str(theirs[1])], "batch_id": batch}, (1, 0)),
        ({"email_job_ids": [str(mine[1])], "user_id": "bob"}, (0, 0)),
        ({"email_job_ids": [str(mine[1])], "user_id": USER}, (0, 1)),
        ({"sender_id": str(one)}, (3, 2)),
    ):
        answer = await retry(scheduler, **fields)
        assert (answer.retried_count, answer.skipped_count) == counts, fields
    assert await world.in_state(JobState.FAILED) == {theirs[1]}


async def test_a_retry_without_a_filter_is_refused(scheduler: Scheduler) -> None:
    for fields, reason in (
        ({"user_id": USER}, "FILTER_REQUIRED"),
        ({"email_job_ids": ["1"]}, "USER_ID_REQUIRED"),
        ({"user_id": USER, "email_job_ids": ["1"] * 1001}, "TOO_MANY_IDS"),
    ):
        refusal = await refusal_of(retry(scheduler, **fields))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)


@pytest.mark.parametrize("chunk", [1, 3, 6, 7])
async def test_a_retry_in_several_transactions_misses_no_job(
    world: World, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_set_rows, "ROWS_AT_ONCE", chunk)
    monkeypatch.setattr(job_set_rows, "BLOCK_JOBS", 1)
    sender = await world.sender()
    jobs = await world.schedule(sender, 6)
    await end(world, jobs, JobState.FAILED)
    await fold_once(world.engine)
    assert await retry_failed(world.engine, "sender_id", sender) == 6
    # Another process finds the marker if this one dies before the load.
    assert await world.sql("SELECT 1 FROM head_markers WHERE sender_id = %s", sender)


async def test_two_concurrent_retries_reopen_each_job_once(
    scheduler: Scheduler, world: World
) -> None:
    sender = await world.sender()
    await end(world, await world.schedule(sender, 200), JobState.FAILED)
    answers = await asyncio.gather(*(retry(scheduler, sender_id=str(sender)) for _ in range(4)))
    assert sum(answer.retried_count for answer in answers) == 200


async def test_jobs_of_a_cancelled_batch_or_a_deleted_sender_are_not_retried(
    scheduler: Scheduler, world: World
) -> None:
    sender, deleted = await world.sender(), await world.sender()
    cancelled = await world.schedule(sender, 2)
    gone = await world.schedule(deleted, 2)
    await end(world, [cancelled[0], gone[0]], JobState.FAILED)
    await end(world, [cancelled[1], gone[1]], JobState.UNCERTAIN)
    batch = await batch_of(world, cancelled[0])
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch))
    await scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=str(deleted)))
    for fields in ({"batch_id": batch}, {"sender_id": str(deleted)}):
        answer = await retry(scheduler, **fields)
        assert (answer.retried_count, answer.skipped_count) == (0, 2)
    for job in (cancelled[1], gone[1]):
        refusal = await refusal_of(resolve(scheduler, job, UNCERTAIN_RESOLUTION_RESEND))
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NOTHING_MORE_IS_SENT")
        job_now = await resolve(scheduler, job, UNCERTAIN_RESOLUTION_SENT)
        assert job_now.state == email_job_pb2.EMAIL_JOB_STATE_SENT


async def test_an_uncertain_job_resolved_as_sent_has_the_end_of_its_attempt_as_send_time(
    scheduler: Scheduler, world: World
) -> None:
    (job,) = await world.schedule(await world.sender())
    await end(world, [job], JobState.UNCERTAIN)
    (attempt,) = await world.attempts(job)
    answer = await resolve(scheduler, job, UNCERTAIN_RESOLUTION_SENT)
    assert answer.state == email_job_pb2.EMAIL_JOB_STATE_SENT
    assert answer.send_time.ToMicroseconds() == round(attempt.ended_at * 1e6)
    # The attempt keeps its recorded outcome.
    assert answer.last_outcome == email_job_pb2.ATTEMPT_OUTCOME_IN_DOUBT
    refusal = await refusal_of(resolve(scheduler, job, UNCERTAIN_RESOLUTION_RESEND))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NOT_UNCERTAIN")
    assert refusal.metadata["state"] == "SENT"


async def test_an_uncertain_job_can_be_sent_again(scheduler: Scheduler, world: World) -> None:
    (queue,) = world.queues
    assert await world.loader.rebuild(queue)
    (job,) = await world.schedule(await world.sender(), load=False)
    await end(world, [job], JobState.UNCERTAIN)
    answer = await resolve(scheduler, job, UNCERTAIN_RESOLUTION_RESEND)
    assert answer.state == email_job_pb2.EMAIL_JOB_STATE_SCHEDULED
    assert not answer.HasField("finish_time")
    assert [claim.job for claim in (await queue.claim(10)).claims] == [JobRef(job, 2)]
    await end(world, [job], JobState.SENT, attempt=2)


async def test_a_resolution_needs_a_job_and_a_decision(scheduler: Scheduler, world: World) -> None:
    (job,) = await world.schedule(await world.sender())
    for ref, user, resolution, reason in (
        (job, "bob", UNCERTAIN_RESOLUTION_SENT, "EMAIL_JOB_NOT_FOUND"),
        ("x", USER, UNCERTAIN_RESOLUTION_SENT, "EMAIL_JOB_NOT_FOUND"),
        (job, USER, 0, "RESOLUTION_INVALID"),
        (job, USER, 9, "RESOLUTION_INVALID"),
        (job, USER, UNCERTAIN_RESOLUTION_SENT, "NOT_UNCERTAIN"),
    ):
        call = resolve(scheduler, ref, resolution, user)  # type: ignore[arg-type]
        assert (await refusal_of(call)).reason == reason
    assert await world.in_state(JobState.SCHEDULED) == {job}
