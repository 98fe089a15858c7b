"""The patrol: it goes through all senders at a fixed cost, and restores what claims cannot miss."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

import pytest
import pytest_asyncio

from outbox_server.deploy.ports import free_port
from outbox_server.shared.heads import patrol as patrol_module
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import QUEUE_ERRORS, connect, open_queues
from outbox_server.shared.settings import Settings
from tests.dispatchers import options, settings_of
from tests.integration.queue.shard import scores
from tests.world import World

LONG = timedelta(hours=1)
NONE = timedelta(0)
PART = 2
READY = "outbox:{0}:ready"


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1"))


@pytest_asyncio.fixture
async def world(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A complete shard. A part of a patrol has two senders, and may lose one without hurry."""
    monkeypatch.setattr(patrol_module, "PART", PART)
    monkeypatch.setattr(patrol_module, "_MANY", 0.5)
    async with World(settings) as world:
        assert await world.loader.rebuild(world.queues[0])
        yield world


async def waiting_senders(world: World, n: int) -> list[int]:
    senders = [await world.sender() for _ in range(n)]
    for sender in senders:
        await world.schedule(sender, due=LONG)
    return senders


async def in_ready(world: World) -> set[int]:
    return {int(sender) for sender in await scores(world.redis, READY)}


async def commands(world: World) -> int:
    """Return the number of commands that Redis has run, those of scripts included."""
    found = await world.redis.info("commandstats")
    return sum(int(command["calls"]) for command in found.values())


async def test_each_step_examines_one_part_and_a_round_restores_every_lost_entry(
    world: World,
) -> None:
    senders = await waiting_senders(world, 5)
    await world.redis.zrem(READY, senders[0], senders[3])
    seen = []
    for _ in range(3):
        assert await world.loader.patrol(NONE) == NONE
        seen.append(await in_ready(world))

    assert seen == [set(senders) - {senders[3]}, set(senders), set(senders)]

    await world.redis.zrem(READY, senders[1])
    await world.loader.patrol(NONE)
    assert await in_ready(world) == set(senders), "the next round begins with the first sender"


async def test_a_hurried_patrol_ends_the_round_and_goes_through_a_whole_one(world: World) -> None:
    senders = await waiting_senders(world, 5)
    await world.loader.patrol(NONE)
    # One entry a part, which alone causes no hurry: before and behind the present place.
    await world.redis.zrem(READY, senders[0], senders[3])
    world.loader.hurry_patrol()
    pauses = 0
    while await world.loader.patrol(LONG) == NONE:
        pauses += 1
    assert await in_ready(world) == set(senders)
    # Two parts to the end of this round, and three of the next one, the last of which pauses.
    assert pauses == 4


async def test_a_sender_of_which_everything_is_lost_is_loaded(world: World) -> None:
    (sender,) = await waiting_senders(world, 1)
    await world.redis.zrem(READY, sender)
    await world.redis.delete(*(f"outbox:{{0}}:{kind}:{sender}" for kind in ("due", "sender")))

    await world.loader.patrol(NONE)

    assert await in_ready(world) == {sender}
    assert len(await scores(world.redis, f"outbox:{{0}}:due:{sender}")) == 1


async def test_the_processes_share_one_patrol(world: World) -> None:
    senders = await waiting_senders(world, 4)
    other = HeadLoader(world.engine, world.queues, world.settings)
    assert await world.loader.patrol(LONG) == LONG
    await world.redis.zrem(READY, *senders)

    # Less than the pause has passed since the part of the other process.
    assert await other.patrol(LONG) == LONG
    assert await in_ready(world) == set()

    await other.patrol(NONE)
    assert await in_ready(world) == set(senders[2:]), "it goes on where the other one ended"


async def test_if_much_of_a_part_is_lost_the_next_part_follows_at_once(world: World) -> None:
    senders = await waiting_senders(world, 6)
    for sender in senders[:4]:
        await world.redis.zrem(READY, sender)
        await world.redis.delete(f"outbox:{{0}}:due:{sender}")

    assert [await world.loader.patrol(LONG) for _ in range(3)] == [NONE, NONE, LONG]
    assert await in_ready(world) == set(senders)


@pytest.mark.parametrize("part", [3, 6])
async def test_the_commands_of_a_step_do_not_grow_with_the_senders(
    world: World, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(patrol_module, "PART", part)
    await waiting_senders(world, part)
    await world.loader.patrol(NONE)
    used = []
    for _ in range(2):
        # The first step of a round.
        await world.queues[0].end_patrol(0)
        before = await commands(world)
        await world.loader.patrol(NONE)
        used.append(await commands(world) - before)
        await waiting_senders(world, 4 * part)

    assert used[0] == used[1]
    assert used[0] >= part, "it has examined them"


async def test_a_shard_that_is_being_rebuilt_is_left_to_the_rebuild(world: World) -> None:
    senders = await waiting_senders(world, 2)
    await world.redis.flushall()
    assert await world.loader.patrol(NONE) == NONE
    assert await in_ready(world) == set()

    assert await world.loader.rebuild(world.queues[0])
    assert await in_ready(world) == set(senders)


@pytest.mark.parametrize("gone", [0, 1])
async def test_a_shard_that_cannot_be_reached_delays_no_other_shard(
    world: World, settings: Settings, gone: int
) -> None:
    """As in a cluster of which one node is down, also that with the first shard."""
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    three = settings.model_copy(update={"shards": 3})
    async with connect(settings.model_copy(update={"redis_url": nowhere})) as unreachable:
        queues = open_queues(world.redis, three)
        whole = HeadLoader(world.engine, queues, settings)
        for queue in queues:
            assert await whole.rebuild(queue)
        senders = [await world.sender() for _ in range(6)]
        for sender in senders:
            await world.schedule(sender, due=LONG, load=False)
        some = [*queues]
        some[gone] = open_queues(unreachable, three)[gone]
        loader = HeadLoader(world.engine, some, settings)
        failures = 0
        for _ in range(3):
            try:
                await loader.patrol(NONE)
            except QUEUE_ERRORS:
                failures += 1

        found = {
            int(sender)
            for queue in queues
            for sender in await scores(world.redis, queue.keys.ready)
        }
    # Each step asks the first shard for the place; two parts have a sender of the other one.
    assert failures == (3 if gone == 0 else 2)
    assert found == {sender for sender in senders if sender % 3 != gone}


async def test_a_process_that_dies_between_forgetting_and_loading_leaves_a_marker(
    world: World, settings: Settings
) -> None:
    """A sender in the wrong shard is removed there, and loaded into the right one."""
    queues = open_queues(world.redis, settings.model_copy(update={"shards": 2}))
    sender = await world.sender()
    await world.schedule(sender, due=LONG)
    await world.sql("DELETE FROM head_markers")
    wrong = queues[1 - sender % 2]

    class Dies(HeadLoader):
        async def load(self, *_: object, **__: object) -> None:
            raise SystemExit

    with pytest.raises(SystemExit):
        await Dies(world.engine, queues, settings).load_requested(wrong, [sender])

    found = await world.sql("SELECT sender_id FROM head_markers")
    assert [row.sender_id for row in found] == [sender]
    load = partial(HeadLoader(world.engine, queues, settings).load, [sender], committed=True)
    await load()
    assert await world.sql("SELECT sender_id FROM head_markers") == []
