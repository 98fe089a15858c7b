"""One row cancels a batch, and its jobs' rows are updated later; callers see no difference."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from functools import partial

import pytest
import pytest_asyncio
from outbox.v1 import email_job_pb2
from outbox.v1.batch_service_pb2 import CancelBatchRequest, GetBatchRequest
from outbox.v1.email_job_service_pb2 import GetEmailJobRequest, ListEmailJobsRequest
from outbox.v1.sender_service_pb2 import DeleteSenderRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher.storage import (
    AttemptRecord,
    MarkedJob,
    explain_unmarked,
    settle,
)
from outbox_server.services.scheduler.storage.cancelling import (
    CancelledBatch,
    cancel_batch,
    sweep,
    unswept,
)
from outbox_server.services.scheduler.sweeping import Sweeper
from outbox_server.services.stats.storage import fold_once
from outbox_server.shared.database.counts import batch_counts, sender_counts, user_counts
from outbox_server.shared.database.models import EmailJob
from outbox_server.shared.heads.statements import HEADS_STATEMENT
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.eventually import eventually
from tests.marked_jobs import claims_of, mark_refs, raw
from tests.scheduler_stack import running_scheduler
from tests.world import TEST_SHARD, World

LEASE = timedelta(seconds=60)


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    settings = load_settings(database_url=database_url, redis_url=redis_url, min_gap="0")
    async with World(settings) as world:
        yield world
        await world.check_counts()


async def batch_of(world: World, job: int) -> int:
    return int((await world.job(job)).batch_id)


async def cancel(world: World, batch: int) -> CancelledBatch:
    async with world.engine.begin() as connection:
        cancelled = await cancel_batch(connection, batch, None)
    assert cancelled is not None
    return cancelled


async def mark(world: World, jobs: Sequence[int]) -> list[MarkedJob]:
    async with world.engine.begin() as connection:
        return await mark_refs(connection, [JobRef(job, 1) for job in jobs], LEASE)


async def waiting_among(connection: AsyncConnection, refs: Sequence[JobRef]) -> set[int]:
    claims = await claims_of(connection, refs)
    return set((await explain_unmarked(connection, claims, shard=TEST_SHARD)).due)


async def end(world: World, marked: Sequence[MarkedJob], state: JobState) -> None:
    now = time.monotonic()
    outcome = AttemptOutcome.SENT if state is JobState.SENT else AttemptOutcome.TEMPORARY_FAILURE
    records = [
        AttemptRecord(
            job=job.job,
            sender_id=job.sender_id,
            state=state,
            failures=1,
            outcome=outcome,
            counted=True,
            started=now,
            ended=now,
            retry_after=timedelta(0),
        )
        for job in marked
    ]
    async with world.engine.begin() as connection:
        await settle(await raw(connection), records, now)


async def one_step(world: World, batch: int, limit: int) -> bool:
    async with world.engine.begin() as connection:
        return await sweep(connection, batch, limit)


async def left(world: World) -> Sequence[int]:
    async with world.engine.connect() as connection:
        return await unswept(connection)


async def any_lock_waits(world: World) -> bool:
    return bool(await world.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7])
async def test_counts_are_right_at_every_step_of_a_cancellation(world: World, limit: int) -> None:
    sender = await world.sender()
    jobs = await world.schedule(sender, 6)
    others = await world.schedule(sender, 2)
    batch = await batch_of(world, jobs[0])
    marked = await mark(world, [jobs[2], others[0]])
    assert (await cancel(world, batch)).jobs == 5
    for _ in range(20):
        await world.check_counts()
        async with world.engine.connect() as connection:
            counts = (await batch_counts(connection, [batch]))[batch]
            of_sender = (await sender_counts(connection, [sender]))[sender]
            of_user = await user_counts(connection, "anna")
        assert (counts.scheduled, counts.sending, counts.cancelled) == (0, 1, 5)
        assert (of_sender.scheduled, of_sender.sending, of_sender.cancelled) == (1, 2, 5)
        assert of_user == of_sender
        if not await one_step(world, batch, limit):
            break
        await fold_once(world.engine)
    assert await world.in_state(JobState.CANCELLED) == {*jobs} - {jobs[2]}
    # One job is in flight and may wait again later.
    assert list(await left(world)) == [batch]
    await end(world, marked, JobState.SENT)
    while await one_step(world, batch, limit):
        pass
    assert list(await left(world)) == []
    rows = await world.sql("SELECT DISTINCT finished_at FROM email_jobs WHERE state = 6")
    (cancelled,) = await world.sql("SELECT cancelled_at FROM batches WHERE id = %s", batch)
    assert [row.finished_at for row in rows] == [cancelled.cancelled_at]


async def test_a_job_that_returns_from_a_failed_attempt_is_cancelled(world: World) -> None:
    jobs = await world.schedule(await world.sender(), 5)
    batch = await batch_of(world, jobs[0])
    marked = await mark(world, jobs[:2])
    await cancel(world, batch)
    assert await one_step(world, batch, 1)
    while await one_step(world, batch, 1):
        pass
    await end(world, marked, JobState.SCHEDULED)
    await world.check_counts()
    async with world.engine.connect() as connection:
        assert (await batch_counts(connection, [batch]))[batch].cancelled == 5
    async with world.engine.begin() as connection:
        again = [JobRef(job.job.job_id, 2) for job in marked]
        assert await mark_refs(connection, again, LEASE) == []
    while await one_step(world, batch, 1):
        pass
    assert (await world.states())[JobState.CANCELLED] == 5
    assert list(await left(world)) == []


async def test_a_mark_during_a_cancellation_marks_nothing_and_does_not_wait(world: World) -> None:
    jobs = await world.schedule(await world.sender(), 3)
    batch = await batch_of(world, jobs[0])
    async with world.engine.begin() as connection:
        cancelled = await cancel_batch(connection, batch, None)
        assert await mark(world, jobs) == []
        refs = [JobRef(job, 1) for job in jobs]
        async with world.engine.connect() as other:
            # As far as others know, they still wait: they are claimed again, and refused then.
            assert await waiting_among(other, refs) == set(jobs)
    assert cancelled is not None
    assert cancelled.jobs == 3
    async with world.engine.connect() as other:
        assert await waiting_among(other, refs) == set()
    await world.check_counts()


async def test_a_cancellation_waits_for_a_mark_and_is_too_late_for_it(world: World) -> None:
    jobs = await world.schedule(await world.sender(), 3)
    batch = await batch_of(world, jobs[0])
    async with world.engine.begin() as connection:
        marked = await mark_refs(connection, [JobRef(jobs[0], 1)], LEASE)
        cancelling = asyncio.create_task(cancel(world, batch))
        await eventually(partial(any_lock_waits, world))
    assert (len(marked), (await cancelling).jobs) == (1, 2)
    await end(world, marked, JobState.SENT)


async def test_a_head_holds_no_job_of_a_cancelled_batch(world: World) -> None:
    sender = await world.sender()
    jobs = await world.schedule(sender, 200)
    others = await world.schedule(sender, 2, due=timedelta(milliseconds=1))
    (queue,) = world.queues
    assert await world.loader.rebuild(queue)
    await cancel(world, await batch_of(world, jobs[0]))
    await world.loader.load([sender], committed=True)

    async def claim() -> set[int]:
        return {claim.job.job_id for claim in (await queue.claim(10)).claims}

    assert await eventually(claim) == set(others)


async def test_another_sweep_finishes_the_work_of_one_that_died(world: World) -> None:
    jobs = await world.schedule(await world.sender(), 4)
    batch = await batch_of(world, jobs[0])
    await cancel(world, batch)
    async with world.engine.connect() as dying:
        assert await sweep(dying, batch, 2)
        # Other sweeps do not wait for it.
        assert not await one_step(world, batch, 2)
        await dying.rollback()
    assert await world.in_state(JobState.SCHEDULED) == set(jobs)
    assert not await Sweeper(world.engine).sweep_all()
    assert await world.in_state(JobState.CANCELLED) == set(jobs)


async def test_a_scheduler_finishes_at_its_start_the_cancellations_of_another(world: World) -> None:
    jobs = await world.schedule(await world.sender(), 3)
    await cancel(world, await batch_of(world, jobs[0]))
    settings = world.settings
    async with running_scheduler(settings.database_url, settings.redis_url):

        async def ended() -> bool:
            return await world.in_state(JobState.CANCELLED) == set(jobs)

        await eventually(ended)


async def test_callers_see_jobs_as_cancelled_before_their_rows_are_updated(world: World) -> None:
    sender = await world.sender()
    jobs = await world.schedule(sender, 3)
    batch = await batch_of(world, jobs[0])
    await world.sql("UPDATE email_jobs SET recipient = 'a@b.org' WHERE id = %s", jobs[0])
    settings = world.settings
    async with running_scheduler(settings.database_url, settings.redis_url) as scheduler:
        async with world.engine.begin() as holding:
            # These locks keep the rows from being updated.
            await holding.execute(select(EmailJob.id).with_for_update())
            await cancel(world, batch)
            assert await world.in_state(JobState.SCHEDULED) == set(jobs)
            job = await scheduler.jobs.GetEmailJob(GetEmailJobRequest(email_job_id=str(jobs[0])))
            assert job.state == email_job_pb2.EMAIL_JOB_STATE_CANCELLED
            assert job.HasField("finish_time")
            for state, n in (
                (email_job_pb2.EMAIL_JOB_STATE_SCHEDULED, 0),
                (email_job_pb2.EMAIL_JOB_STATE_CANCELLED, 3),
                (email_job_pb2.EMAIL_JOB_STATE_UNSPECIFIED, 3),
            ):
                page = await scheduler.jobs.ListEmailJobs(
                    ListEmailJobsRequest(sender_id=str(sender), state=state)
                )
                assert len(page.email_jobs) == n
            found = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=str(batch)))
            assert (found.counts.scheduled_count, found.counts.cancelled_count) == (0, 3)
            # Cancelled jobs are not suppressed, and do not prevent the deletion of the sender.
            await scheduler.suppressions.CreateSuppression(
                CreateSuppressionRequest(user_id="anna", suppression=Suppression(email="a@b.org"))
            )
            again = await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=str(batch)))
            assert (again.cancelled_count, again.too_late_count) == (0, 0)
            await scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=str(sender)))
        await eventually(partial(_swept, world))
    assert await world.in_state(JobState.CANCELLED) == set(jobs)


async def _swept(world: World) -> bool:
    return not await left(world)


async def test_the_time_of_a_head_does_not_grow_with_the_square_of_the_cancelled_batches(
    world: World,
) -> None:
    sender = await world.sender()
    await world.schedule(sender, due=timedelta(hours=1))
    took: list[float] = []
    for batches in (3_000, 12_000):
        await world.sql(
            "WITH added AS (INSERT INTO batches (user_id, sender_id, request_id, request_hash,"
            " start_at, duplicates, mode, accepted_count, state, cancelled_at)"
            " SELECT s.user_id, s.id, gen_random_uuid(), '', now(), 1, 1, 1, 2, now()"
            " FROM senders AS s, generate_series(1, %s) WHERE s.id = %s RETURNING id, sender_id),"
            " jobs AS (INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number,"
            " recipient) SELECT id, sender_id, now(), 1, 'r@y.test' FROM added)"
            " INSERT INTO batch_cancellations (batch_id, sender_id, cancelled_at)"
            " SELECT id, sender_id, now() FROM added",
            batches - (3_000 if took else 0),
            sender,
        )
        await world.sql("ANALYZE")
        times: list[float] = []
        # The shortest of several, because other work of the machine only adds.
        for _ in range(7):
            async with world.engine.connect() as connection:
                began = time.perf_counter()
                (head,) = await connection.execute(HEADS_STATEMENT, {"senders": [sender]})
                times.append(time.perf_counter() - began)
            assert len(head.ids) == 1
        took.append(min(times))
    # Their jobs were never counted.
    await world.sql(
        "DELETE FROM email_jobs WHERE batch_id IN (SELECT batch_id FROM batch_cancellations)"
    )
    # Four times the batches take four times as long, and not sixteen times.
    assert took[1] < 8 * took[0], took
