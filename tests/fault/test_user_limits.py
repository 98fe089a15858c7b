"""The limits that a user has for all its senders together, as an SMTP server sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest_asyncio

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.audit.replay import least_gap, most_in_window
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import JobState
from tests.dispatchers import options, process, running, settings_of
from tests.eventually import eventually
from tests.world import Mail, World, at_least, jobs_in

MANY = 40
WINDOW = timedelta(seconds=1)


def configured(database_url: str, redis_url: str, inbox: Inbox, **changes: Any) -> dict[str, str]:
    """Four shards: the senders of a user begin in all of them.

    Leases of running dispatchers never expire, even on a busy machine.
    """
    given: dict[str, Any] = {"shards": 4, "rate_window": "1s", "min_gap": "0", "lease": "60s"}
    return options(database_url, redis_url, inbox.url, **given | changes)


def short_lease(values: dict[str, str]) -> dict[str, str]:
    """Return the settings of a dispatcher that is killed: its jobs are sent again soon."""
    return values | {"lease": "4s"}


def most_of(mails: Iterable[Mail]) -> int:
    return most_in_window([mail.received_at for mail in mails], WINDOW.total_seconds())


@pytest_asyncio.fixture
async def crowd(
    database_url: str, redis_url: str, inbox: Inbox
) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that sets up many senders of one user, with one mail each."""
    async with AsyncExitStack() as stack:

        async def build(mails: int = 1, **changes: Any) -> tuple[World, dict[str, str], list[int]]:
            values = configured(database_url, redis_url, inbox, **changes)
            world = await stack.enter_async_context(World(settings_of(values)))
            senders = [await world.sender() for _ in range(MANY)]
            jobs = [job for each in senders for job in await world.schedule(each, mails)]
            return world, values, jobs

        yield build


async def test_forty_senders_keep_one_limit_although_a_dispatcher_dies_and_redis_is_emptied(
    crowd: Callable[..., Any], inbox: Inbox, tmp_path: Path
) -> None:
    world, values, jobs = await crowd(user_hourly_limit=20)
    async with running(settings_of(values)):
        async with process(short_lease(values), tmp_path / "dispatcher.log") as child:
            await eventually(partial(at_least, 12, inbox.mails))
            await child.kill()
        await world.redis.flushall()
        # It looks for expired leases at once.
        async with running(settings_of(values)):
            await eventually(partial(at_least, 24, inbox.mails))
            await world.redis.flushall()
            await eventually(world.done)

    assert most_of(inbox.mails) <= 20
    assert set(jobs_in(inbox.mails)) == set(jobs)
    assert await world.states() == {JobState.SENT: MANY}
    keys = await world.sql("SELECT DISTINCT shard_key AS key FROM senders")
    assert len(keys) == 1
    assert keys[0].key is not None


async def test_forty_senders_keep_one_gap_although_a_dispatcher_dies_and_redis_is_emptied(
    crowd: Callable[..., Any], inbox: Inbox, tmp_path: Path
) -> None:
    world, values, jobs = await crowd(user_gap="50ms")
    async with running(settings_of(values)):
        async with process(short_lease(values), tmp_path / "dispatcher.log") as child:
            await eventually(partial(at_least, 8, inbox.mails))
            await child.kill()
        await world.redis.flushall()
        # It looks for expired leases at once.
        async with running(settings_of(values)):
            await eventually(partial(at_least, 20, inbox.mails))
            await world.redis.flushall()
            await eventually(world.done)

    gap = least_gap((mail.started_at, mail.received_at) for mail in inbox.mails)
    assert gap is not None
    assert gap >= 0.05
    assert set(jobs_in(inbox.mails)) == set(jobs)


async def set_limits(world: World, hourly_limit: int | None, gap_ms: int | None) -> None:
    """Change the limits of the user, as UpdateUser does."""
    await world.sql(
        "INSERT INTO users (user_id, hourly_limit, min_gap_ms) VALUES ('anna', %s, %s)"
        " ON CONFLICT (user_id) DO UPDATE"
        " SET hourly_limit = excluded.hourly_limit, min_gap_ms = excluded.min_gap_ms",
        hourly_limit,
        gap_ms,
    )
    rows = await world.sql("SELECT id FROM senders WHERE user_id = 'anna' ORDER BY id")
    await world.loader.load_user("anna", [row.id for row in rows])


async def test_a_limit_that_is_set_while_mail_is_sent_holds_for_all_mail_that_waits(
    crowd: Callable[..., Any], inbox: Inbox
) -> None:
    world, values, _ = await crowd(5)
    settings: Settings = settings_of(values)
    async with running(settings), running(settings):
        await eventually(partial(at_least, 20, inbox.mails))
        await set_limits(world, 15, None)
        waiting = await world.in_state(JobState.SCHEDULED)
        await eventually(partial(at_least, len(inbox.mails) + 30, inbox.mails))
        # What was sent until then was limited, if it waited before.
        limited = waiting & await world.in_state(JobState.SENT)
        await set_limits(world, 0, None)
        await eventually(world.done)

    mails = list(inbox.mails)
    assert len(limited) >= 15
    for mail in mails:
        if set(jobs_in([mail])) <= limited:
            # Mail that was sent before counts as well.
            until = mail.received_at
            ends = [one.received_at for one in mails if one.received_at <= until]
            assert sum(end > until - WINDOW.total_seconds() for end in ends) <= 15
    assert set(jobs_in(mails).values()) == {1}


async def sent_by(world: World, senders: list[int], count: int) -> bool:
    return (await world.states(*senders))[JobState.SENT] >= count


async def test_senders_of_a_user_take_turns_and_other_users_are_not_delayed(
    database_url: str, redis_url: str, inbox: Inbox
) -> None:
    values = configured(database_url, redis_url, inbox, rate_window="1h")
    async with World(settings_of(values)) as world:
        senders = [await world.sender() for _ in range(3)]
        other = await world.sender(user="bert")
        await set_limits(world, 6, None)
        for each in senders:
            await world.schedule(each, 20)
        async with running(settings_of(values)):
            await eventually(lambda: sent_by(world, senders, 6))
            await world.schedule(other, 20)
            await eventually(lambda: world.done(other))
            sent = [(await world.states(each))[JobState.SENT] for each in senders]
            assert sum(sent) == 6
            await set_limits(world, 24, None)
            await eventually(lambda: sent_by(world, senders, 24))
            sent = [(await world.states(each))[JobState.SENT] for each in senders]
        assert sum(sent) == 24
        # Without turns, the first sender alone would have sent 20.
        assert min(sent) >= 2
        assert len(inbox.mails) == 44
