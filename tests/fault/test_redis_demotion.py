"""A Redis primary that is demoted while its connections stay open, with and without Sentinel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.deploy.wheels import valkey_binary
from tests.conftest import Stores
from tests.dispatchers import DispatcherProcess, options, process, readiness, settings_of
from tests.eventually import eventually
from tests.sentinels import answers, watched_pair
from tests.world import World, jobs_in

GAP_MS = 50


@asynccontextmanager
async def following(server: ValkeyServer, port: int) -> AsyncIterator[None]:
    """Let a server be a replica. Its clients stay connected."""
    async with Redis.from_url(server.url) as client:
        follow: Any = client.replicaof
        await follow(LOOPBACK, port)
        try:
            yield
        finally:
            await follow("NO", "ONE")


@asynccontextmanager
async def pair(stores: Stores, folder: Path) -> AsyncIterator[tuple[ValkeyServer, ValkeyServer]]:
    binary = stores.redis.binary or valkey_binary()
    first, second = (ValkeyServer(folder / name, binary=binary) for name in ("first", "second"))
    second.password = first.password
    try:
        await first.start()
        await second.start()
        yield first, second
    finally:
        await first.kill()
        await second.kill()


async def schedule(world: World, dispatcher: DispatcherProcess, mails: int) -> None:
    sender = await world.sender(gap_ms=GAP_MS)
    await eventually(dispatcher.serving)
    await world.schedule(sender, mails)


async def test_a_demoted_primary_is_left_and_mail_goes_on_when_it_is_promoted_again(
    stores: Stores, database_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    health = f"{LOOPBACK}:{free_port()}"
    async with pair(stores, tmp_path) as (server, _):
        values = options(database_url, server.url, inbox.url, health_listen=health)
        async with (
            process(values, tmp_path / "log") as dispatcher,
            World(settings_of(values)) as world,
        ):
            await schedule(world, dispatcher, 40)
            await eventually(lambda: len(inbox.mails) > 2)
            async with following(server, free_port()):

                async def reported() -> bool:
                    return await readiness(health) == ("NOT_SERVING", "redis: read-only replica")

                await eventually(reported)
                await eventually(lambda: "redis_left" in dispatcher.log())
                assert '"trouble": "read-only replica"' in dispatcher.log()
                assert len(inbox.mails) < 40
            await eventually(world.done)
            await eventually(dispatcher.serving)
            assert set(jobs_in(inbox.mails).values()) == {1}
            assert len(inbox.mails) == 40


async def test_a_demoted_primary_is_left_for_the_server_that_its_address_leads_to(
    stores: Stores, database_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    ports: list[int] = []
    async with (
        pair(stores, tmp_path) as (first, second),
        # Its open connections stay with the server to which they were opened.
        TcpProxy(lambda: ports[-1]) as proxy,
    ):
        ports.append(first.port)
        url = first.url.replace(str(first.port), str(proxy.port))
        values = options(database_url, url, inbox.url)
        async with (
            process(values, tmp_path / "log") as dispatcher,
            World(settings_of(values)) as world,
        ):
            await schedule(world, dispatcher, 40)
            await eventually(lambda: len(inbox.mails) > 2)
            ports.append(second.port)
            async with following(first, second.port):
                # Although the first server remains a replica, and no connection was cut.
                await eventually(world.done)
                await eventually(dispatcher.serving)
            assert set(jobs_in(inbox.mails).values()) == {1}
            assert len(inbox.mails) == 40


@pytest.mark.parametrize("killed", [False, True])
async def test_mail_goes_on_after_a_failover_by_sentinel(
    stores: Stores, database_url: str, inbox: Inbox, tmp_path: Path, *, killed: bool
) -> None:
    async with watched_pair(stores.redis.binary or valkey_binary(), tmp_path) as watched:
        values = options(database_url, watched.url, inbox.url)
        async with (
            process(values, tmp_path / "log") as dispatcher,
            World(settings_of(values)) as world,
        ):
            await eventually(partial(answers, world.redis))
            await schedule(world, dispatcher, 40)
            await eventually(lambda: len(inbox.mails) > 2)
            if killed:
                await watched.primary.kill()
            else:
                await watched.fail_over()
            await eventually(world.done)
            await eventually(dispatcher.serving)
            assert set(jobs_in(inbox.mails).values()) == {1}
            assert len(inbox.mails) == 40
            assert await watched.primary_port() == watched.replica.port
