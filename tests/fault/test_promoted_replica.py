"""PostgreSQL fails over to a replica: it is held only if the replica lacks much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Self

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.shared.database.migrating import migrate
from outbox_server.shared.queue.heartbeats import HeartbeatMemory, KnownBeat
from tests.conftest import Stores
from tests.dispatchers import RunningDispatcher, options, running, settings_of
from tests.eventually import eventually
from tests.world import World, jobs_in


class ReplicatedPostgres:
    """A PostgreSQL with its own cluster, and replicas that can take over its address."""

    def __init__(self, stores: Stores, folder: Path) -> None:
        self._folder = folder
        self._stack = AsyncExitStack()
        self._proxy = TcpProxy(lambda: self.primary.port)
        self._replicas = 0
        shared = stores.postgres
        self.primary = PostgresServer(
            folder / "primary",
            durable=False,
            binaries=shared._binaries,
            system_user=shared._system_user,
        )
        self.primary.replicated = True

    @property
    def url(self) -> str:
        """The URL of the database, which stays the same after a failover."""
        return self.primary.passwords.url(self._proxy.port, "outbox", "outbox")

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self.primary.stop)
        await self.primary.start()
        await self.primary.ensure_database()
        await asyncio.to_thread(migrate, self.primary.url())
        await self._stack.enter_async_context(self._proxy)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def add_replica(self) -> PostgresServer:
        """Return a running replica that has all that the primary has."""
        self._replicas += 1
        replica = self.primary.another(self._folder / f"replica{self._replicas}")
        self._stack.push_async_callback(replica.stop)
        await replica.start_as_replica(self.primary)
        written = await self.primary.ask("SELECT pg_current_wal_lsn()")
        replayed = f"SELECT coalesce(pg_last_wal_replay_lsn() >= '{written}', false)"
        await eventually(lambda: replica.ask(replayed))
        return replica

    async def fail_over(self, replica: PostgresServer) -> None:
        """Kill the primary, and let the replica take over its address."""
        self._proxy.refuse()
        await self.primary.kill()
        if not replica.child.running:
            await replica.start()
        await replica.ask("SELECT pg_promote()")
        self.primary = replica
        self._proxy.heal()


async def _is_after(world: World, first: KnownBeat) -> bool:
    """Return whether Redis knows a heartbeat that the replica certainly lacks by a second."""
    return (await known_beat(world)).at - first.at > timedelta(seconds=2)


@pytest.fixture
async def replicated(stores: Stores) -> AsyncIterator[ReplicatedPostgres]:
    folder = stores.postgres.folder.with_name("replicated")
    folder.mkdir(mode=0o711, exist_ok=True)
    async with ReplicatedPostgres(stores, folder) as found:
        yield found


async def is_held(dispatcher: RunningDispatcher) -> bool:
    return (await dispatcher.status()).HasField("hold_start_time")


async def known_beat(world: World) -> KnownBeat:
    """Return the newest heartbeat that Redis knows."""
    (row,) = await world.sql("SELECT installation_id FROM installation")
    found = await HeartbeatMemory(world.redis, row.installation_id).read()
    assert found is not None
    return found


async def fail_over(world: World, servers: ReplicatedPostgres, replica: PostgresServer) -> None:
    """Fail over, and reconnect."""
    await world._connection.close()
    await servers.fail_over(replica)
    await world.sql("SELECT 1")


async def test_a_promoted_replica_goes_on_sending_unless_it_lacks_much(
    replicated: ReplicatedPostgres, redis_url: str, inbox: Inbox
) -> None:
    values = options(replicated.url, redis_url, inbox.url)
    async with World(settings_of(values)) as world:
        sender = await world.sender()
        async with running(settings_of(values)) as dispatcher:
            await world.schedule(sender, 5)
            await eventually(lambda: len(inbox.mails) == 5)
            replica = await replicated.add_replica()
            await fail_over(world, replicated, replica)
            jobs = await world.schedule(sender, 5)
            await eventually(lambda: set(jobs) <= set(jobs_in(inbox.mails)))
            assert not await is_held(dispatcher)
        # From here on the next replica lags, by more than these dispatchers accept.
        lagging = await replicated.add_replica()
        await lagging.stop()
        async with running(settings_of({**values, "hold_after": "1s"})) as dispatcher:
            first = await eventually(lambda: known_beat(world))
            lost = await world.schedule(sender, 5)
            await eventually(lambda: set(lost) <= set(jobs_in(inbox.mails)))
            await eventually(lambda: _is_after(world, first))
            before = jobs_in(inbox.mails)
            # It has a job that waits, and lacks the last mails.
            await fail_over(world, replicated, lagging)
            other = await world.sender(user="bert")
            (waiting,) = await world.schedule(sender, 1)
            await eventually(lambda: is_held(dispatcher))
            await world.sql("INSERT INTO hold_releases (sender_id) VALUES (%s)", other)
            (released,) = await world.schedule(other, 1)
            await eventually(lambda: released in jobs_in(inbox.mails))
            assert waiting not in jobs_in(inbox.mails) - before
