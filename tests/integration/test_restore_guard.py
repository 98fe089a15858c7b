"""The heartbeat in PostgreSQL and Redis: a restart is not held, and data that stepped back are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
from redis.exceptions import ResponseError

from outbox_server.services.dispatcher.restore_guard import RestoreGuard
from outbox_server.shared.queue.heartbeats import HeartbeatMemory
from outbox_server.shared.states import HoldReason
from tests.dispatchers import options, settings_of
from tests.marked_jobs import mark
from tests.world import World

HOLD_AFTER = timedelta(minutes=5)


@pytest.fixture
async def world(database_url: str, redis_url: str) -> World:
    return World(settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1")))


def guard(world: World, on_step_back: Callable[[], None] = lambda: None) -> RestoreGuard:
    memory_of = partial(HeartbeatMemory, world.redis)
    return RestoreGuard(world.engine, memory_of, HOLD_AFTER, on_step_back=on_step_back)


def reason(guard: RestoreGuard) -> HoldReason | None:
    return None if guard.hold is None else guard.hold.reason


async def age(world: World, by: timedelta, number: int | None = None) -> None:
    """Let the last heartbeat be older, as if it had been written then."""
    await world.sql(
        "UPDATE heartbeat SET beat_at = beat_at - %s, number = coalesce(%s, number),"
        " written_by = mod(txid_current(), 4294967296)",
        by,
        number,
    )


async def test_heartbeats_are_numbered_and_written_by_one_of_all_dispatchers(world: World) -> None:
    async with world:
        one, other = guard(world), guard(world)
        await one.beat()
        await other.beat()
        assert (one.seen, other.seen) == (1, 1)
        await age(world, timedelta(seconds=2))
        await other.beat()
        await one.beat()
        assert (one.seen, other.seen) == (2, 2)


async def test_an_installation_that_was_off_for_long_is_not_held(world: World) -> None:
    async with world:
        await world.schedule(await world.sender())
        await guard(world).beat()
        await age(world, timedelta(days=3))
        await world.redis.flushall()
        restarted = guard(world)
        await restarted.beat()
        assert reason(restarted) is None
        assert restarted.seen == 2


@pytest.mark.parametrize("remembers", ["redis", "the process"])
async def test_data_that_stepped_back_by_much_are_held_and_by_little_are_not(
    world: World, remembers: str
) -> None:
    async with world:
        await world.schedule(await world.sender())
        steps: list[str] = []
        running = guard(world, on_step_back=lambda: steps.append("back"))
        await running.beat()
        for _ in range(2):
            await age(world, timedelta(seconds=2))
            await running.beat()
        assert steps == []
        if remembers == "redis":
            running = guard(world, on_step_back=lambda: steps.append("back"))
        else:
            await world.redis.flushall()
        await age(world, timedelta(minutes=4), number=2)
        await running.beat()
        assert reason(running) is None
        # Numbers never go back, or another process could not tell old data from new.
        assert running.seen == 4
        assert steps == ["back"]
        await age(world, timedelta(minutes=6), number=2)
        await running.beat()
        assert reason(running) is HoldReason.STEPPED_BACK
        assert steps == ["back"], "nothing is sent while it is held"


async def test_nothing_is_marked_in_data_older_than_what_the_process_has_seen(
    world: World,
) -> None:
    async with world:
        jobs = await world.schedule(await world.sender(), 2)
        running = guard(world)
        await running.beat()
        async with world.engine.begin() as connection:
            assert not await mark(connection, jobs[:1], seen=running.seen + 1)
            assert await mark(connection, jobs[:1], seen=running.seen)


async def test_a_row_that_another_transaction_copied_is_held_and_only_with_waiting_mail(
    world: World,
) -> None:
    async with world:
        running = guard(world)
        await running.beat()
        await world.sql("UPDATE heartbeat SET number = number")
        await running.beat()
        assert reason(running) is None, "nothing could be sent again"
        await world.schedule(await world.sender())
        await world.sql("UPDATE heartbeat SET number = number")
        await running.beat()
        assert reason(running) is HoldReason.RESTORED
        # The hold stays, although the heartbeats are its own now.
        restarted = guard(world)
        await restarted.beat()
        assert restarted.hold == running.hold


async def test_a_full_redis_keeps_no_dispatcher_from_starting(world: World) -> None:
    async with world:
        started = asyncio.Event()

        async def work() -> None:
            started.set()

        running = guard(world)
        await world.redis.config_set("maxmemory", "1")
        try:
            with pytest.raises(ResponseError, match="maxmemory"):
                await running.beat()
        finally:
            await world.redis.config_set("maxmemory", "0")
        await running.then(work, asyncio.Event())
        assert started.is_set()
        assert running.seen == 1


async def test_the_heartbeat_knows_the_cluster_and_its_timeline(world: World) -> None:
    async with world:
        await guard(world).beat()
        (row,) = await world.sql(
            "SELECT h.system_identifier = c.system_identifier AS same, timeline, beat_at"
            " FROM heartbeat h, pg_control_system() c"
        )
        assert (row.same, row.timeline) == (True, 1)
