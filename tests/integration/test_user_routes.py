"""The senders of a user with limits move into one shard, with their history and their leases."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.circuit_keys import shard_key
from outbox_server.shared.queue.connection import open_queues
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claim, LimitUse, Settlement
from outbox_server.shared.settings import load_settings
from tests.world import World

SHARDS = 3


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    settings = load_settings(
        database_url=database_url, redis_url=redis_url, shards=SHARDS, min_gap="0"
    )
    async with World(settings) as world:
        yield world


def shard_of_user(world: World, user: str = "anna") -> Queue:
    return world.queues[shard_key(user) % SHARDS]


async def elsewhere(world: World) -> int:
    """Return a sender whose id puts it into another shard than its user."""
    while (sender := await world.sender()) % SHARDS == shard_of_user(world).shard:
        pass
    return sender


async def limit(world: World, sender: int, most: int) -> None:
    await world.sql(
        "INSERT INTO users (user_id, hourly_limit) VALUES ('anna', %s)"
        " ON CONFLICT (user_id) DO UPDATE SET hourly_limit = excluded.hourly_limit",
        most,
    )
    await world.loader.load_user("anna", [sender])


async def claims(queue: Queue, want: int = 10) -> list[Claim]:
    return list((await queue.claim(want)).claims)


async def mark(world: World, claim: Claim) -> None:
    await world.sql(
        "UPDATE email_jobs SET state = 2, attempt = %s, lease_until = now() + interval '60s'"
        " WHERE id = %s",
        claim.job.attempt,
        claim.job.job_id,
    )


async def test_a_sender_moves_once_and_its_old_shard_forgets_it(world: World) -> None:
    sender = await elsewhere(world)
    await world.schedule(sender, 3)
    old, new = world.queues[sender % SHARDS], shard_of_user(world)
    await limit(world, sender, 2)
    assert await claims(old) == []
    assert len(await claims(new)) == 2
    assert await world.redis.keys(f"outbox:{{{old.shard}}}:*:{sender}") == []
    # It stays when the limit ends.
    await limit(world, sender, 0)
    assert len(await claims(new)) == 1
    assert await claims(old) == []


async def test_a_claim_of_the_old_shard_is_not_confirmed(world: World) -> None:
    sender = await elsewhere(world)
    await world.schedule(sender, 3)
    old, new = world.queues[sender % SHARDS], shard_of_user(world)
    claimed = await claims(old, 2)
    await limit(world, sender, 2)
    await mark(world, claimed[0])
    assert await old.confirm(claimed) == [False, False]
    # The limit is that of the user although the other shard had given leases.
    assert len(await claims(new)) == 2


async def test_a_mail_that_is_being_sent_keeps_its_lease_in_the_new_shard(world: World) -> None:
    sender = await elsewhere(world)
    await world.schedule(sender, 3)
    old, new = world.queues[sender % SHARDS], shard_of_user(world)
    [claim] = await claims(old, 1)
    await mark(world, claim)
    assert await old.confirm([claim]) == [True]
    await limit(world, sender, 1)
    assert await claims(new) == []
    assert await old.renew([(sender, claim.job, claim.user)]) == [None]
    assert (await world.loader.find_queues([sender]))[sender] is new
    (renewed,) = await new.renew([(sender, claim.job, claim.user)])
    assert renewed is not None
    # Not sent after all: the entry is free again.
    await world.sql(
        "UPDATE email_jobs SET state = 1, attempt = 0, lease_until = NULL WHERE id = %s",
        claim.job.job_id,
    )
    ended = Settlement(
        sender, claim.job, LimitUse.UNUSED, user=claim.user, lease_ms=renewed, next_job=claim.job
    )
    assert await old.settle([ended]) == [sender]
    assert await new.settle([ended]) == []
    assert len(await claims(new)) == 1


async def test_a_process_that_does_not_know_the_move_finds_the_sender(world: World) -> None:
    sender = await elsewhere(world)
    await world.schedule(sender, 2)
    stranger = HeadLoader(world.engine, open_queues(world.redis, world.settings), world.settings)
    await limit(world, sender, 5)
    await stranger.load([sender], committed=True)
    assert await claims(world.queues[sender % SHARDS]) == []
    assert stranger.queue_of(sender).shard == shard_of_user(world).shard
    assert len(await claims(shard_of_user(world))) == 2


async def test_a_rebuild_loads_moved_senders_into_their_shard(world: World) -> None:
    sender = await elsewhere(world)
    await world.schedule(sender, 3)
    await limit(world, sender, 2)
    await world.redis.flushall()
    fresh = HeadLoader(world.engine, open_queues(world.redis, world.settings), world.settings)
    for queue in fresh.queues:
        assert await fresh.rebuild(queue)
    assert await claims(world.queues[sender % SHARDS]) == []
    assert len(await claims(shard_of_user(world))) == 2


async def test_senders_of_users_without_limits_stay_where_they_are(world: World) -> None:
    sender = await elsewhere(world)
    other = await world.sender(user="bert")
    await world.schedule(other, 2)
    await limit(world, sender, 2)
    rows = await world.sql("SELECT shard_key FROM senders WHERE id = %s", other)
    assert rows[0].shard_key is None
    assert len(await claims(world.queues[other % SHARDS])) == 2


async def test_a_default_limit_moves_the_senders_of_every_user_when_they_are_loaded(
    world: World,
) -> None:
    sender = await elsewhere(world)
    await world.schedule(sender, 3)
    settings = world.settings.model_copy(update={"user_hourly_limit": 2})
    queues = open_queues(world.redis, settings)
    loader = HeadLoader(world.engine, queues, settings)
    old, new = queues[sender % SHARDS], queues[shard_of_user(world).shard]
    # Dispatchers claim from every shard.
    assert await claims(new) == []
    asked = await old.claim(10)
    assert (asked.claims, asked.loads) == ((), (sender,))
    await loader.load_requested(old, asked.loads)
    assert len(await claims(new)) == 2
    assert (await old.claim(10)).next_look is None
