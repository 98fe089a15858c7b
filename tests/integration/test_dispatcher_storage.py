"""Every statement of the dispatcher on a real PostgreSQL, also run concurrently."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import MarkedJob, Unmarked
from outbox_server.shared.database.frequent import driver_of
from outbox_server.shared.mail.content import read_batches, read_batches_by
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.smtp.endpoint import StoredEndpoint
from outbox_server.shared.states import AttemptOutcome, JobState, SenderState, SmtpSecurity
from tests.eventually import eventually
from tests.marked_jobs import (
    LEASE,
    OVER,
    claims_of,
    mark,
    mark_refs,
    raw,
    record_of,
    recover,
    refs,
    settle,
    whole_row,
)
from tests.world import TEST_SHARD, World

# Mark ----------------------------------------------------------------------------------------


async def test_a_marked_job_is_sending_and_is_returned_with_the_data_for_its_mail(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    [job, other] = await world.schedule(sender, 2, load=False)
    await world.sql(
        "UPDATE email_jobs SET variables = '[\"Ann\"]', failures = 2, attempt = 2 WHERE id = %s",
        job,
    )
    before = datetime.now(UTC)
    [marked] = await mark_refs(connection, [JobRef(job, 3)], LEASE)

    row = await world.job(job)
    assert (row.state, row.attempt, row.finished_at) == (JobState.SENDING, 3, None)
    assert before + LEASE <= row.lease_until <= datetime.now(UTC) + LEASE
    assert marked == MarkedJob(
        job=JobRef(job, 3),
        sender_id=sender,
        batch_id=row.batch_id,
        failures=2,
        recipient="r1@y.test",
        variables='["Ann"]',
        lease_until=row.lease_until,
        sender_revision=1,
    )
    assert (await world.job(other)).state == JobState.SCHEDULED
    await world.check_counts()


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE email_jobs SET state = 6, finished_at = now() WHERE id = %s",
        "UPDATE email_jobs SET state = 3, attempt = 1, finished_at = now() WHERE id = %s",
        "UPDATE email_jobs SET state = 2, attempt = 1, lease_until = now() WHERE id = %s",
        "UPDATE email_jobs SET attempt = 1 WHERE id = %s",
        "UPDATE email_jobs SET attempt = 5 WHERE id = %s",
        "DELETE FROM email_jobs WHERE id = %s",
    ],
    ids=["cancelled", "sent", "with another", "a newer attempt", "much newer", "gone"],
)
async def test_a_job_that_changed_after_its_claim_is_not_marked(
    world: World, connection: AsyncConnection, spoil: str
) -> None:
    sender = await world.sender()
    [job, good] = await world.schedule(sender, 2, load=False)
    await world.sql(spoil, job)
    before = await world.sql("SELECT * FROM email_jobs WHERE id = %s", job)

    assert set(await mark(connection, [job, good])) == {good}
    assert await world.sql("SELECT * FROM email_jobs WHERE id = %s", job) == before


@pytest.mark.parametrize(
    "change", [{"state": SenderState.PAUSED}, {"deleted_at": datetime(2026, 1, 1, tzinfo=UTC)}]
)
async def test_jobs_claimed_before_their_sender_was_paused_or_deleted_are_not_sent(
    world: World, connection: AsyncConnection, change: dict[str, Any]
) -> None:
    stopped, other = await world.sender(), await world.sender()
    [job] = await world.schedule(stopped, load=False)
    [good] = await world.schedule(other, load=False)
    await world.change(stopped, load=False, **change)

    assert set(await mark(connection, [job, good])) == {good}
    assert (await world.job(job)).attempt == 0


async def test_a_mark_returns_the_revision_of_its_sender(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    [job] = await world.schedule(sender, load=False)
    await world.change(sender, load=False, hourly_limit=5)

    assert (await mark(connection, [job]))[job].sender_revision == 2


async def why_unmarked(connection: AsyncConnection, claims: Sequence[Claim]) -> Unmarked:
    marking = storage.Marking(claims, LEASE, TEST_SHARD)
    assert await storage.mark_sending(await raw(connection), marking) == []
    return await storage.explain_unmarked(connection, claims, shard=TEST_SHARD)


async def test_a_job_that_is_not_due_by_postgresqls_clock_is_not_marked(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), due=timedelta(hours=2), load=False)
    why = await why_unmarked(connection, await claims_of(connection, refs([job])))

    due = (await world.job(job)).scheduled_at.timestamp()
    assert 0 <= why.due[job] / 1000 - due < 0.001
    assert abs(why.postgres_ms / 1000 + 7200 - due) < 60
    assert (why.valid, why.unknown) == (True, frozenset())


async def test_a_claim_of_a_job_that_redis_should_not_have_is_unknown(
    world: World, connection: AsyncConnection
) -> None:
    """As after a failover of PostgreSQL: no such job, that of another sender, another attempt."""
    sender, other = await world.sender(), await world.sender()
    [anothers] = await world.schedule(other, load=False)
    [newer, locked, cancelled] = await world.schedule(sender, 3, load=False)
    await world.sql("UPDATE email_jobs SET attempt = 3 WHERE id = %s", newer)
    await world.cancel([cancelled])
    jobs = [anothers, newer, locked, cancelled, 99_999_999]
    claims = [replace(c, sender_id=sender) for c in await claims_of(connection, refs(jobs))]

    async with await world.connect() as holder, holder.transaction():
        await holder.execute("SELECT FROM email_jobs WHERE id = %s FOR UPDATE", [locked])
        why = await why_unmarked(connection, claims)
    assert why.unknown == {anothers, newer, 99_999_999}
    assert list(why.due) == [locked]
    assert await world.in_state(JobState.SENDING) == set()


async def test_a_claim_of_a_life_that_is_not_valid_still_waits(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    claims = [replace(c, life="old") for c in await claims_of(connection, refs([job]))]
    why = await why_unmarked(connection, claims)
    assert (why.valid, list(why.due), why.unknown) == (False, [job], frozenset())


async def test_nothing_is_marked_twice(world: World, connection: AsyncConnection) -> None:
    jobs = await world.schedule(await world.sender(), 3, load=False)

    assert set(await mark(connection, jobs)) == set(jobs)
    assert await mark(connection, jobs) == {}
    assert await mark(connection, jobs, attempt=2) == {}


# Two dispatchers at once ---------------------------------------------------------------------


async def blocked(world: World) -> bool:
    """Return whether any session waits for a lock in PostgreSQL."""
    rows = await world.sql(
        "SELECT count(*) AS n FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(rows[0].n)


async def test_two_dispatchers_that_mark_overlapping_groups_each_get_only_their_own_jobs(
    world: World, statements: AsyncEngine
) -> None:
    jobs = await world.schedule(await world.sender(), 6, load=False)
    async with world.engine.begin() as first, statements.connect() as second:
        ours = await mark(first, jobs[:4])
        # It does not wait for those that the first one has locked.
        theirs = await mark(second, jobs[2:])
        await first.commit()

    assert set(ours) == set(jobs[:4])
    assert set(theirs) == set(jobs[4:])
    await world.check_counts()


async def test_a_cancel_that_commits_after_a_mark_has_skipped_its_jobs_wins(
    world: World, statements: AsyncEngine
) -> None:
    jobs = await world.schedule(await world.sender(), 3, load=False)
    async with await world.connect() as caller, statements.connect() as dispatcher:
        async with caller.transaction():
            assert await world.cancel(jobs[:2], caller) == 2
            marked = await mark(dispatcher, jobs)
        assert await mark(dispatcher, jobs[:2]) == {}

    assert set(marked) == {jobs[2]}
    assert await world.in_state(JobState.CANCELLED) == set(jobs[:2])
    await world.check_counts()


async def test_a_cancel_that_rolls_back_after_a_mark_has_skipped_its_jobs_changes_nothing(
    world: World, statements: AsyncEngine
) -> None:
    jobs = await world.schedule(await world.sender(), 2, load=False)
    async with await world.connect() as caller, statements.connect() as dispatcher:
        async with caller.transaction(force_rollback=True):
            await world.cancel(jobs, caller)
            assert await mark(dispatcher, jobs) == {}
        assert set(await mark(dispatcher, jobs)) == set(jobs)


async def test_two_settlements_of_overlapping_groups_settle_each_job_once(
    world: World, statements: AsyncEngine
) -> None:
    jobs = await world.schedule(await world.sender(), 6, load=False)
    async with statements.connect() as connection:
        marked = await mark(connection, jobs)
    records = [record_of(marked[job]) for job in jobs]
    async with world.engine.begin() as first, statements.connect() as second:
        ours = await settle(first, records[:4])
        settling = asyncio.create_task(settle(second, records[2:]))
        await eventually(lambda: blocked(world))
        await first.commit()
        theirs = await settling

    assert set(ours) == set(jobs[:4])
    assert set(theirs) == set(jobs[4:])
    assert all([len(await world.attempts(job)) == 1 for job in jobs])
    await world.check_counts()


# Settle --------------------------------------------------------------------------------------


async def test_a_settlement_records_job_attempt_and_counts(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    marked = (await mark(connection, [job]))[job]
    before = time.time()
    moved = await settle(connection, [record_of(marked)])

    row = await world.job(job)
    [attempt] = await world.attempts(job)
    assert set(moved) == {job}
    assert (row.state, row.attempt, row.lease_until) == (JobState.SENT, 1, None)
    assert row.finished_at.timestamp() == attempt.ended_at
    # It ended 0.1 s before it was recorded, and began 0.1 s before that.
    assert before - 0.11 <= attempt.ended_at <= time.time() - 0.09
    assert attempt.ended_at - attempt.started_at == pytest.approx(0.1, abs=0.003)
    assert (attempt.outcome, attempt.counted) == (AttemptOutcome.SENT, True)
    assert (attempt.smtp_code, attempt.enhanced_code) == (250, "2.0.0")
    await world.check_counts()


@pytest.mark.parametrize("state", [JobState.SENT, JobState.FAILED, JobState.UNCERTAIN])
async def test_every_final_state_is_counted(
    world: World, connection: AsyncConnection, state: JobState
) -> None:
    senders = [await world.sender(), await world.sender()]
    jobs = [job for each in senders for job in await world.schedule(each, 3, load=False)]
    marked = await mark(connection, jobs)
    await settle(connection, [record_of(marked[job], state) for job in jobs[1:]])

    assert await world.states() == {state: 5, JobState.SENDING: 1}
    await world.check_counts()


async def test_the_wait_for_a_retry_starts_at_the_end_of_the_attempt(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    marked = (await mark(connection, [job]))[job]
    record = record_of(
        marked,
        JobState.SCHEDULED,
        failures=1,
        outcome=AttemptOutcome.TEMPORARY_FAILURE,
        retry_after=timedelta(seconds=5),
        counted=False,
        smtp_code=450,
        enhanced_code=None,
        message=None,
    )
    dues = await settle(connection, [record])

    row = await world.job(job)
    [attempt] = await world.attempts(job)
    assert (row.state, row.attempt, row.failures) == (JobState.SCHEDULED, 1, 1)
    assert (row.lease_until, row.finished_at) == (None, None)
    assert row.scheduled_at.timestamp() == pytest.approx(attempt.ended_at + 5, abs=0.001)
    # The time that is written to Redis is never earlier.
    assert 0 <= dues[job] / 1000 - row.scheduled_at.timestamp() < 0.001
    assert attempt.outcome is AttemptOutcome.TEMPORARY_FAILURE
    await world.check_counts()


async def test_settling_again_changes_nothing(world: World, connection: AsyncConnection) -> None:
    """A settlement whose answer was lost is repeated."""
    [job] = await world.schedule(await world.sender(), load=False)
    record = record_of((await mark(connection, [job]))[job])
    await settle(connection, [record])
    before = await whole_row(world, job)

    assert await settle(connection, [record]) == {}
    assert await whole_row(world, job) == before
    await world.check_counts()


async def test_a_job_that_was_cancelled_meanwhile_stays_cancelled(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    marked = (await mark(connection, [job]))[job]
    await storage.give_back(connection, [marked])
    await world.cancel([job])
    before = await whole_row(world, job)

    assert await settle(connection, [record_of(marked)]) == {}
    assert await storage.give_back(connection, [marked]) == {}
    assert await whole_row(world, job) == before


# Fencing -------------------------------------------------------------------------------------


async def test_a_dispatcher_that_lost_its_lease_cannot_overwrite_a_newer_attempt(
    world: World, connection: AsyncConnection
) -> None:
    jobs = await world.schedule(await world.sender(), 4, load=False)
    old = await mark(connection, jobs, lease=OVER)
    await recover(world)
    new = await mark(connection, jobs[:3], attempt=2)
    await settle(connection, [record_of(new[jobs[0]])])
    await storage.give_back(connection, [new[jobs[1]]])
    # Sent, given back or held by the newer attempt, or waiting: none belongs to the older one.
    before = [await whole_row(world, job) for job in jobs]

    failed = [record_of(old[job], JobState.FAILED) for job in jobs]
    retried = [record_of(old[job], JobState.SCHEDULED, retry_after=timedelta(0)) for job in jobs]
    assert await settle(connection, failed) == {}
    assert await settle(connection, retried) == {}
    assert await storage.give_back(connection, list(old.values())) == {}
    assert [await whole_row(world, job) for job in jobs] == before
    await world.check_counts()


async def test_a_job_given_back_keeps_its_place_and_uses_no_attempt(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    before = await whole_row(world, job)
    marked = (await mark(connection, [job]))[job]

    dues = await storage.give_back(connection, [marked])

    assert await whole_row(world, job) == before
    assert set(dues) == {job}
    assert set(await mark(connection, [job])) == {job}
    await world.check_counts()


async def test_a_job_is_given_back_only_by_the_lease_that_holds_it(
    world: World, connection: AsyncConnection
) -> None:
    """A job that was given back reuses its attempt number, so it is no fencing token here."""
    [job] = await world.schedule(await world.sender(), load=False)
    first = (await mark(connection, [job]))[job]
    await storage.give_back(connection, [first])
    second = (await mark(connection, [job]))[job]
    assert first.job == second.job
    before = await whole_row(world, job)

    assert await storage.give_back(connection, [first]) == {}
    assert await whole_row(world, job) == before
    assert set(await storage.give_back(connection, [second])) == {job}


# Batches -------------------------------------------------------------------------------------


async def test_a_batch_is_read_with_the_current_state_of_its_sender(
    world: World, connection: AsyncConnection
) -> None:
    plain = await world.sender()
    own = await world.sender(
        smtp_host="own.test",
        smtp_port=2525,
        smtp_security=SmtpSecurity.TLS,
        smtp_username="anna",
        smtp_password=b"token",
    )
    batches = [
        (await world.job((await world.schedule(each, load=False))[0])).batch_id
        for each in (plain, own)
    ]
    await world.change(own, load=False, display_name="Anna")

    found = await read_batches(connection, [*batches, 999_999_999])

    assert set(found) == set(batches)
    driver = await driver_of(connection)
    assert await read_batches_by(driver, [*batches, 999_999_999]) == found
    first, second = (found[batch] for batch in batches)
    assert (first.email, first.sender_revision) == (f"s{plain}@x.test", 1)
    assert first.endpoint == StoredEndpoint(first.user_id)
    assert second.endpoint == StoredEndpoint(
        second.user_id, "own.test", 2525, SmtpSecurity.TLS, "anna", b"token"
    )
    assert (second.display_name, second.sender_revision) == ("Anna", 2)


async def test_the_batches_of_upcoming_jobs_are_found_unless_they_are_cancelled_or_long(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    jobs = [(await world.schedule(sender, 2, load=False))[0] for _ in range(3)]
    batches = [(await world.job(job)).batch_id for job in jobs]
    await world.sql(f"UPDATE batches SET state = 2 WHERE id = {batches[1]}")
    await world.sql(f"UPDATE batches SET html = repeat('x', 70000) WHERE id = {batches[2]}")
    found = await storage.find_upcoming_batches(
        await driver_of(connection), [*jobs, jobs[0] + 1, 999_999_999]
    )

    assert set(found) == {batches[0]}


async def test_many_jobs_are_handled_in_one_statement(
    world: World, connection: AsyncConnection
) -> None:
    jobs = await world.schedule(await world.sender(), 1_000, load=False)
    marked = await mark(connection, jobs)
    moved = await settle(connection, [record_of(marked[job]) for job in jobs])

    assert set(moved) == set(jobs)
    # One count falls and one rises, although a thousand jobs moved (two more if an hour ended
    # then).
    deltas = await world.sql("SELECT count(*) AS n FROM count_deltas WHERE n <> 1000 OR state <> 1")
    assert deltas[0].n in (2, 4)
    await world.check_counts()
