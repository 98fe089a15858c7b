"""The fence between lives of Redis: which one is valid, and what a mark in progress means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher.storage import Marking, mark_sending
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.heads import lives as lives_module
from outbox_server.shared.heads.lives import Lives, SupersededLifeError
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.states import JobState
from tests.dispatchers import options, settings_of
from tests.eventually import eventually
from tests.marked_jobs import raw
from tests.world import TEST_SHARD, World

LEASE = timedelta(minutes=1)


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    settings = settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1"))
    async with World(settings) as world:
        assert await world.loader.rebuild(world.queues[0])
        yield world


@pytest_asyncio.fixture
async def engine(world: World) -> AsyncIterator[AsyncEngine]:
    """Transactions that wait for a lock as long as it takes."""
    engine = create_engine(world.settings, lookups_only=True)
    yield engine
    await engine.dispose()


async def valid_life(world: World) -> str:
    rows = await world.sql("SELECT life FROM shard_lives WHERE shard = 0")
    return str(rows[0].life)


async def supersede(world: World) -> None:
    """Let another server of Redis become the valid one, as its dispatcher does."""
    await world.sql("UPDATE shard_lives SET life = 'another server' WHERE shard = 0")


async def claim_of(world: World) -> Claim:
    await world.schedule(await world.sender())
    [claim] = (await world.queues[0].claim(1)).claims
    return claim


async def waiting_for_locks(world: World) -> bool:
    rows = await world.sql(
        "SELECT count(*) AS n FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(rows[0].n)


async def flush(world: World) -> None:
    await world.redis.flushall()


# Which life is valid -------------------------------------------------------------------------


async def test_a_rebuild_makes_its_life_the_valid_one(world: World) -> None:
    first = await valid_life(world)
    assert world.queues[0].life == first
    assert not (await world.queues[0].claim(1)).provisional
    await flush(world)
    assert (await world.queues[0].claim(1)).provisional

    assert await world.loader.rebuild(world.queues[0])
    second = await valid_life(world)
    assert first != second
    claimed = await world.queues[0].claim(1)
    assert (world.queues[0].life, claimed.lost, claimed.provisional) == (second, False, False)


async def test_a_life_stays_valid_while_nothing_is_lost(world: World) -> None:
    life = await valid_life(world)
    assert await world.loader.lives.confirm(world.queues[0])
    assert await world.loader.rebuild(world.queues[0])
    assert await valid_life(world) == life


async def test_what_was_loaded_before_a_life_was_valid_is_loaded_again(world: World) -> None:
    """It may lack what the former life sent until then."""
    sender = await world.sender()
    await world.schedule(sender, 1)
    await flush(world)
    await world.loader.load([sender], committed=False)
    token = await world.queues[0].begin_rebuild()
    assert token is not None
    late = await world.queues[0].begin_load([sender], committed=True)
    assert await world.loader.lives.begin(world.queues[0], token)

    assert await world.queues[0].find_lost([sender]) == [sender]
    assert (await world.queues[0].claim(1)).claims == ()
    assert late != await world.queues[0].begin_load([sender], committed=False)


async def test_one_of_two_dispatchers_begins_the_next_life(world: World) -> None:
    await flush(world)
    other = HeadLoader(world.engine, world.queues, world.settings)
    results = await asyncio.gather(*(x.rebuild(world.queues[0]) for x in (world.loader, other)))
    assert sorted(results) == [False, True]
    assert world.queues[0].life == await valid_life(world)


async def test_a_life_is_not_begun_after_redis_was_lost_again(world: World) -> None:
    await flush(world)
    queue = world.queues[0]
    token = await queue.begin_rebuild()
    assert token is not None
    await flush(world)
    assert not await world.loader.lives.begin(queue, token)
    assert await queue.read_life()
    assert queue.life != await valid_life(world)
    assert await world.loader.rebuild(queue)
    assert queue.life == await valid_life(world)


async def test_a_superseded_server_waits_until_the_valid_one_is_out_of_use(world: World) -> None:
    queue, lives = world.queues[0], world.loader.lives
    old = queue.life
    await supersede(world)

    assert not await lives.confirm(queue)
    assert not await world.loader.rebuild(queue)
    assert lives.is_superseded(queue)
    with pytest.raises(SupersededLifeError, match="shard 0"):
        lives.check()
    assert await valid_life(world) == "another server"
    await world.sql("UPDATE shard_lives SET seen_at = now() - interval '21 s' WHERE shard = 0")

    assert await world.loader.rebuild(queue)
    assert not lives.is_superseded(queue)
    lives.check()
    assert queue.life == await valid_life(world)
    assert queue.life != old, "its data is not used again"


async def test_a_dispatcher_that_sees_the_valid_life_keeps_others_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives_module, "_SEEN_PAUSE", timedelta(0))
    old = "SELECT seen_at AS old FROM shard_lives WHERE shard = 0"
    await world.sql("UPDATE shard_lives SET seen_at = now() - interval '1 h' WHERE shard = 0")
    before = (await world.sql(old))[0].old
    assert await world.loader.lives.confirm(world.queues[0])
    assert (await world.sql(old))[0].old - before > timedelta(minutes=59)


async def test_no_life_becomes_valid_twice_even_if_postgresql_steps_back(world: World) -> None:
    queue = world.queues[0]
    old = queue.life
    await flush(world)
    assert await world.loader.rebuild(queue)
    newer = queue.life
    # A replica of PostgreSQL took over that lacks the last commits.
    await world.sql(
        "UPDATE shard_lives SET life = %s, seen_at = now() - interval '1 h' WHERE shard = 0", old
    )
    assert await world.loader.rebuild(queue)
    assert queue.life not in (old, newer)


async def test_lives_without_a_row_begin_at_once(world: World) -> None:
    await world.sql("DELETE FROM shard_lives WHERE shard = 0")
    assert await world.loader.rebuild(world.queues[0])
    assert world.queues[0].life == await valid_life(world)


# Marks ---------------------------------------------------------------------------------------


async def test_a_claim_of_a_superseded_life_is_not_marked(
    world: World, statements: AsyncEngine
) -> None:
    claim = await claim_of(world)
    await supersede(world)
    async with statements.connect() as connection:
        assert await mark_sending(await raw(connection), Marking([claim], LEASE, 0)) == []
    assert await world.in_state(JobState.SCHEDULED) == {claim.job.job_id}


async def test_the_life_of_another_shard_is_not_enough(
    world: World, statements: AsyncEngine
) -> None:
    claim = await claim_of(world)
    async with statements.connect() as connection:
        assert await mark_sending(await raw(connection), Marking([claim], LEASE, TEST_SHARD)) == []
        assert len(await mark_sending(await raw(connection), Marking([claim], LEASE, 0))) == 1


async def test_the_next_life_waits_for_a_mark_in_progress_and_counts_it(
    world: World, engine: AsyncEngine
) -> None:
    claim = await claim_of(world)
    queue = world.queues[0]
    async with engine.begin() as connection:
        assert len(await mark_sending(await raw(connection), Marking([claim], LEASE, 0))) == 1
        await flush(world)
        rebuild = asyncio.create_task(world.loader.rebuild(queue))
        await eventually(partial(waiting_for_locks, world))
        assert await valid_life(world) == claim.life
    assert await rebuild
    assert await world.leases_in_redis(claim.sender_id) == 1


async def test_a_mark_that_begins_while_the_life_changes_marks_nothing(
    world: World, statements: AsyncEngine
) -> None:
    claim = await claim_of(world)

    async def mark() -> int:
        async with statements.connect() as connection:
            return len(await mark_sending(await raw(connection), Marking([claim], LEASE, 0)))

    async with await world.connect() as holder, holder.transaction():
        await holder.execute("UPDATE shard_lives SET life = 'another server' WHERE shard = 0")
        marking = asyncio.create_task(mark())
        await eventually(partial(waiting_for_locks, world))
    assert await marking == 0


async def test_a_mark_in_progress_delays_no_other_mark_and_no_check_of_the_life(
    world: World, engine: AsyncEngine, statements: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives_module, "_SEEN_PAUSE", timedelta(0))
    first, second = await claim_of(world), await claim_of(world)
    async with engine.begin() as connection, statements.connect() as other:
        assert len(await mark_sending(await raw(connection), Marking([first], LEASE, 0))) == 1
        assert await Lives(engine).confirm(world.queues[0])
        assert len(await mark_sending(await raw(other), Marking([second], LEASE, 0))) == 1


# Markers -------------------------------------------------------------------------------------


async def test_a_load_into_a_superseded_server_leaves_the_marker_for_the_valid_one(
    world: World,
) -> None:
    sender = await world.sender()
    await supersede(world)
    await world.schedule(sender)
    assert len(await world.sql("SELECT id FROM head_markers")) == 1

    await world.sql("UPDATE shard_lives SET life = %s WHERE shard = 0", world.queues[0].life)
    await world.loader.load([sender], committed=False)
    assert await world.sql("SELECT id FROM head_markers") == []


# The first waiting job -----------------------------------------------------------------------


async def waiting_in(queue: Queue, world: World, sender: int) -> list[str]:
    key = queue.keys.ready.replace("ready", f"due:{sender}")
    return [str(member) for member in await world.redis.zrange(key, 0, -1)]


async def test_a_sender_whose_first_job_redis_does_not_know_is_loaded_again(world: World) -> None:
    queue = world.queues[0]
    sender = await world.sender()
    await world.schedule(sender, due=timedelta(hours=1))
    # As after a failover of PostgreSQL: Redis has this sender, without its overdue job.
    [overdue] = await world.schedule(sender, due=timedelta(hours=-1), load=False)
    assert len(await waiting_in(queue, world, sender)) == 1

    assert await world.loader.rebuild(queue)
    assert (await waiting_in(queue, world, sender))[0].startswith(f"{overdue:012d}:1")


async def test_a_sender_whose_first_job_is_due_earlier_than_redis_knows_is_loaded_again(
    world: World,
) -> None:
    queue = world.queues[0]
    sender = await world.sender()
    await world.schedule(sender, due=timedelta(hours=1))
    await world.sql("UPDATE email_jobs SET scheduled_at = now() WHERE sender_id = %s", sender)
    assert (await queue.claim(1)).claims == ()

    assert await world.loader.rebuild(queue)
    assert len((await queue.claim(1)).claims) == 1


async def test_a_sender_whose_first_job_is_being_sent_is_not_outdated(world: World) -> None:
    queue = world.queues[0]
    sender = await world.sender()
    job, other = await world.schedule(sender, 2)
    due = 0
    assert await queue.find_outdated([(sender, JobRef(job, 1), due)]) == [sender], "much later"
    due = 4_000_000_000_000
    assert await queue.find_outdated([(sender, JobRef(job, 1), due)]) == []
    [claim] = (await queue.claim(1)).claims
    assert claim.job == JobRef(job, 1)
    assert await queue.find_outdated([(sender, JobRef(job, 1), due)]) == []
    assert await queue.find_outdated([(sender, JobRef(other, 1), due)]) == []
    assert await queue.find_outdated([(sender, JobRef(other, 2), due)]) == [sender]
