"""Redis returns with old data: from a snapshot, or from a replica that takes over."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.shared.queue import queue as queue_module
from tests.conftest import Stores
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World, at_least, gap_of, jobs_in, mails_of

Configure = Callable[..., dict[str, str]]


@pytest.fixture
def configure(database_url: str, redis_url: str, inbox: Inbox) -> Configure:
    def build(smtp_url: str = inbox.url, **changes: str | int) -> dict[str, str]:
        return options(database_url, redis_url, smtp_url, **changes)

    return build


@pytest.fixture
async def redis_server(stores: Stores) -> AsyncIterator[ValkeyServer]:
    """The run's Redis; its snapshots are deleted after the test."""
    yield stores.redis
    async with Redis.from_url(stores.redis.url) as client:
        await client.replicaof("NO", "ONE")
    (stores.redis.folder / "dump.rdb").unlink(missing_ok=True)


async def restart(server: ValkeyServer, world: World) -> None:
    await server.kill()
    await server.start()
    await world.redis.connection_pool.disconnect()


async def test_an_old_snapshot_does_not_restore_a_used_up_limit(
    configure: Configure, inbox: Inbox, redis_server: ValkeyServer
) -> None:
    settings = settings_of(configure(min_gap="300ms"))
    async with World(settings) as world, running(settings):
        limited, spaced = await world.sender(limit=2), await world.sender()
        jobs = await world.schedule(limited, 4, due=timedelta(seconds=0.3))
        later = await world.schedule(spaced, 2, due=timedelta(hours=1))
        # The snapshot has four waiting jobs, no sent mail, and a look in an hour.
        await world.redis.save()
        await eventually(partial(at_least, 2, inbox.mails))
        await world.due_now(spaced)
        await eventually(partial(at_least, 3, inbox.mails))
        await restart(redis_server, world)
        await eventually(lambda: world.done(spaced))

        assert sorted(jobs_in(mails_of(inbox.mails, limited))) == jobs[:2]
        assert jobs_in(mails_of(inbox.mails, spaced)) == dict.fromkeys(later, 1)
        assert gap_of(inbox.mails, spaced) >= 0.3


async def test_old_snapshots_under_load_break_no_promise(
    configure: Configure, inbox: Inbox, redis_server: ValkeyServer
) -> None:
    settings = settings_of(configure(lease="3s", min_gap="20ms", rate_window="1s"))
    async with World(settings) as world, running(settings), running(settings):
        limits = {await world.sender(limit=n): n for n in (7, 20, 1_000, 1_000)}
        jobs = [job for each in limits for job in await world.schedule(each, 20)]
        for share in (5, 30, 55):
            await eventually(partial(at_least, share, inbox.mails))
            await world.redis.save()
            await eventually(partial(at_least, share + 8, inbox.mails))
            await restart(redis_server, world)
        await eventually(world.done)

        await world.check_sent(inbox.mails, jobs, limits)


async def test_a_mail_in_flight_that_is_missing_from_an_old_snapshot_keeps_its_entry(
    configure: Configure, redis_server: ValkeyServer
) -> None:
    held = Wait()
    async with ScriptedServer({"body": [(held, Succeed())]}) as server:
        settings = settings_of(configure(server.url, min_gap="100ms"))
        async with World(settings) as world, running(settings), running(settings):
            sender, control = await world.sender(), await world.sender()
            first, second = await world.schedule(sender, 2, due=timedelta(seconds=0.3))
            await world.redis.save()
            await eventually(lambda: server.waiting["body"] == 1)
            await restart(redis_server, world)
            await world.schedule(control, 3)
            await eventually(lambda: world.done(control))
            assert len(mails_of(server.taken, sender)) == 1
            held.event.set()
            await eventually(world.done)

            assert jobs_in(mails_of(server.taken, sender)) == {first: 1, second: 1}


async def test_a_rebuild_lock_restored_by_an_old_snapshot_blocks_no_rebuild(
    configure: Configure,
    inbox: Inbox,
    redis_server: ValkeyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The lock lasts longer than the test.
    monkeypatch.setattr(queue_module, "_REBUILD_LOCK", timedelta(hours=1))
    settings = settings_of(configure())
    async with World(settings) as world:
        sender = await world.sender()
        jobs = await world.schedule(sender, 2, load=False)
        assert await world.queues[0].begin_rebuild() is not None
        await world.redis.save()
        await restart(redis_server, world)
        async with running(settings):
            await eventually(world.done)

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)


async def test_failing_over_to_a_replica_that_lags_breaks_no_promise(
    configure: Configure, inbox: Inbox, redis_server: ValkeyServer, tmp_path: Path
) -> None:
    settings = settings_of(configure(lease="3s", min_gap="20ms", rate_window="1s"))
    # The replica has the same version: an older server cannot read the data of a newer one.
    replica = ValkeyServer(tmp_path / "replica", binary=redis_server.binary)
    replica.password = redis_server.password
    await replica.start()
    try:
        async with (
            Redis.from_url(replica.url, decode_responses=True) as other,
            World(settings) as world,
            running(settings),
            running(settings),
        ):
            limits = {await world.sender(limit=n): n for n in (20, 1_000, 1_000)}
            jobs = [job for each in limits for job in await world.schedule(each, 40)]
            await eventually(partial(at_least, 5, inbox.mails))
            for redis in (other, world.redis):
                await redis.config_set("repl-diskless-sync-delay", 0)
            await other.config_set("masterauth", replica.password)
            await other.replicaof("127.0.0.1", redis_server.port)
            await eventually(lambda: synced(other))
            # From now on the replica lags.
            await other.replicaof("NO", "ONE")
            sent = len(inbox.mails)
            await eventually(partial(at_least, sent + 8, inbox.mails))
            # As in a failover, this server keeps the old master's address. It becomes a replica,
            # then a master.
            await restart(redis_server, world)
            await world.redis.config_set("masterauth", replica.password)
            await world.redis.replicaof("127.0.0.1", replica.port)
            await eventually(lambda: synced(world.redis))
            await world.redis.replicaof("NO", "ONE")
            await eventually(world.done)

            await world.check_sent(inbox.mails, jobs, limits)
    finally:
        await replica.stop()


async def synced(redis: Redis) -> bool:
    return bool((await redis.info("replication")).get("master_link_status") == "up")
