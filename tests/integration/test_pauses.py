"""A pause is one change of one row, and marks obey it from its commit on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.scheduler.storage.batch_changes import (
    forget_ended_pauses,
    lock_batch,
    pause_batch,
    resume_batch,
)
from outbox_server.shared.queue.keys import JobRef
from tests.eventually import eventually
from tests.marked_jobs import claims_of, mark
from tests.world import TEST_SHARD, World


@pytest_asyncio.fixture
async def connection(world: World) -> AsyncIterator[AsyncConnection]:
    async with world.engine.connect() as connection:
        yield connection


async def pause(engine: AsyncEngine, batch_id: int, until: datetime | None = None) -> None:
    async with engine.begin() as connection:
        batch = await lock_batch(connection, batch_id, None)
        assert batch is not None
        await pause_batch(connection, batch, until)


async def resume(engine: AsyncEngine, batch_id: int) -> None:
    async with engine.begin() as connection:
        batch = await lock_batch(connection, batch_id, None)
        assert batch is not None
        await resume_batch(connection, batch)


async def due_of(connection: AsyncConnection, job: int) -> int | None:
    """Return when a job that was not marked may be claimed again (Unix ms)."""
    claims = await claims_of(connection, [JobRef(job, 1)])
    why = await storage.explain_unmarked(connection, claims, shard=TEST_SHARD)
    return why.due.get(job)


async def test_a_job_that_was_claimed_before_its_batch_was_paused_is_not_marked(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    [job] = await world.schedule(sender, load=False)
    [good] = await world.schedule(sender, load=False)
    batch = (await world.job(job)).batch_id
    await pause(world.engine, batch)
    assert set(await mark(connection, [job, good])) == {good}
    await connection.commit()
    # It is not looked at again: a resume loads the head.
    assert await due_of(connection, job) is None

    end = datetime.now(UTC) + timedelta(hours=1)
    await pause(world.engine, batch, end)
    assert await mark(connection, [job]) == {}
    assert await due_of(connection, job) == -int(-end.timestamp() * 1000 // 1)
    await connection.rollback()
    await resume(world.engine, batch)
    assert (await mark(connection, [job]))[job].batch_revision > 1


async def test_a_pause_waits_for_a_mark_under_way_and_a_mark_never_waits_for_a_pause(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    first, second = await world.schedule(sender, 2, load=False)
    batch = (await world.job(first)).batch_id
    assert set(await mark(connection, [first])) == {first}
    pausing = asyncio.create_task(pause(world.engine, batch))

    async def blocked() -> bool:
        rows = await world.sql("SELECT 1 FROM pg_locks WHERE NOT granted")
        return bool(rows)

    await eventually(blocked)
    assert not pausing.done()
    await connection.commit()
    await pausing
    assert await mark(connection, [second]) == {}
    await connection.rollback()
    async with world.engine.begin() as holding:
        assert await lock_batch(holding, batch, None) is not None
        async with asyncio.timeout(20):
            assert await mark(connection, [second]) == {}
        await connection.rollback()


async def test_a_pause_that_has_ended_is_forgotten_and_others_are_kept(world: World) -> None:
    sender = await world.sender()
    batches = []
    for _ in range(3):
        [job] = await world.schedule(sender, load=False)
        batches.append((await world.job(job)).batch_id)
    ended, lasting, endless = batches
    await pause(world.engine, ended, datetime.now(UTC) + timedelta(milliseconds=1))
    await pause(world.engine, lasting, datetime.now(UTC) + timedelta(hours=1))
    await pause(world.engine, endless)

    async def forgotten() -> bool:
        async with world.engine.begin() as connection:
            return await forget_ended_pauses(connection, 10) == 1

    await eventually(forgotten)
    rows = await world.sql("SELECT id FROM batches WHERE paused_at IS NOT NULL ORDER BY id")
    assert [row[0] for row in rows] == [lasting, endless]


@pytest.mark.parametrize("count", [300])
async def test_a_head_has_the_jobs_behind_those_of_a_paused_batch(world: World, count: int) -> None:
    sender = await world.sender()
    paused = await world.schedule(sender, count, load=False)
    others = await world.schedule(sender, 3, load=False)
    await pause(world.engine, (await world.job(paused[0])).batch_id)
    await world.loader.load([sender], committed=True)
    claimed = await world.loader.queues[0].claim(10)
    assert [claim.job.job_id for claim in claimed.claims] == others
