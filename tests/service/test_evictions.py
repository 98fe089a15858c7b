"""Redis evicts keys because its memory is full: claims notice it, without any patrol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

import pytest
import pytest_asyncio

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import recovery as recovery_module
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.world import World, at_least, jobs_in

SENDERS = 30


@pytest_asyncio.fixture
async def world(
    database_url: str, redis_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setattr(recovery_module, "PATROL_PAUSE", timedelta(hours=1))
    values = options(database_url, redis_url, inbox.url, rate_window="1s", min_gap="20ms")
    async with World(settings_of(values)) as world, running(world.settings):
        # The only part of the patrol has found nothing, and the first rebuild has ended.
        await eventually(lambda: world.redis.hexists("outbox:{0}:life", "patrolled"))
        await eventually(lambda: world.redis.exists("outbox:{0}:generation"))
        yield world


async def evict(world: World, share: float) -> None:
    """Let Redis evict about this share of its keys, and give it memory again."""
    before = await world.redis.dbsize()
    await world.redis.config_set("maxmemory-policy", "allkeys-random")
    try:
        await world.redis.config_set("maxmemory", 1)
        # Each command evicts some keys, within a limit of time.
        await eventually(lambda: fewer_than(world, before * (1 - share)))
    finally:
        await world.redis.config_set("maxmemory", 0)
        await world.redis.config_set("maxmemory-policy", "noeviction")


async def fewer_than(world: World, keys: float) -> bool:
    return await world.redis.dbsize() <= keys


@pytest.mark.parametrize("share", [0.3, 1.0])
async def test_evictions_while_mail_is_sent_break_no_promise(
    world: World, inbox: Inbox, share: float
) -> None:
    limits = {await world.sender(limit=n): n for n in (7, 1_000, 1_000)}
    jobs = [job for sender in limits for job in await world.schedule(sender, 30)]
    for number in (10, 30, 50):
        await eventually(partial(at_least, number, inbox.mails))
        await evict(world, share)
    await eventually(world.done)

    await world.check_sent(inbox.mails, jobs, limits)


@pytest.mark.parametrize("share", [0.3, 1.0])
async def test_mail_whose_keys_were_evicted_before_it_is_due_is_sent_in_time(
    world: World, inbox: Inbox, share: float
) -> None:
    jobs = []
    for _ in range(SENDERS):
        jobs += await world.schedule(await world.sender(), due=timedelta(seconds=2))
    await evict(world, share)
    await eventually(world.done)

    assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
    for job in jobs:
        [attempt] = await world.attempts(job)
        late = attempt.started_at - (await world.job(job)).scheduled_at.timestamp()
        # By a claim, at least one each second, and a load.
        assert 0 <= late < 10


async def test_the_loss_of_all_looks_is_noticed_although_new_mail_brings_some_back(
    world: World, inbox: Inbox
) -> None:
    jobs = await world.schedule(await world.sender(), due=timedelta(seconds=1))
    await world.redis.delete("outbox:{0}:ready")
    jobs += await world.schedule(await world.sender())
    await eventually(world.done)

    assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
