"""Dispatchers paused past their lease, and statements of dead dispatchers that run late.

test_kill_points.py kills dispatchers between any two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.dispatchers import (
    DispatcherClient,
    DispatcherProcess,
    options,
    process,
    running,
    settings_of,
)
from tests.dying import doomed
from tests.eventually import eventually
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World, gap_of, jobs_in

Configure = Callable[..., dict[str, str]]
Start = Callable[[dict[str, str]], Any]
LEASE_EXPIRED, SENT = AttemptOutcome.LEASE_EXPIRED, AttemptOutcome.SENT
CONCURRENCY = 5


@pytest.fixture
def configure(database_url: str, redis_url: str) -> Configure:
    def build(smtp_url: str, **changes: str | int) -> dict[str, str]:
        given: dict[str, Any] = {"dispatcher_concurrency": CONCURRENCY}
        return options(database_url, redis_url, smtp_url, **given | changes)

    return build


def short_lease(values: dict[str, str]) -> dict[str, str]:
    """Return the settings of a dispatcher that is killed or paused: they have a short lease.

    The other dispatchers keep a lease that they can renew in time on a busy machine.
    """
    return values | {"lease": "2s"}


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return a function that runs a dispatcher process, with its log in the test's folder."""

    def run(values: dict[str, str]) -> Any:
        # A statement that waits for a table of the test must not give up on a busy machine.
        return process(values, tmp_path / "dispatcher.log", lock_timeout=timedelta(minutes=1))

    return run


async def outcomes(world: World, job: int) -> list[AttemptOutcome]:
    return [attempt.outcome for attempt in await world.attempts(job)]


# The first words of a dispatcher's statements.
MARK, SETTLE = "WITH sendable AS", "WITH ended AS"

# Statements that run after the death of their dispatcher ------------------------------------------


@asynccontextmanager
async def table_held(world: World, table: str) -> AsyncIterator[None]:
    """Lock a table so that every statement of a dispatcher that writes to it waits."""
    async with await world.connect() as holder, holder.transaction():
        await holder.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE".encode())
        yield


async def waits(world: World, statement: str) -> bool:
    """Return whether a statement with this beginning waits for a lock."""
    rows = await world.sql(
        "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND starts_with(query, %s)",
        statement,
    )
    return bool(rows[0].n)


async def is_rebuilt(world: World) -> bool:
    """Return whether a dispatcher has begun a life of the shard, and loaded all senders."""
    return (await world.queues[0].count_ready_jobs()).complete


async def test_a_mark_executed_after_its_dispatcher_died_holds_for_one_lease(
    configure: Configure, start: Start, inbox: Inbox
) -> None:
    values = configure(inbox.url)
    async with World(settings_of(values)) as world:
        # A rebuild cannot read the table.
        assert await world.loader.rebuild(world.queues[0])
        sender = await world.sender()
        [job] = await world.schedule(sender)
        async with table_held(world, "email_jobs"), start(short_lease(values)) as child:
            await eventually(lambda: waits(world, MARK))
            assert await world.leases_in_redis(sender) == 1
            await child.kill()
        async with running(settings_of(values)):
            await eventually(world.done)

        assert jobs_in(inbox.mails) == {job: 1}
        assert await outcomes(world, job) == [LEASE_EXPIRED, SENT]
        await world.check_counts()


async def test_an_outcome_recorded_after_its_dispatcher_died_counts(
    configure: Configure, start: Start, inbox: Inbox
) -> None:
    values = configure(inbox.url)
    async with World(settings_of(values)) as world:
        [job] = await world.schedule(await world.sender())
        async with table_held(world, "attempts"), start(short_lease(values)) as child:
            await eventually(lambda: waits(world, SETTLE))
            assert len(inbox.mails) == 1
            await child.kill()
        async with running(settings_of(values)):
            await eventually(world.done)

        assert jobs_in(inbox.mails) == {job: 1}
        assert await outcomes(world, job) == [SENT]
        await world.check_counts()


async def test_a_lease_that_expired_only_in_redis_takes_an_entry_of_the_window(
    configure: Configure, inbox: Inbox
) -> None:
    values = configure(inbox.url)
    async with World(settings_of(values)) as world:
        # At most one send at a time, and two per hour.
        sender = await world.sender(limit=2, max_in_flight=1)
        control = await world.sender()
        first, second, third = await world.schedule(sender, 3)
        async with doomed(short_lease(values), "recorded") as dying:
            await eventually(lambda: not dying.is_alive())
        assert await is_sent(world, first)
        assert await world.leases_in_redis(sender) == 1
        async with running(settings_of(values)):
            await eventually(lambda: is_sent(world, second))
            await world.schedule(control, 5)
            await eventually(lambda: world.done(control))

            assert await outcomes(world, first) == [SENT]
            assert await world.in_state(JobState.SCHEDULED) == {third}
            assert jobs_in(inbox.mails)[first] == 1
            await world.check_counts()


# Mails that the server has accepted when a dispatcher is killed: at the start, and in full flight.
MOMENTS = (1, 100, 350)


async def test_kills_at_several_moments_of_full_load_leave_at_most_the_concurrency_in_doubt(
    configure: Configure, start: Start, inbox: Inbox
) -> None:
    """Claims ahead take over slots: never more of them than there are ends that are recorded."""
    values = configure(inbox.url)
    async with World(settings_of(values)) as world:
        senders = [await world.sender(user=f"u{n % 3}") for n in range(9)]
        jobs = {job for each in senders for job in await world.schedule(each, 60)}
        doubtful: set[tuple[int, int]] = set()
        for moment in MOMENTS:
            async with start(short_lease(values)) as child:
                await eventually(lambda m=moment: len(inbox.mails) >= m)  # type: ignore[misc]
                await child.kill()
            # What it had sent to PostgreSQL may still be executed.
            await eventually(partial(nobody_else_writes, world))
            left = await being_sent(world) - doubtful
            assert len(left) <= CONCURRENCY
            doubtful |= left
            unrecorded = set(jobs_in(inbox.mails)) - await world.in_state(JobState.SENT)
            assert unrecorded <= {job for job, _ in doubtful}
        async with running(settings_of(values)):
            await eventually(world.done)
        arrived = jobs_in(inbox.mails)
        assert set(arrived) == jobs == await world.in_state(JobState.SENT)
        copies = arrived.total() - len(jobs)
        assert copies <= len(doubtful) <= CONCURRENCY * len(MOMENTS)
        await world.check_counts()


async def being_sent(world: World) -> set[tuple[int, int]]:
    """Return the jobs that are SENDING, each with its attempt."""
    rows = await world.sql("SELECT id, attempt FROM email_jobs WHERE state = 2")
    return {(row.id, row.attempt) for row in rows}


async def nobody_else_writes(world: World) -> bool:
    rows = await world.sql(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'"
        " AND pid <> pg_backend_pid()"
    )
    return not rows


async def is_sent(world: World, job: int) -> bool:
    return bool((await world.job(job)).state == JobState.SENT)


# Dispatchers stopped for longer than the lease -----------------------------------------------


@asynccontextmanager
async def held_in_three_phases() -> AsyncIterator[tuple[ScriptedServer, asyncio.Event]]:
    """Accept mails, but hold one until the event at each of RCPT, DATA and the body's end."""
    release = asyncio.Event()
    held = [(Wait(release), Succeed())]
    async with ScriptedServer({"rcpt": [*held], "data": [*held], "body": [*held]}) as server:
        yield server, release


def all_held(server: ScriptedServer) -> bool:
    return all(server.waiting[phase] == 1 for phase in ("rcpt", "data", "body"))


async def nothing_in_flight(child: DispatcherProcess) -> bool:
    async with grpc.aio.insecure_channel(child.listen) as channel:
        return (await DispatcherClient(channel).status()).in_flight_count == 0


@pytest.mark.parametrize("policy", ["resend", "hold"])
async def test_a_dispatcher_paused_past_its_lease_sends_nothing_and_overwrites_nothing(
    configure: Configure, start: Start, policy: str
) -> None:
    async with held_in_three_phases() as (server, release):
        values = configure(server.url, uncertain_policy=policy)
        async with World(settings_of(values)) as world, start(short_lease(values)) as sleeper:
            jobs = await world.schedule(await world.sender(), 3)
            await eventually(lambda: all_held(server))
            sleeper.pause()
            [doubtful] = jobs_in(server.taken)
            async with running(settings_of(values)):
                await eventually(world.done)
                before = [(await world.job(job), await world.attempts(job)) for job in jobs]
                arrived = jobs_in(server.taken)
                # One mail gets 354, and the mail in doubt gets 250.
                release.set()
                await eventually(lambda: not server.waiting.total())
                sleeper.resume()
                await eventually(lambda: nothing_in_flight(sleeper))

            assert [(await world.job(job), await world.attempts(job)) for job in jobs] == before
            assert jobs_in(server.taken) == arrived
            assert server.body_bytes == sum(len(mail.data) for mail in server.taken)
            if policy == "hold":
                assert await world.states() == {JobState.UNCERTAIN: 3}
                assert arrived == {doubtful: 1}
            else:
                assert await world.states() == {JobState.SENT: 3}
                assert arrived == dict.fromkeys(jobs, 1) | {doubtful: 2}
            await world.check_counts()


async def test_a_job_whose_lease_expired_during_mark_is_given_up(
    configure: Configure, start: Start, inbox: Inbox
) -> None:
    values = configure(inbox.url)
    async with World(settings_of(values)) as world, start(short_lease(values)) as sleeper:
        await eventually(sleeper.serving)
        await eventually(lambda: is_rebuilt(world))
        sender = await world.sender()
        [job] = await world.schedule(sender, load=False)
        async with table_held(world, "email_jobs"):
            await world.loader.load([sender], committed=True)
            await eventually(lambda: waits(world, MARK))
            sleeper.pause()
        async with running(settings_of(values)):
            await eventually(world.done)
            before = await world.attempts(job)
            sleeper.resume()
            await eventually(lambda: nothing_in_flight(sleeper))

        assert [a.outcome for a in before] == [LEASE_EXPIRED, SENT]
        assert await world.attempts(job) == before
        assert jobs_in(inbox.mails) == {job: 1}
        await world.check_counts()


async def test_a_paused_dispatcher_among_others_breaks_neither_gap_nor_record(
    configure: Configure, start: Start, inbox: Inbox
) -> None:
    values = configure(inbox.url, min_gap="20ms")
    async with World(settings_of(values)) as world, start(short_lease(values)) as sleeper:
        await eventually(sleeper.serving)
        async with running(settings_of(values)):
            senders = [await world.sender() for _ in range(6)]
            jobs = [job for each in senders for job in await world.schedule(each, 60)]
            await eventually(lambda: len(inbox.mails) >= 60)
            sleeper.pause()
            # The others recover its leases and send its jobs. A dispatcher that starts now checks
            # all leases; the first one may have checked when only its own long leases existed.
            async with running(settings_of(values)):
                await eventually(world.done)
            sleeper.resume()
            await eventually(lambda: nothing_in_flight(sleeper))

        arrived = jobs_in(inbox.mails)
        expired = await world.sql("SELECT email_job_id AS id FROM attempts WHERE outcome = 6")
        assert set(arrived) == set(jobs)
        assert {job for job, n in arrived.items() if n > 1} <= {row.id for row in expired}
        assert len(expired) <= CONCURRENCY
        assert all(gap_of(inbox.mails, sender) >= 0.02 for sender in senders)
        assert await world.states() == {JobState.SENT: len(jobs)}
        await world.check_counts()
