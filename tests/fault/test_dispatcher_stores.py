"""PostgreSQL and Redis killed with -9 under load, then restarted; the dispatcher continues."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import psycopg
import pytest

from outbox_server.deploy.child import processes_in
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.states import JobState
from tests.conftest import Stores
from tests.dispatchers import RunningDispatcher, options, running, settings_of
from tests.eventually import eventually
from tests.world import World, at_least, gap_of, jobs_in

Configure = Callable[..., dict[str, str]]


@pytest.fixture
def configure(database_url: str, redis_url: str, inbox: Inbox) -> Configure:
    def build(**changes: str | int) -> dict[str, str]:
        return options(database_url, redis_url, inbox.url, **changes)

    return build


async def done(world: World) -> bool:
    """Return the result of World.done, or False while PostgreSQL is unreachable."""
    try:
        return await world.done()
    except psycopg.OperationalError:
        return False


async def test_killing_postgresql_under_load_only_delays_mail(
    configure: Configure, inbox: Inbox, stores: Stores
) -> None:
    settings = settings_of(configure(lease="5s", dispatcher_concurrency=10))
    async with World(settings) as world, running(settings) as dispatcher:
        senders = [await world.sender() for _ in range(3)]
        jobs = [job for each in senders for job in await world.schedule(each, 200)]
        await eventually(lambda: len(inbox.mails) >= 100)
        await stores.postgres.kill()
        try:
            # Sends in flight finish, and no other sends begin.
            await eventually(lambda: not_serving(dispatcher))
        finally:
            await stores.postgres.start()
        await eventually(lambda: done(world))

        assert await world.states() == {JobState.SENT: len(jobs)}
        arrived = jobs_in(inbox.mails)
        assert set(arrived) == set(jobs)
        # The answer to the mark was lost, or the outcome of the send was not recorded in time.
        expired = await world.sql("SELECT email_job_id AS id FROM attempts WHERE outcome = 6")
        assert {job for job, n in arrived.items() if n > 1} <= {row.id for row in expired}
        assert len(expired) <= 10
        await world.check_counts()
        await eventually(dispatcher.serving)


async def test_freezing_postgresql_under_load_only_delays_mail(
    configure: Configure, inbox: Inbox, stores: Stores
) -> None:
    settings = settings_of(configure(lease="20s", min_gap="20ms"))
    async with World(settings) as world, running(settings) as one, running(settings) as two:
        senders = [await world.sender() for _ in range(6)]
        jobs = [job for each in senders for job in await world.schedule(each, 40)]
        await eventually(lambda: len(inbox.mails) >= 60)
        frozen = processes_in(stores.postgres.folder, "postgres")
        signal_all(frozen, signal.SIGSTOP)
        try:
            for dispatcher in (one, two):  # each answers, and is not serving
                await eventually(partial(not_serving, dispatcher), 20)
                assert (await dispatcher.status()).in_flight_count <= 5
        finally:
            signal_all(frozen, signal.SIGCONT)
        await eventually(world.done)

        assert await world.states() == {JobState.SENT: len(jobs)}
        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        assert all(gap_of(inbox.mails, sender) >= 0.02 for sender in senders)
        await world.check_counts()
        for dispatcher in (one, two):
            await eventually(dispatcher.serving)


def signal_all(processes: Iterable[int], number: signal.Signals) -> None:
    for pid in processes:
        # A backend may have ended already.
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def not_serving(dispatcher: RunningDispatcher) -> bool:
    return not await dispatcher.serving()


async def test_killing_redis_under_load_only_delays_mail(
    configure: Configure, inbox: Inbox, stores: Stores
) -> None:
    settings = settings_of(configure(lease="3s", min_gap="20ms", rate_window="1s"))
    async with World(settings) as world, running(settings):
        limits = {await world.sender(limit=n): n for n in (7, 20, 1_000, 1_000)}
        jobs = [job for each in limits for job in await world.schedule(each, 14)]
        for share in (12, 25):
            await eventually(partial(at_least, share, inbox.mails))
            await stores.redis.kill()
            await stores.redis.start()
        await eventually(world.done)

        await world.check_sent(inbox.mails, jobs, limits)
