"""Rows that somebody else has locked, such as an operator in psql: other mail does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import psycopg
import pytest_asyncio
from outbox.v1 import batch_pb2
from outbox.v1.batch_service_pb2 import GetBatchRequest
from outbox.v1.email_job_pb2 import EmailJobState
from outbox.v1.email_job_service_pb2 import GetEmailJobRequest
from outbox.v1.sender_service_pb2 import DeleteSenderRequest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.cooling import CooldownRules
from outbox_server.services.dispatcher.ended_claims import UnsentJob
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.scheduler.storage import cancelling
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.states import JobState
from tests.dispatchers import options, process, running, settings_of
from tests.eventually import eventually
from tests.marked_jobs import mark_refs
from tests.scheduler_stack import Scheduler
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World, address_of, jobs_in

# A locked row would hold the others up until the end of the test; this is far below that.
SOON = 40.0


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str, inbox: Inbox) -> AsyncIterator[World]:
    settings = settings_of(options(database_url, redis_url, inbox.url, lease="60s"))
    async with World(settings) as world:
        yield world
        await world.check_counts()


@asynccontextmanager
async def locked(world: World, jobs: Sequence[int]) -> AsyncIterator[None]:
    """Hold the locks of these rows."""
    url = world.settings.database_url
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute(
            "SELECT id FROM email_jobs WHERE id = ANY(%s) FOR UPDATE", [list(jobs)]
        )
        yield
        await connection.rollback()


async def test_a_locked_waiting_row_delays_no_other_mail_and_is_sent_later(
    world: World, inbox: Inbox
) -> None:
    senders = [await world.sender() for _ in range(8)]
    waiting = {sender: await world.schedule(sender, 20) for sender in senders}
    jobs = [job for each in waiting.values() for job in each]
    # The first mail of one sender, and one in the middle of another.
    held = [waiting[senders[0]][0], waiting[senders[1]][10]]
    async with locked(world, held), running(world.settings):
        others = set(jobs) - set(held)
        await eventually(lambda: set(jobs_in(inbox.mails)) == others, SOON)
        assert await world.in_state(JobState.SCHEDULED) == set(held)
    async with running(world.settings):
        await eventually(world.done)
    assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)


async def test_a_locked_row_is_sent_by_the_same_dispatcher_once_it_is_free(
    world: World, inbox: Inbox
) -> None:
    sender = await world.sender()
    first, second = await world.schedule(sender, 2)
    async with running(world.settings):
        async with locked(world, [first]):
            await world.loader.load([sender], committed=True)
            await eventually(lambda: second in jobs_in(inbox.mails), SOON)
            more = await world.schedule(sender)
            await eventually(lambda: more[0] in jobs_in(inbox.mails), SOON)
        await eventually(world.done, SOON)
    assert set(jobs_in(inbox.mails).values()) == {1}


async def test_a_locked_row_in_sending_delays_no_renewal_and_no_outcome_of_others(
    world: World, inbox: Inbox
) -> None:
    jobs = await world.schedule(await world.sender(), 3)
    refs = [JobRef(job, 1) for job in jobs]
    lease = timedelta(seconds=60)
    statements = create_engine(
        world.settings, lookups_only=True, single_statements=True, lock_timeout=timedelta(seconds=1)
    )
    try:
        async with statements.connect() as connection:
            assert len(await mark_refs(connection, refs, lease)) == 3
            async with locked(world, jobs[:1]):
                renewed = await storage.renew_leases(connection, refs, lease)
                assert renewed.keys() == set(jobs[1:])
                assert await storage.still_sending(connection, refs[:1]) == {jobs[0]}
            assert len(await storage.renew_leases(connection, refs, lease)) == 3
            await world.sql("UPDATE email_jobs SET state = 1, lease_until = NULL, attempt = 0")
            assert await storage.still_sending(connection, refs) == set()
    finally:
        await statements.dispose()
    assert not inbox.mails


async def test_a_locked_row_delays_no_outcome_of_others_and_is_recorded_later(
    world: World, inbox: Inbox
) -> None:
    jobs = await world.schedule(await world.sender(), 3)
    claims = (await world.queues[0].claim(3)).claims
    assert [claim.job.job_id for claim in claims] == jobs
    lock_timeout = timedelta(milliseconds=500)
    engine = create_engine(world.settings, lookups_only=True, lock_timeout=lock_timeout)
    slots = Slots(3, unproven=3)
    await slots.take_free()
    settler = Settler(
        engine, engine, world.loader, slots, CooldownRules.from_settings(world.settings)
    )
    try:
        async with asyncio.timeout(SOON), asyncio.TaskGroup() as group:
            async with world.engine.begin() as connection:
                refs = [claim.job for claim in claims]
                marked = await mark_refs(connection, refs, timedelta(seconds=60))
            async with locked(world, jobs[:1]):
                for claim, job in zip(claims, marked, strict=True):
                    settler.settle(UnsentJob(claim, job))
                group.create_task(settler.run())
                await eventually(lambda: slots.in_flight == 1, SOON)
                assert await world.in_state(JobState.SCHEDULED) == set(jobs[1:])
            await eventually(lambda: slots.in_flight == 0, SOON)
            settler.close()
    finally:
        await engine.dispose()
    assert await world.in_state(JobState.SCHEDULED) == set(jobs)
    assert not inbox.mails


async def test_a_locked_row_of_a_mail_that_was_sent_delays_no_other_and_none_is_sent_twice(
    database_url: str, redis_url: str
) -> None:
    waits = [Wait(), Wait(), Wait()]
    async with ScriptedServer({"body": [(each, Succeed()) for each in waits]}) as server:
        # Shorter than the row is locked.
        settings = settings_of(options(database_url, redis_url, server.url, lease="3s"))
        async with World(settings) as world, running(settings):
            jobs: list[int] = []
            for n in range(len(waits)):
                jobs += await world.schedule(await world.sender())
                await eventually(lambda n=n: server.waiting["body"] == n + 1)  # type: ignore[misc]
            async with locked(world, jobs[:1]):
                waits[0].event.set()
                await eventually(partial(someone_waits, world))
                # Some end, and some begin, while the outcome of the first cannot be recorded.
                waits[1].event.set()
                waits[2].event.set()
                others = jobs[1:]
                for _ in range(3):
                    others += await world.schedule(await world.sender())
                await eventually(partial(all_sent, world, others), SOON)
                await eventually(partial(lease_ended, world, jobs[0]))
            await eventually(world.done)
            assert [len(await world.attempts(job)) for job in others] == [1] * len(others)
            sent = jobs_in(server.taken)
            assert {job: sent[job] for job in others} == dict.fromkeys(others, 1)


async def someone_waits(world: World) -> bool:
    """Return whether a statement waits for a lock of a row."""
    return bool(await world.sql("SELECT pid FROM pg_locks WHERE NOT granted"))


async def all_sent(world: World, jobs: Sequence[int]) -> bool:
    return set(jobs) <= await world.in_state(JobState.SENT)


async def lease_ended(world: World, job: int) -> bool:
    return bool(
        await world.sql("SELECT id FROM email_jobs WHERE id = %s AND lease_until < now()", job)
    )


async def deleted_batch(world: World, n: int) -> tuple[int, list[list[int]]]:
    sender = await world.sender(gap_ms=200, max_in_flight=1)
    return sender, [await world.schedule(sender, n) for _ in range(3)]


async def test_a_forced_deletion_ends_all_mail_at_once_and_survives_a_kill_while_rows_are_swept(
    world: World, redis_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    values = options(world.settings.database_url, redis_url, inbox.url)
    sender, batches = await deleted_batch(world, 8_000)
    other = await world.sender(gap_ms=200)
    kept = await world.schedule(other, 20)
    doomed = address_of(sender)
    async with running(world.settings):
        await eventually(lambda: len(inbox.mails) >= 4)
        async with locked(world, batches[1][4_000:4_001]):
            async with process(values, tmp_path / "1", "scheduler") as first:
                async with grpc.aio.insecure_channel(await first.address()) as channel:
                    calls = Scheduler(channel, world.settings, "")
                    await eventually(first.ready)
                    await calls.senders.DeleteSender(
                        DeleteSenderRequest(sender_id=str(sender), force=True)
                    )
                    begun = len([m for m in inbox.mails if m.mail_from == doomed])
                    counts = [await counted(calls, world, batch[0]) for batch in batches]
                    assert all(scheduled == 0 for scheduled, _ in counts), counts
                    assert sum(cancelled for _, cancelled in counts) >= 3 * 8_000 - begun - 1
                    answer = await calls.jobs.GetEmailJob(
                        GetEmailJobRequest(email_job_id=str(batches[1][4_000]))
                    )
                    assert answer.state == EmailJobState.EMAIL_JOB_STATE_CANCELLED
                # The rows of the other batches do not wait for the one that is locked.
                await eventually(partial(only_left, world, batches[1][4_000]), SOON)
                await first.kill()
            assert len(await world.in_state(JobState.SCHEDULED) & set(batches[1])) == 1
        async with process(values, tmp_path / "2", "scheduler"):
            await eventually(partial(swept, world), SOON)
        await eventually(lambda: set(kept) <= set(jobs_in(inbox.mails)), SOON)
    # At most the one in flight was still sent.
    assert len([m for m in inbox.mails if m.mail_from == doomed]) <= begun + 1
    all_jobs = {job for batch in batches for job in batch}
    sent = await world.in_state(JobState.SENT) & all_jobs
    assert await world.in_state(JobState.CANCELLED) == all_jobs - sent


async def counted(calls: Scheduler, world: World, job: int) -> tuple[int, int]:
    batch = str((await world.job(job)).batch_id)
    found: batch_pb2.Batch = await calls.batches.GetBatch(GetBatchRequest(batch_id=batch))
    return found.counts.scheduled_count, found.counts.cancelled_count


async def only_left(world: World, job: int) -> bool:
    rows = await world.sql(
        "SELECT email_jobs.id FROM email_jobs JOIN batch_cancellations USING (batch_id)"
        " WHERE state = 1 LIMIT 2"
    )
    return [row.id for row in rows] == [job]


async def swept(world: World) -> bool:
    async with world.engine.connect() as connection:
        return not await cancelling.unswept(connection)
