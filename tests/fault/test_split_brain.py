"""Two masters of Redis at once, with a dispatcher on each: only one of them sends."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.services.dispatcher import recovery as recovery_module
from outbox_server.shared.heads import lives as lives_module
from outbox_server.shared.queue.connection import open_queues
from tests.conftest import Stores
from tests.dispatchers import RunningDispatcher, options, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World, at_least, jobs_in, mails_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are compared often, and one that is out of use is replaced soon."""
    monkeypatch.setattr(lives_module, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(lives_module, "_SEEN_PAUSE", timedelta(0))
    monkeypatch.setattr(recovery_module, "CHECK_PAUSE", timedelta(seconds=0.2))
    monkeypatch.setattr(recovery_module, "_SOON", timedelta(seconds=0.2))


@pytest.fixture
async def first(stores: Stores, redis_url: str) -> AsyncIterator[ValkeyServer]:
    """The run's Redis, empty."""
    assert stores.redis.url == redis_url
    yield stores.redis
    async with Redis.from_url(stores.redis.url) as client:
        await client.replicaof("NO", "ONE")


@pytest.fixture
async def second(first: ValkeyServer, tmp_path: Path) -> AsyncIterator[ValkeyServer]:
    """Another server of the same version, since replicas must have the same."""
    server = ValkeyServer(tmp_path / "second", binary=first.binary)
    server.password = first.password
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def replicate(replica: Redis, master: Redis, server: ValkeyServer) -> None:
    """Make `replica` a copy of `master`, which is the client of `server`."""
    for client in (replica, master):
        await client.config_set("repl-diskless-sync-delay", 0)
    await replica.config_set("masterauth", server.password)
    await replica.replicaof("127.0.0.1", server.port)

    async def synced() -> bool:
        return bool((await replica.info("replication")).get("master_link_status") == "up")

    await eventually(synced)


async def test_two_masters_that_lose_their_data_in_turn_break_no_promise(
    database_url: str, inbox: Inbox, first: ValkeyServer, second: ValkeyServer
) -> None:
    both = [
        settings_of(
            options(database_url, url, inbox.url, min_gap="20ms", rate_window="1s", lease="60s")
        )
        for url in (first.url, second.url)
    ]
    async with (
        World(both[0]) as world,
        Redis.from_url(first.url) as one,
        Redis.from_url(second.url) as two,
        AsyncExitStack() as stack,
    ):
        limits = {await world.sender(limit=n): n for n in (6, 12, 1_000, 1_000)}
        # The last sender may have five mails in flight at once.
        await world.change(max(limits), min_gap_ms=20)
        jobs = [job for each in limits for job in await world.schedule(each, 40)]
        for settings in both:
            await stack.enter_async_context(running(settings))
        winners = []
        # In turn, each server begins a life that the other one does not know.
        while not await world.done():
            for server in (one, two):
                await server.flushall()
                arrived = len(inbox.mails)
                await eventually(partial(moved_on, world, inbox, arrived + 6))
                winners.append(await valid_life(world))
        await world.check_sent(inbox.mails, jobs, limits)
        assert len(set(winners)) >= 6, "both have sent, in turn"


async def valid_life(world: World) -> str:
    rows = await world.sql("SELECT life FROM shard_lives WHERE shard = 0")
    return str(rows[0].life)


async def moved_on(world: World, inbox: Inbox, mails: int) -> bool:
    return len(inbox.mails) >= mails or await world.done()


async def test_a_promoted_replica_that_lacks_writes_sends_alone(
    database_url: str, inbox: Inbox, first: ValkeyServer, second: ValkeyServer
) -> None:
    one, two = (
        settings_of(
            options(database_url, url, inbox.url, min_gap="20ms", rate_window="1s", lease="60s")
        )
        for url in (first.url, second.url)
    )
    async with (
        World(one) as world,
        Redis.from_url(second.url, decode_responses=True) as replica,
        running(one) as old,
    ):
        limits = {await world.sender(limit=n): n for n in (10, 25, 1_000)}
        jobs = [job for each in limits for job in await world.schedule(each, 50)]
        await eventually(partial(at_least, 10, inbox.mails))
        await replicate(replica, world.redis, first)
        # From now on the replica lacks writes. Then it is promoted, and the old master goes on.
        await replica.replicaof("NO", "ONE")
        lost = len(inbox.mails) + 10
        await eventually(partial(at_least, lost, inbox.mails))
        before = await valid_life(world)
        async with running(two) as new:
            await eventually(world.done)
            await world.check_sent(inbox.mails, jobs, limits)
            assert await valid_life(world) != before
            await eventually(partial(is_silent, old))
            await eventually(new.serving)

            # The old master does not return while the new one is in use. Mail that a scheduler
            # loads into the old one is found by the new one.
            late = await world.schedule(next(iter(limits)), 2)
            await eventually(partial(at_least, len(jobs) + 2, inbox.mails))
            assert await is_silent(old)
        # Then the new one is gone.
        await eventually(old.serving)
        late += await world.schedule(next(iter(limits)), 2)
        await eventually(world.done)
        await world.check_sent(inbox.mails, jobs + late, limits)


async def is_silent(dispatcher: RunningDispatcher) -> bool:
    return not await dispatcher.serving()


async def test_a_mail_in_flight_at_the_old_master_counts_at_the_new_one_for_as_long_as_it_lasts(
    database_url: str, first: ValkeyServer, second: ValkeyServer
) -> None:
    held = Wait()
    async with ScriptedServer({"body": [(held, Succeed())]}) as server:
        one, two = (
            settings_of(options(database_url, url, server.url, min_gap="100ms", lease="10s"))
            for url in (first.url, second.url)
        )
        async with World(one) as world, World(two) as other, running(one), running(two):
            sender, control = await world.sender(), await world.sender()
            begun, following = await world.schedule(sender, 2)
            await eventually(lambda: server.waiting["body"] == 1)
            # The second master takes over. It counts the mail that the first one is sending.
            await other.redis.flushall()
            await world.schedule(control, 3, load=False)
            await other.loader.load([control], committed=True)
            await eventually(partial(world.done, control))
            # Its dispatcher renews the lease at the first master only, beyond the first lease.
            lease = (await world.job(begun)).lease_until
            await eventually(partial(is_renewed, world, begun, lease + timedelta(seconds=1)))
            await world.schedule(control, 3, load=False)
            await other.loader.load([control], committed=True)
            await eventually(partial(world.done, control))
            assert len(mails_of(server.taken, sender)) == 1
            # The first mail ends after this, at its reply. PostgreSQL may record its end late.
            released = time.time()
            held.event.set()
            await eventually(world.done)

            assert jobs_in(mails_of(server.taken, sender)) == {begun: 1, following: 1}
            assert mails_of(server.taken, sender)[1].started_at - released >= 0.1


async def is_renewed(world: World, job: int, beyond: object) -> bool:
    return bool((await world.job(job)).lease_until > beyond)


async def test_a_master_that_was_a_replica_meanwhile_begins_a_new_life(
    database_url: str, redis_url: str, first: ValkeyServer, second: ValkeyServer
) -> None:
    """It lost what it wrote before, although its process lives on and no script ran elsewhere."""
    settings = settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1"))
    async with (
        World(settings) as world,
        Redis.from_url(second.url, decode_responses=True) as replica,
    ):
        [queue] = open_queues(world.redis, settings)
        assert await world.loader.rebuild(world.queues[0])
        await replicate(replica, world.redis, first)
        await replica.replicaof("NO", "ONE")
        await queue.read_life()
        before = queue.life
        await world.schedule(await world.sender())
        assert len((await queue.claim(1)).claims) == 1

        await replicate(world.redis, replica, second)
        await world.redis.replicaof("NO", "ONE")
        claimed = await queue.claim(1)
        assert (claimed.claims, claimed.lost, claimed.provisional) == ((), True, True)
        assert queue.life != before
