"""New jobs of small batches: they join the heads in Redis, and their markers are deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
import pytest_asyncio

from outbox_server.deploy.ports import free_port
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.heads.coalescing import ShardLoads
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.keys import JobRef, job_of
from outbox_server.shared.queue.records import NewJobs
from outbox_server.shared.settings import Settings, load_settings
from tests.eventually import eventually
from tests.integration.queue.shard import scores
from tests.world import World

SOON = timedelta(hours=1)


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return load_settings(
        database_url=database_url, redis_url=redis_url, min_gap=timedelta(0), auth="off"
    )


@pytest_asyncio.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    async with World(settings) as world:
        assert await world.loader.rebuild(world.queues[0])
        yield world


@asynccontextmanager
async def loads_by(loader: HeadLoader, settings: Settings) -> AsyncIterator[ShardLoads]:
    statements = create_engine(settings, lookups_only=True, single_statements=True)
    loads = ShardLoads(loader, statements)
    try:
        yield loads
    finally:
        await loads.close()
        await statements.dispose()


async def commit(world: World, sender: int, n: int = 1) -> tuple[list[int], NewJobs]:
    """Commit a batch as the scheduler does, and return its jobs."""
    await world.schedule(sender, n, due=SOON, load=False)
    rows = await world.sql(
        "SELECT id, ceil(extract(epoch FROM scheduled_at) * 1000)::bigint AS due FROM email_jobs"
        " WHERE batch_id = (SELECT max(id) FROM batches) ORDER BY id"
    )
    (marker,) = await world.sql("SELECT max(id) AS id FROM head_markers")
    jobs = [(JobRef(row.id, 1), row.due) for row in rows]
    return [row.id for row in rows], NewJobs(jobs, marker.id)


async def waiting(world: World, loader: HeadLoader, sender: int) -> list[int]:
    key = loader.queue_of(sender).keys.ready.replace("ready", f"due:{sender}")
    return [job_of(member).job_id for member in await scores(world.redis, key)]


async def count_markers(world: World) -> int:
    (row,) = await world.sql("SELECT count(*) AS n FROM head_markers")
    return int(row.n)


async def test_new_jobs_join_known_heads_and_other_senders_are_loaded(
    world: World, settings: Settings
) -> None:
    known, unknown = await world.sender(), await world.sender()
    jobs = {known: await world.schedule(known, 2, due=SOON), unknown: []}
    async with loads_by(world.loader, settings) as loads:
        futures = []
        for sender in (known, unknown, known):
            ids, new = await commit(world, sender, 2)
            jobs[sender] += ids
            futures.append(loads.add(sender, new))
        assert await asyncio.gather(*futures) == [True] * 3
        for sender, ids in jobs.items():
            assert await waiting(world, world.loader, sender) == ids

        async def no_marker_is_left() -> bool:
            return await count_markers(world) == 0

        await eventually(no_marker_is_left)


async def test_a_marker_of_another_commit_survives_the_addition(
    world: World, settings: Settings
) -> None:
    sender = await world.sender()
    await world.schedule(sender, due=SOON)
    # A scheduler that dies before it loads the head.
    await commit(world, sender)
    _, new = await commit(world, sender)
    async with loads_by(world.loader, settings) as loads:
        assert await loads.add(sender, new)
    (left,) = await world.sql("SELECT id FROM head_markers")
    assert left.id < new.marker_id
    await world.sql("UPDATE head_markers SET created_at = now() - interval '1 minute'")
    assert await world.loader.load_abandoned() == [sender]
    assert len(await waiting(world, world.loader, sender)) == 3


async def test_without_redis_the_marker_stays(world: World, settings: Settings) -> None:
    sender = await world.sender()
    _, new = await commit(world, sender)
    nowhere = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    async with connect(nowhere) as redis:
        loader = HeadLoader(world.engine, open_queues(redis, nowhere), nowhere)
        async with loads_by(loader, settings) as loads:
            assert not await loads.add(sender, new)
    assert await count_markers(world) == 1


async def test_with_several_shards_each_sender_is_loaded_into_its_own(
    world: World, settings: Settings
) -> None:
    loader = HeadLoader(
        world.engine, open_queues(world.redis, settings.model_copy(update={"shards": 3})), settings
    )
    async with loads_by(loader, settings) as loads:
        for sender in [await world.sender() for _ in range(3)]:
            ids, new = await commit(world, sender)
            assert await loads.add(sender, new)
            assert await waiting(world, loader, sender) == ids
    assert await count_markers(world) == 0
