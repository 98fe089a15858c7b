"""The last checks of a job when it is marked: suppressions and its expiry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest_asyncio

from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.sending_hours import SendingHours
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import JobState
from tests.marked_jobs import mark_refs
from tests.world import World

LEASE = timedelta(seconds=60)


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    settings = load_settings(database_url=database_url, redis_url=redis_url, min_gap="0")
    async with World(settings) as world:
        yield world
        await world.check_counts()


async def mark(world: World, jobs: list[int]) -> list[MarkedJob]:
    # As in the dispatcher: one statement without an explicit transaction.
    engine = create_engine(world.settings, lookups_only=True, single_statements=True)
    try:
        async with engine.connect() as connection:
            return await mark_refs(connection, [JobRef(job, 1) for job in jobs], LEASE)
    finally:
        await engine.dispose()


async def suppress(world: World, address: str, user: str = "anna") -> None:
    """Suppress an address without changing the jobs that wait."""
    await world.sql("INSERT INTO suppressions (user_id, address) VALUES (%s, %s)", user, address)


async def test_a_job_to_a_suppressed_address_ends_at_its_claim(world: World) -> None:
    jobs = await world.schedule(await world.sender(), 4)
    await world.sql("UPDATE email_jobs SET recipient = 'R2@y.test' WHERE id = %s", jobs[1])
    await suppress(world, "r1@y.test")
    await suppress(world, "r2@y.test")
    await suppress(world, "r3@y.test", user="bob")
    assert {job.job.job_id for job in await mark(world, jobs)} == {*jobs[2:]}
    assert await world.in_state(JobState.SUPPRESSED) == set(jobs[:2])
    row = await world.job(jobs[0])
    assert (row.attempt, row.lease_until) == (0, None)
    assert row.finished_at is not None


async def test_a_job_past_its_expiry_expires_at_its_claim(world: World) -> None:
    jobs = await world.schedule(await world.sender(), 3)
    for job, left in zip(jobs, ("-1 ms", "1 hour"), strict=False):
        await world.sql(
            "UPDATE email_jobs SET expires_at = now() + %s::interval WHERE id = %s", left, job
        )
    assert {job.job.job_id for job in await mark(world, jobs)} == {*jobs[1:]}
    assert await world.in_state(JobState.EXPIRED) == {jobs[0]}
    # The job no longer waits: a second claim does not find it.
    assert await mark(world, jobs[:1]) == []


async def test_only_waiting_jobs_are_checked(world: World) -> None:
    (job,) = await world.schedule(await world.sender(), 1)
    assert len(await mark(world, [job])) == 1
    await suppress(world, "r1@y.test")
    assert await mark(world, [job]) == []
    async with world.engine.begin() as connection:
        assert await mark_refs(connection, [JobRef(job, 2)], LEASE) == []
    assert await world.in_state(JobState.SENDING) == {job}
    paused = await world.sender()
    (other,) = await world.schedule(paused, 1)
    await world.change(paused, state=2)
    assert await mark(world, [other]) == []
    assert await world.in_state(JobState.SCHEDULED) == {other}


async def test_a_sender_outside_its_hours_is_checked_when_they_begin(world: World) -> None:
    now = datetime.now(UTC)
    begins = (now.hour + 12) % 24
    hours = SendingHours(frozenset(), begins * 60, begins * 60 + 30, "UTC")
    sender = await world.sender(sending_hours=hours.to_text())
    (queue,) = world.queues
    assert await world.loader.rebuild(queue)
    await world.schedule(sender, 3)
    assert (await queue.claim(10)).claims == ()
    look = await world.redis.zscore(queue.keys.ready, str(sender))
    opens = datetime.fromtimestamp(float(look or 0) / 1000, UTC)
    assert (opens.hour, opens.minute, opens.second) == (begins, 0, 0)
    assert timedelta(hours=10) < opens - now < timedelta(hours=13)
    await world.change(sender, sending_hours=None)
    assert len((await queue.claim(10)).claims) == 3
