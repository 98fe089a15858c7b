"""Redis is disposable: losing all of it under load breaks no promise."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import dispatcher as dispatcher_module
from outbox_server.services.dispatcher import recovery as recovery_module
from outbox_server.services.dispatcher import server as server_module
from outbox_server.shared.queue.queue import HEAD_SIZE
from outbox_server.shared.states import JobState
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


async def test_dispatching_starts_with_an_empty_redis_and_jobs_in_postgresql(
    configure: Configure, inbox: Inbox
) -> None:
    settings = settings_of(configure(dispatcher_concurrency=20))
    async with World(settings) as world:
        # More jobs than a head holds, and more than one sender.
        senders = [await world.sender(), await world.sender()]
        jobs = await world.schedule(senders[0], 2 * HEAD_SIZE + 10, load=False)
        jobs += await world.schedule(senders[1], 3, load=False)
        async with running(settings):
            await eventually(world.done)

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        assert list(jobs_in(mails_of(inbox.mails, senders[1]))) == jobs[-3:]


async def test_an_empty_redis_is_loaded_with_the_history_of_sends(
    configure: Configure, inbox: Inbox
) -> None:
    settings = settings_of(configure(min_gap="300ms"))
    async with World(settings) as world:
        limited, spaced = await world.sender(limit=2), await world.sender()
        await world.schedule(limited, 2)
        await world.schedule(spaced, 1)
        async with running(settings):
            await eventually(world.done)
        await world.schedule(limited, 3, load=False)
        await world.schedule(spaced, 2, load=False)
        await world.redis.flushall()
        async with running(settings):
            await eventually(lambda: world.done(spaced))

        # Its hourly limit is used up, although Redis had lost the history.
        assert len(mails_of(inbox.mails, limited)) == 2
        assert gap_of(inbox.mails, spaced) >= 0.3


@pytest.mark.parametrize("dispatchers", [1, 2])
async def test_flushall_under_load_breaks_no_promise(
    configure: Configure, inbox: Inbox, dispatchers: int
) -> None:
    # Leases of running dispatchers never expire, even on a busy machine.
    settings = settings_of(configure(rate_window="1s", min_gap="20ms", lease="60s"))
    async with World(settings) as world, AsyncExitStack() as stack:
        for _ in range(dispatchers):
            await stack.enter_async_context(running(settings))
        limits = {await world.sender(limit=n): n for n in (5, 10, 1_000, 1_000, 1_000)}
        jobs = [job for each in limits for job in await world.schedule(each, 13)]
        for share in (8, 18, 30, 42):
            await eventually(partial(at_least, share, inbox.mails))
            await world.redis.flushall()
        await eventually(world.done)

        await world.check_sent(inbox.mails, jobs, limits)


async def test_flushall_without_a_gap_sends_nothing_twice_and_loses_nothing(
    configure: Configure, inbox: Inbox
) -> None:
    # Leases of running dispatchers never expire, even on a busy machine.
    settings = settings_of(configure(dispatcher_concurrency=20, lease="60s"))
    async with World(settings) as world, running(settings), running(settings):
        senders = [await world.sender(max_in_flight=10) for _ in range(5)]
        jobs = [job for each in senders for job in await world.schedule(each, 200)]
        for share in (50, 300, 600):
            await eventually(partial(at_least, share, inbox.mails))
            await world.redis.flushall()
        await eventually(world.done)

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        assert await world.sql("SELECT * FROM attempts WHERE outcome <> 1") == []


async def test_a_mail_in_flight_when_redis_is_lost_still_counts(
    configure: Configure,
) -> None:
    held = Wait()
    async with ScriptedServer({"body": [(held, Succeed())]}) as server:
        settings = settings_of(configure(server.url, min_gap="100ms"))
        async with World(settings) as world, running(settings), running(settings):
            sender, control = await world.sender(limit=2), await world.sender()
            first, _, third = await world.schedule(sender, 3)
            await eventually(lambda: server.waiting["body"] == 1)
            await world.redis.flushall()
            # Redis works again, and the sender still has its one mail in flight.
            await world.schedule(control, 3)
            await eventually(lambda: world.done(control))
            assert len(mails_of(server.taken, sender)) == 1
            # The first mail ends after this, at its reply. PostgreSQL may record its end late.
            released = time.time()
            held.event.set()
            await eventually(lambda: len(mails_of(server.taken, sender)) == 2)
            await world.schedule(control, 3)
            await eventually(lambda: world.done(control))

            assert await world.in_state(JobState.SCHEDULED) == {third}
            assert jobs_in(mails_of(server.taken, sender))[first] == 1
            assert mails_of(server.taken, sender)[1].started_at - released >= 0.1


async def test_a_sleeping_dispatcher_notices_a_lost_redis(
    configure: Configure, inbox: Inbox
) -> None:
    settings = settings_of(configure())
    async with World(settings) as world, running(settings):
        sender = await world.sender()
        [later] = await world.schedule(sender, due=timedelta(seconds=1.5))
        await world.redis.flushall()
        await eventually(world.done)

        assert jobs_in(inbox.mails) == {later: 1}


async def test_a_head_that_nobody_loaded_is_found_by_its_marker(
    configure: Configure, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that died between its commit and its load."""
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT", timedelta(hours=1))
    monkeypatch.setattr(recovery_module, "MARKER_AGE", timedelta(milliseconds=50))
    settings = settings_of(configure())
    async with World(settings) as world, running(settings):
        sender = await world.sender()
        await world.schedule(sender)
        await eventually(world.done)
        [job] = await world.schedule(sender, load=False)
        # As if the scheduler had died some seconds ago.
        await world.sql("UPDATE head_markers SET created_at = now() - interval '10 s'")
        await eventually(world.done)

        assert jobs_in(inbox.mails)[job] == 1
        await eventually(lambda: no_markers(world))


async def no_markers(world: World) -> bool:
    return not await world.sql("SELECT * FROM head_markers")


async def test_redis_memory_grows_with_the_senders_and_not_with_the_jobs(
    configure: Configure,
) -> None:
    settings = settings_of(configure())
    async with World(settings) as world:
        sender = await world.sender()
        await world.schedule(sender, HEAD_SIZE)
        before = await memory(world)
        await world.schedule(sender, 5_000, due=timedelta(hours=1))
        assert await memory(world) <= before + 200


async def memory(world: World) -> int:
    keys = await world.redis.keys("*")
    return sum([int(await world.redis.memory_usage(key) or 0) for key in keys])


async def test_a_job_claimed_twice_around_a_loss_holds_its_senders_entry(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job, not marked yet, was claimed before and after a loss of Redis: one claim is refused.

    The refused claim must not release the entry of the claim that sends.
    """
    # The first mark waits for the lock. The second is one of the next turn.
    monkeypatch.setattr(server_module, "_LOCK_TIMEOUT", timedelta(seconds=60))
    held = Wait()
    async with ScriptedServer({"body": [Succeed(), (held, Succeed())]}) as server:
        settings = settings_of(configure(server.url, min_gap="1s"))
        # Already connected: less than a gap passes between the first mail's end and the lock.
        async with World(settings) as world, running(settings), await world.connect() as holder:
            sender, control = await world.sender(), await world.sender()
            jobs = await world.schedule(sender, 3)
            await eventually(lambda: world.in_state(JobState.SENT))
            async with holder.transaction():
                # The table is locked, so that the next mark cannot begin.
                await holder.execute("LOCK TABLE email_jobs IN SHARE ROW EXCLUSIVE MODE")
                await eventually(lambda: mark_waits(world))
                await world.redis.flushall()
                await eventually(lambda: world.leases_in_redis(sender))
            await eventually(lambda: server.waiting["body"] == 1)
            await world.schedule(control, 4)
            await eventually(lambda: world.done(control))

            assert len(mails_of(server.taken, sender)) == 2
            assert len(server.began) == 2 + 4
            held.event.set()
            await eventually(world.done)
            assert jobs_in(mails_of(server.taken, sender)) == dict.fromkeys(jobs, 1)


async def mark_waits(world: World) -> bool:
    rows = await world.sql(
        "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND starts_with(query, 'WITH sendable AS')"
    )
    return bool(rows[0].n)
