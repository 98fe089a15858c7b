"""Renewals of leases in PostgreSQL, also concurrent with other statements on the same job."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.eventually import eventually
from tests.marked_jobs import mark_refs, raw
from tests.world import World

LEASE = timedelta(minutes=1)
OVER = timedelta(milliseconds=-1)  # a lease that has expired when it begins


async def marked_jobs(
    world: World, connection: AsyncConnection, n: int = 1, lease: timedelta = LEASE
) -> list[MarkedJob]:
    jobs = await world.schedule(await world.sender(), n, load=False)
    marked = await mark_refs(connection, [JobRef(job, 1) for job in jobs], lease)
    return sorted(marked, key=lambda each: each.job)


async def renew(connection: AsyncConnection, *jobs: MarkedJob) -> dict[int, datetime]:
    return await storage.renew_leases(connection, [each.job for each in jobs], LEASE)


def sent(marked: MarkedJob) -> AttemptRecord:
    now = time.monotonic()
    return AttemptRecord(
        job=marked.job,
        sender_id=marked.sender_id,
        state=JobState.SENT,
        failures=0,
        outcome=AttemptOutcome.SENT,
        counted=True,
        started=now,
        ended=now,
    )


async def waiting_for_locks(world: World, n: int) -> None:
    async def waiting() -> bool:
        rows = await world.sql(
            "SELECT count(*) AS n FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return int(rows[0].n) == n

    await eventually(waiting)


async def test_a_renewal_moves_the_end_to_a_full_lease_from_now(
    world: World, connection: AsyncConnection
) -> None:
    first, second, other = await marked_jobs(world, connection, 3)
    before = datetime.now(UTC)

    ends = await renew(connection, second, first)

    assert set(ends) == {first.job.job_id, second.job.job_id}
    for marked in (first, second):
        row = await world.job(marked.job.job_id)
        assert row.lease_until == ends[marked.job.job_id]
        assert before + LEASE <= row.lease_until <= datetime.now(UTC) + LEASE
        assert (row.state, row.attempt) == (JobState.SENDING, 1)
    assert (await world.job(other.job.job_id)).lease_until == other.lease_until


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE email_jobs SET state = 3, lease_until = NULL, finished_at = now() WHERE id = %s",
        "UPDATE email_jobs SET state = 1, lease_until = NULL WHERE id = %s",
        "UPDATE email_jobs SET attempt = 2 WHERE id = %s",
        "DELETE FROM email_jobs WHERE id = %s",
    ],
    ids=["sent", "waiting", "a newer attempt", "gone"],
)
async def test_a_job_that_changed_after_its_mark_is_not_renewed(
    world: World, connection: AsyncConnection, spoil: str
) -> None:
    job, good = await marked_jobs(world, connection, 2)
    await world.sql(spoil, job.job.job_id)
    before = await world.sql("SELECT * FROM email_jobs WHERE id = %s", job.job.job_id)

    assert set(await renew(connection, job, good)) == {good.job.job_id}
    assert await world.sql("SELECT * FROM email_jobs WHERE id = %s", job.job.job_id) == before


async def test_a_job_that_was_given_back_is_not_renewed(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await marked_jobs(world, connection)
    assert await storage.give_back(connection, [job])

    assert await renew(connection, job) == {}


async def test_a_job_that_was_recovered_is_not_renewed(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await marked_jobs(world, connection, lease=OVER)
    assert await storage.recover_expired(connection, LEASE, JobState.SCHEDULED)

    assert await renew(connection, job) == {}
    # The next attempt, which another dispatcher holds, is not renewed either.
    await mark_refs(connection, [JobRef(job.job.job_id, 2)], LEASE)
    assert await renew(connection, job) == {}


async def test_a_renewal_whose_answer_was_lost_is_repeated(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await marked_jobs(world, connection)
    lost = await renew(connection, job)

    again = await renew(connection, job)

    assert again[job.job.job_id] > lost[job.job.job_id]


async def test_a_renewed_job_is_given_back_only_by_its_new_end(
    world: World, connection: AsyncConnection
) -> None:
    # Therefore a send that does not know its end is recorded as an attempt (LeasedJob.known).
    [job] = await marked_jobs(world, connection)
    ends = await renew(connection, job)

    assert await storage.give_back(connection, [job]) == {}
    renewed = replace(job, lease_until=ends[job.job.job_id])
    assert set(await storage.give_back(connection, [renewed])) == {job.job.job_id}


async def test_a_renewed_job_is_settled_by_its_attempt(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await marked_jobs(world, connection)
    await renew(connection, job)

    assert set(await storage.settle(await raw(connection), [sent(job)], time.monotonic())) == {
        job.job.job_id
    }


# Concurrent with a recovery ------------------------------------------------------------------


async def test_an_expired_lease_that_was_not_noticed_is_renewed_and_not_recovered(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await marked_jobs(world, connection, lease=OVER)

    assert set(await renew(connection, job)) == {job.job.job_id}
    assert await storage.recover_expired(connection, LEASE, JobState.SCHEDULED) == {}


async def test_a_recovery_skips_a_lease_that_is_being_renewed(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await marked_jobs(world, connection, lease=OVER)
    async with world.engine.begin() as renewing:
        await renew(renewing, job)
        assert await storage.recover_expired(connection, LEASE, JobState.SCHEDULED) == {}

    assert (await world.job(job.job.job_id)).state == JobState.SENDING


async def test_a_renewal_leaves_out_a_job_whose_recovery_is_under_way(
    world: World, connection: AsyncConnection
) -> None:
    [job, other] = await marked_jobs(world, connection, 2, lease=OVER)
    async with world.engine.connect() as recovering:
        await storage.recover_expired(recovering, LEASE, JobState.SCHEDULED)
        assert await renew(connection, job, other) == {}
        # After an outage of PostgreSQL a recovery is rolled back to give dispatchers time.
        assert await storage.still_sending(connection, [job.job]) == {job.job.job_id}
        await recovering.rollback()

        assert set(await renew(connection, job)) == {job.job.job_id}
        await storage.recover_expired(recovering, LEASE, JobState.SCHEDULED)
        await recovering.commit()

    assert await renew(connection, other) == {}
    assert await storage.still_sending(connection, [other.job]) == set()


async def test_a_recovered_attempt_starts_no_later_than_its_last_renewal(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await marked_jobs(world, connection)
    end = (await renew(connection, job))[job.job.job_id]
    await world.sql("UPDATE email_jobs SET lease_until = lease_until - interval '2 minutes'")
    await storage.recover_expired(connection, LEASE, JobState.SCHEDULED)

    [attempt] = await world.attempts(job.job.job_id)
    assert attempt.ended_at == (end - timedelta(minutes=2)).timestamp()
    assert attempt.ended_at - attempt.started_at == LEASE.total_seconds()


# Concurrent with a settlement ----------------------------------------------------------------


async def test_a_renewal_waits_neither_for_a_locked_row_nor_for_a_settlement(
    world: World, statements: AsyncEngine
) -> None:
    # A job that has just ended is both in the renewal under way and in the group being recorded.
    async with statements.connect() as renewing, statements.connect() as settling:
        first, second, third = await marked_jobs(world, renewing, 3)
        async with world.engine.begin() as holder:
            await holder.execute(
                text("SELECT 1 FROM email_jobs WHERE id = :id FOR UPDATE"), {"id": first.job.job_id}
            )
            settlement = asyncio.create_task(
                storage.settle(await raw(settling), [sent(second), sent(first)], time.monotonic())
            )
            await waiting_for_locks(world, 1)
            # The settlement may have locked the second row already.
            renewed = set(await renew(renewing, first, second, third))
            assert third.job.job_id in renewed
            assert first.job.job_id not in renewed

        assert len(await settlement) == 2
        assert await renew(renewing, first, second) == {}


async def test_a_renewal_does_not_wait_for_a_give_back_of_the_same_jobs(
    world: World, statements: AsyncEngine
) -> None:
    async with statements.connect() as renewing, statements.connect() as giving:
        first, second = await marked_jobs(world, renewing, 2)
        async with world.engine.begin() as holder:
            await holder.execute(
                text("SELECT 1 FROM email_jobs WHERE id = :id FOR UPDATE"), {"id": first.job.job_id}
            )
            given_back = asyncio.create_task(storage.give_back(giving, [first, second]))
            await waiting_for_locks(world, 1)
            # In the opposite order.
            renewed = set(await renew(renewing, second, first))
            assert first.job.job_id not in renewed

        # The end of the lease is the fencing token of a give-back.
        assert len(await given_back) == 2 - len(renewed)
        assert set(await renew(renewing, first, second)) == renewed
