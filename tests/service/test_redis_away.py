"""Redis is full, hangs or refuses: intake continues and the mails are sent later."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta

import pytest
from redis.asyncio import Redis

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import recovery as recovery_module
from outbox_server.shared.heads import markers
from outbox_server.shared.queue import connection
from outbox_server.shared.queue.queue import HEAD_SIZE
from tests.conftest import Stores
from tests.dispatchers import RunningDispatcher, options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import running_scheduler
from tests.world import World, jobs_in

NOT_LOADED = "The queue cannot be loaded"


# The time limit of a call to a Redis that hangs, in seconds, instead of 5.
CALL_LIMIT = 2.0


@pytest.fixture(autouse=True)
def calls_to_redis_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CALL_LIMIT_S", CALL_LIMIT)


@pytest.fixture(autouse=True)
def markers_are_old_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_module, "MARKER_AGE", timedelta(milliseconds=200))
    monkeypatch.setattr(markers, "MARKER_AGE", timedelta(milliseconds=200))


@asynccontextmanager
async def refusing(stores: Stores) -> AsyncIterator[None]:
    await stores.redis.kill()
    try:
        yield
    finally:
        await stores.redis.start()


@asynccontextmanager
async def hanging(stores: Stores) -> AsyncIterator[None]:
    pid = stores.redis.child.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def full(stores: Stores) -> AsyncIterator[None]:
    async with Redis.from_url(stores.redis.url) as client:
        await client.config_set("maxmemory", "1")
        try:
            yield
        finally:
            await client.config_set("maxmemory", "0")


@pytest.mark.parametrize("away", [refusing, hanging, full])
async def test_intake_continues_without_redis_and_the_mails_are_sent_later(
    database_url: str,
    redis_url: str,
    inbox: Inbox,
    stores: Stores,
    away: Callable[[Stores], AbstractAsyncContextManager[None]],
) -> None:
    settings = settings_of(options(database_url, redis_url, inbox.url))
    async with (
        running_scheduler(database_url, redis_url, min_gap="0") as scheduler,
        running(settings),
    ):
        known = await scheduler.sender(email="known@example.com")
        await scheduler.schedule(known)
        await eventually(lambda: len(inbox.mails) == 1)
        async with away(stores):
            sender = await scheduler.sender()
            # Redis stays unreachable until the scheduler answers.
            async with asyncio.timeout(PATIENCE):
                answer = await scheduler.schedule(sender, "email\na@b.org\nc@d.org\n")
            assert answer.batch.accepted_count == 2
            assert any(NOT_LOADED in notice for notice in answer.notices), answer.notices
            assert len(inbox.mails) == 1
        await eventually(lambda: len(inbox.mails) == 3)
        await eventually(lambda: scheduler.value("SELECT count(*) = 0 FROM head_markers"))


async def test_intake_continues_without_dispatchers_and_the_mails_are_sent_later(
    database_url: str, redis_url: str, inbox: Inbox
) -> None:
    settings = settings_of(options(database_url, redis_url, inbox.url))
    async with running_scheduler(database_url, redis_url, min_gap="0") as scheduler:
        sender = await scheduler.sender()
        answer = await scheduler.schedule(sender, "email\na@b.org\nc@d.org\n")
        assert answer.batch.accepted_count == 2
        async with running(settings):
            await eventually(lambda: len(inbox.mails) == 2)


async def test_jobs_already_in_redis_are_sent_while_redis_is_full(
    database_url: str, redis_url: str, inbox: Inbox, stores: Stores
) -> None:
    settings = settings_of(options(database_url, redis_url, inbox.url, min_gap="10ms"))
    async with World(settings) as world:
        assert await world.loader.rebuild(world.queues[0])
        sender = await world.sender()
        # More jobs than a head holds: the others are loaded while Redis is full.
        await world.schedule(sender, HEAD_SIZE + 20)
        async with full(stores), running(settings) as dispatcher:
            await eventually(world.done)
            # Mail of other senders would wait, so it is not ready.
            assert not await dispatcher.serving()


async def test_a_long_hang_of_redis_delays_mail_only_until_it_ends(
    database_url: str, redis_url: str, inbox: Inbox, stores: Stores
) -> None:
    settings = settings_of(options(database_url, redis_url, inbox.url, lease="4s"))
    async with World(settings) as world, running(settings) as dispatcher:
        sender = await world.sender(max_in_flight=5)
        jobs = await world.schedule(sender, 20, spacing=timedelta(milliseconds=100))
        await eventually(lambda: len(inbox.mails) >= 3)
        async with hanging(stores):
            # Longer than the time limit of a call to Redis.
            await eventually(lambda: not_serving(dispatcher))
            await eventually(gone_for(CALL_LIMIT + 0.5))
        await eventually(world.done)

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        await eventually(dispatcher.serving)


def gone_for(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


async def not_serving(dispatcher: RunningDispatcher) -> bool:
    return not await dispatcher.serving()
