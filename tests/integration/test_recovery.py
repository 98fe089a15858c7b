"""Recovery of expired leases on a real PostgreSQL, also run concurrently."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher import recovery as recovery_module
from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.metrics import DispatcherMetrics
from outbox_server.services.dispatcher.recovery import Recovery
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.dispatchers import options, settings_of
from tests.eventually import PATIENCE
from tests.marked_jobs import LEASE, OVER, mark, record_of, recover, settle
from tests.world import World

# Recovery ------------------------------------------------------------------------------------


@pytest.mark.parametrize("next_state", [JobState.SCHEDULED, JobState.UNCERTAIN])
async def test_an_expired_lease_is_an_attempt_that_takes_a_slot(
    world: World, connection: AsyncConnection, next_state: JobState
) -> None:
    sender, other = await world.sender(), await world.sender()
    [job, held] = await world.schedule(sender, 2, load=False)
    [fine] = await world.schedule(other, load=False)
    await mark(connection, [job], lease=OVER)
    await mark(connection, [held, fine])
    was = await world.job(job)

    assert await recover(world, next_state) == [sender]

    row = await world.job(job)
    [attempt] = await world.attempts(job)
    assert (row.state, row.attempt, row.failures) == (next_state, 1, 0)
    assert row.scheduled_at == was.scheduled_at
    assert row.lease_until is None
    final = next_state is JobState.UNCERTAIN
    assert row.finished_at == (was.lease_until if final else None)
    # The end of the attempt is unknown, so the latest possible instant is recorded.
    assert attempt.ended_at == was.lease_until.timestamp()
    assert attempt.ended_at - attempt.started_at == pytest.approx(LEASE.total_seconds())
    assert (attempt.outcome, attempt.counted) == (AttemptOutcome.LEASE_EXPIRED, True)
    assert await world.in_state(JobState.SENDING) == {held, fine}
    await world.check_counts()
    assert await recover(world, next_state) == []


async def test_a_recovered_job_is_marked_as_its_next_attempt(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    await mark(connection, [job], lease=OVER)
    await recover(world)

    assert await mark(connection, [job], attempt=1) == {}
    assert set(await mark(connection, [job], attempt=2)) == {job}


async def wait_again(world: World, job: int) -> None:
    """Make a job wait, as RetryEmailJobs and ResolveUncertainJob do."""
    await world.sql("UPDATE email_jobs SET state = 1, finished_at = NULL WHERE id = %s", job)


async def test_a_job_is_given_up_after_three_leases_that_expired_without_a_reply(
    world: World, connection: AsyncConnection
) -> None:
    [job, other] = await world.schedule(await world.sender(), 2, load=False)
    for attempt in (1, 2, 3):
        await mark(connection, [job], attempt=attempt, lease=OVER)
        assert (await world.job(job)).state == JobState.SENDING
        await recover(world)

    row, attempts = await world.job(job), await world.attempts(job)
    assert (row.state, row.attempt) == (JobState.FAILED, 3)
    assert row.finished_at.timestamp() == attempts[-1].ended_at
    assert {each.outcome for each in attempts} == {AttemptOutcome.LEASE_EXPIRED}
    assert [str(each.message).partition(":")[0] for each in attempts[1:]] == [
        "the dispatcher recorded no outcome before its lease expired",
        "LEASE_EXPIRED_REPEATEDLY",
    ]
    assert (await world.job(other)).state == JobState.SCHEDULED
    await world.check_counts()


async def test_a_reply_or_a_retry_of_a_caller_starts_the_count_of_expired_leases_again(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    for attempt in range(1, 9):
        [marked] = (await mark(connection, [job], attempt=attempt, lease=OVER)).values()
        if attempt == 3:
            deferred = {"outcome": AttemptOutcome.TEMPORARY_FAILURE, "smtp_code": 451}
            await settle(connection, [record_of(marked, JobState.SCHEDULED, **deferred)])
        else:
            await recover(world)
        # Three leases after the reply have expired at attempt 6.
        state = JobState.FAILED if attempt == 6 else JobState.SCHEDULED
        assert (await world.job(job)).state == state, attempt
        if attempt == 6:
            await world.sql(
                "UPDATE email_jobs SET state = 1, finished_at = NULL WHERE id = %s", job
            )


async def test_a_job_is_never_given_up_if_the_operator_chose_hold(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    for attempt in (1, 2, 3):
        await mark(connection, [job], attempt=attempt, lease=OVER)
        await recover(world, JobState.UNCERTAIN)
        assert (await world.job(job)).state == JobState.UNCERTAIN
        await wait_again(world, job)


async def test_two_recoveries_at_once_end_each_attempt_once(
    world: World, connection: AsyncConnection
) -> None:
    senders = [await world.sender() for _ in range(2)]
    jobs = [job for each in senders for job in await world.schedule(each, 3, load=False)]
    await mark(connection, jobs, lease=OVER)
    async with world.engine.begin() as first:
        found = await storage.recover_expired(first, LEASE, JobState.SCHEDULED)
        assert await recover(world) == []

    assert sorted(found) == senders
    assert all([len(await world.attempts(job)) == 1 for job in jobs])
    await world.check_counts()


async def test_a_recovery_and_a_settlement_at_once_record_one_outcome(
    world: World, statements: AsyncEngine
) -> None:
    jobs = await world.schedule(await world.sender(), 2, load=False)
    async with statements.connect() as connection:
        marked = await mark(connection, jobs, lease=OVER)
        async with world.engine.begin() as settling:
            await settle(settling, [record_of(marked[jobs[0]])])
            # It does not wait for jobs that are being settled.
            await recover(world)
        assert await settle(connection, [record_of(marked[jobs[1]])]) == {}

    assert [a.outcome for a in await world.attempts(jobs[0])] == [AttemptOutcome.SENT]
    assert [a.outcome for a in await world.attempts(jobs[1])] == [AttemptOutcome.LEASE_EXPIRED]
    await world.check_counts()


async def test_the_next_expiry_is_that_of_the_first_lease(
    world: World, connection: AsyncConnection
) -> None:
    jobs = await world.schedule(await world.sender(), 2, load=False)
    assert await storage.next_expiry(connection) is None

    await mark(connection, jobs[:1], lease=timedelta(seconds=50))
    await mark(connection, jobs[1:], lease=timedelta(seconds=20))

    left = await storage.next_expiry(connection)
    assert left is not None
    assert timedelta(seconds=10) < left <= timedelta(seconds=20)


@pytest.fixture
def recovery_of(world: World) -> Callable[..., Recovery]:
    def build(policy: str = "resend", metrics: DispatcherMetrics | None = None) -> Recovery:
        settings = settings_of(
            options(
                world.settings.database_url,
                world.settings.redis_url,
                world.settings.smtp_url,
                uncertain_policy=policy,
                lease="1s",
            )
        )
        return Recovery(settings, world.engine, world.loader, metrics)

    return build


@pytest.mark.parametrize(
    ("policy", "state"), [("resend", JobState.SCHEDULED), ("hold", JobState.UNCERTAIN)]
)
async def test_the_policy_decides_about_jobs_whose_lease_expired(
    world: World,
    connection: AsyncConnection,
    recovery_of: Callable[..., Recovery],
    policy: str,
    state: JobState,
) -> None:
    sender = await world.sender()
    [job] = await world.schedule(sender, load=False)
    await mark(connection, [job], lease=OVER)
    registry = CollectorRegistry()

    pause = await recovery_of(policy, DispatcherMetrics(registry)).recover_leases()

    assert registry.get_sample_value("outbox_lost_leases_total", {"found": "expired"}) == 1

    assert pause == timedelta(seconds=1)
    assert (await world.job(job)).state == state
    key = world.loader.queue_of(sender).keys.ready.replace("ready", f"due:{sender}")
    due = await world.redis.zrange(key, 0, -1)
    assert due == ([f"{job:012d}:2"] if state is JobState.SCHEDULED else [])


async def test_a_job_recovered_while_redis_is_unreachable_is_not_lost(
    world: World, connection: AsyncConnection
) -> None:
    """The marker of the same transaction makes a dispatcher load it later."""
    sender = await world.sender()
    [job] = await world.schedule(sender, load=False)
    await world.sql("DELETE FROM head_markers")
    await mark(connection, [job], lease=OVER)
    away = settings_of(
        options(world.settings.database_url, "redis://127.0.0.1:1/0", world.settings.smtp_url)
    )
    async with World(away) as elsewhere:
        with pytest.raises(QUEUE_ERRORS):
            await Recovery(away, elsewhere.engine, elsewhere.loader).recover_leases()

    assert (await world.job(job)).state == JobState.SCHEDULED
    assert [row.sender_id for row in await world.sql("SELECT * FROM head_markers")] == [sender]


async def test_a_dispatcher_that_sent_while_postgresql_hung_gets_time_to_record_it(
    world: World,
    connection: AsyncConnection,
    recovery_of: Callable[..., Recovery],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery_module, "_HANGS", timedelta(milliseconds=100))
    [job] = await world.schedule(await world.sender(), load=False)
    await mark(connection, [job], lease=OVER)
    recovery = recovery_of()
    # Only once: leases must end even if PostgreSQL always hangs.
    for pause, state in (
        (recovery_module.GRACE, JobState.SENDING),
        (timedelta(seconds=1), JobState.SCHEDULED),
    ):
        async with world.engine.begin() as hung:
            await hung.execute(text("LOCK TABLE email_jobs"))
            looking = asyncio.create_task(recovery.recover_leases())
            await asyncio.wait([looking], timeout=0.2)
            assert not looking.done()
        assert await looking == pause
        assert (await world.job(job)).state == state


@pytest.mark.parametrize("recorded", [True, False])
async def test_a_dispatcher_that_starts_gives_others_time_to_record_what_they_sent(
    world: World, connection: AsyncConnection, monkeypatch: pytest.MonkeyPatch, *, recorded: bool
) -> None:
    """An outage that ended just before the start has kept others from recording."""
    # The shorter time is over at the second search.
    grace = timedelta(seconds=10) if recorded else timedelta(seconds=0.5)
    monkeypatch.setattr(recovery_module, "GRACE", grace)
    [job] = await world.schedule(await world.sender(), load=False)
    marked = await mark(connection, [job], lease=OVER)
    recovery = Recovery(world.settings, world.engine, world.loader)
    pauses: asyncio.Queue[timedelta] = asyncio.Queue()
    search = recovery.recover_leases

    async def noted() -> timedelta:
        pause = await search()
        pauses.put_nowait(pause)
        return pause

    monkeypatch.setattr(recovery, "recover_leases", noted)
    running = asyncio.create_task(recovery.run())
    try:
        async with asyncio.timeout(PATIENCE):
            assert timedelta(0) < await pauses.get() <= grace
            assert (await world.job(job)).state == JobState.SENDING
            if recorded:
                assert set(await settle(connection, [record_of(marked[job])])) == {job}
            else:
                await pauses.get()
    finally:
        running.cancel()
        await asyncio.wait([running])
    after = JobState.SENT if recorded else JobState.SCHEDULED
    assert (await world.job(job)).state == after


class CancellationLosingLoader(HeadLoader):
    """Loses a cancellation, as redis-py does on Python 3.11 if it arrives with an answer."""

    begun: asyncio.Event

    async def load_abandoned(self) -> list[int]:
        self.begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return []


async def test_a_recovery_ends_although_its_cancellation_was_lost(world: World) -> None:
    loader = CancellationLosingLoader(world.engine, world.queues, world.settings)
    loader.begun = asyncio.Event()
    recovering = asyncio.create_task(Recovery(world.settings, world.engine, loader).run())
    await loader.begun.wait()
    recovering.cancel()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(asyncio.CancelledError):
            await recovering
