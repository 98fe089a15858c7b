"""PostgreSQL refuses statements: every kind of write fails at times, in every service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import grpc
import psycopg
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from outbox.v1 import (
    batch_service_pb2,
    email_job_service_pb2,
    sender_pb2,
    sender_service_pb2,
    suppression_pb2,
    suppression_service_pb2,
)
from structlog.testing import capture_logs

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import recovery as recovery_module
from outbox_server.services.dispatcher import settler as settler_module
from outbox_server.services.dispatcher.recovery import Recovery
from outbox_server.shared.database.models import Base
from outbox_server.shared.states import AttemptOutcome, JobState, SenderState
from tests.conftest import Stores
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, options_for, running_scheduler
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World, jobs_in

# SQLSTATEs, with the error that a caller gets.
CODES = {
    # Serialization failure, deadlock. Where possible, the scheduler repeats the transaction itself.
    "40001": ("ABORTED", "CONFLICT"),
    "40P01": ("ABORTED", "CONFLICT"),
    # Disk full, too many connections.
    "53100": ("RESOURCE_EXHAUSTED", "DATABASE_EXHAUSTED"),
    "53300": ("RESOURCE_EXHAUSTED", "DATABASE_EXHAUSTED"),
    # Statement time-out; a read-only standby.
    "57014": ("UNAVAILABLE", "DATABASE_UNAVAILABLE"),
    "25006": ("UNAVAILABLE", "DATABASE_UNAVAILABLE"),
}
# Without the events: triggers write them one by one, so no change of many rows would succeed.
_TABLES = [table.name for table in Base.metadata.sorted_tables if table.name != "job_events"]


@asynccontextmanager
async def failing_writes(
    url: str, state: str, every: int, *, only: tuple[str, str] | None = None
) -> AsyncIterator[Callable[[], Awaitable[dict[str, int]]]]:
    """Fail the first and one in n INSERTs, UPDATEs and DELETEs of each table; n is `every`.

    Which of them, a hash of their number decides: if every nth one failed, a statement that two
    loops take turns to make could fail for ever.

    With `only`, fail those of one table and one verb.

    Yield a function that returns how many of each were tried. A sequence counts them, because a
    rollback does not undo its count.

    Creating and dropping triggers takes a lock that waits for every open transaction, including
    those of the code under test. A blocking connection would stop the event loop that must end
    them.
    """
    create = """
        CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE n bigint; BEGIN
            n := nextval('fault_' || TG_TABLE_NAME || '_' || lower(TG_OP));
            IF n = 0 OR abs(hashint8(n)::bigint) % {every} = 0 THEN
                RAISE EXCEPTION 'a fault of the test' USING ERRCODE = '{state}';
            END IF;
            RETURN NULL;
        END $$;
    """
    every_pair = [(table, verb) for table in _TABLES for verb in ("insert", "update", "delete")]
    pairs = [only] if only else every_pair
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:

        async def run(statement: str) -> list[Any]:
            while True:
                try:
                    cursor = await connection.execute(statement.encode())
                except psycopg.errors.DeadlockDetected:
                    # It locks many tables, in another order than the code under test.
                    continue
                return await cursor.fetchall() if cursor.description else []

        async def tried() -> dict[str, int]:
            rows = await run(
                "SELECT sequencename, last_value FROM pg_sequences"
                " WHERE sequencename LIKE 'fault\\_%' AND last_value IS NOT NULL"
            )
            return {name.removeprefix("fault_"): int(n) for name, n in rows}

        await run(create.format(every=every, state=state))
        # All in one go: each statement of its own would be a transaction.
        await run(
            "; ".join(
                # The first statement fails: the sequence begins with 0.
                f"CREATE SEQUENCE fault_{table}_{verb} MINVALUE 0;"
                f"CREATE TRIGGER fault_{verb} BEFORE {verb} ON {table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION fault()"
                for table, verb in pairs
            )
        )
        try:
            yield tried
        finally:
            await run("DROP FUNCTION fault() CASCADE")
            await run("; ".join(f"DROP SEQUENCE fault_{table}_{verb}" for table, verb in pairs))


# A dispatcher treats the other codes in the same way.
@pytest.mark.parametrize("state", ["40001", "53100", "25006"])
async def test_a_failed_write_of_a_dispatcher_loses_and_duplicates_no_mail(
    database_url: str,
    redis_url: str,
    inbox: Inbox,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery_module, "GRACE", timedelta(milliseconds=50))
    settings = settings_of(options(database_url, redis_url, inbox.url, lease="20s"))
    async with World(settings) as world:
        senders = [await world.sender() for _ in range(3)]
        jobs = [job for each in senders for job in await world.schedule(each, 6)]
        # One job of a dispatcher that died, and a head that was never loaded.
        await world.sql(
            "UPDATE email_jobs SET state = 2, attempt = 1, lease_until = now() WHERE id = %s",
            jobs[-1],
        )
        jobs += await world.schedule(senders[0], load=False)
        await world.sql("UPDATE head_markers SET created_at = now() - interval '1 min'")
        # A turn writes to many tables, and succeeds only if no write fails.
        async with failing_writes(database_url, state, 12) as tried:
            async with running(settings), running(settings):
                await eventually(world.done)
                await eventually(lambda: no_markers(world))
            counted = await tried()

        assert {
            "email_jobs_update",
            "attempts_insert",
            "count_deltas_insert",
            "head_markers_insert",
            "head_markers_delete",
        } <= counted.keys()
        assert await world.states() == {JobState.SENT: len(jobs)}
        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        outcomes = await world.sql("SELECT outcome, count(*) AS n FROM attempts GROUP BY 1")
        assert {AttemptOutcome(row.outcome): row.n for row in outcomes} == {
            AttemptOutcome.SENT: len(jobs),
            AttemptOutcome.LEASE_EXPIRED: 1,
        }
        await world.check_counts()


async def test_a_mail_that_ended_during_a_postgresql_outage_past_its_lease_is_sent_once(
    database_url: str,
    redis_url: str,
    stores: Stores,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The recovery of leases runs long before the outcome is recorded.
    monkeypatch.setattr(settler_module, "_RETRY_S", 1.5)
    searching = note_searches(monkeypatch)
    held = Wait()
    async with ScriptedServer({"body": [(held, Succeed())]}) as server:
        settings = settings_of(options(database_url, redis_url, server.url, lease="6s"))
        async with World(settings) as world, running(settings), running(settings):
            # A dispatcher that began after the outage would not know of it.
            await eventually(lambda: len(searching) == 2)
            [job] = await world.schedule(await world.sender())
            await eventually(lambda: server.waiting["body"] == 1)
            try:
                with capture_logs() as log:
                    await stores.postgres.kill()
                    held.event.set()
                    await eventually(lambda: server.taken[0].answered)
                    await eventually(lambda: time.time() > server.taken[0].started_at + 6.2)
                    # Both notice the outage. With a usual lease, an outage past the end of a lease
                    # is longer than their pauses.
                    await eventually(
                        lambda: sum(line["event"] == "lease recovery failed" for line in log) == 2
                    )
            finally:
                await stores.postgres.start()
            await eventually(lambda: done(world))

            assert jobs_in(server.taken) == {job: 1}
            assert [each.outcome for each in await world.attempts(job)] == [AttemptOutcome.SENT]


def note_searches(monkeypatch: pytest.MonkeyPatch) -> set[Recovery]:
    """Return those whose first search for expired leases has ended, also later on."""
    found: set[Recovery] = set()
    search = Recovery.recover_leases

    async def noted(recovery: Recovery) -> timedelta:
        pause = await search(recovery)
        found.add(recovery)
        return pause

    monkeypatch.setattr(Recovery, "recover_leases", noted)
    return found


async def done(world: World) -> bool:
    """Return the result of World.done, or False while PostgreSQL is unreachable."""
    try:
        return await world.done()
    except psycopg.OperationalError:
        return False


async def no_markers(world: World) -> bool:
    return not await world.sql("SELECT * FROM head_markers")


@pytest.mark.parametrize("state", CODES)
async def test_a_failed_write_of_the_scheduler_is_reported_and_can_be_retried(
    database_url: str, redis_url: str, state: str
) -> None:
    seen = set()

    async def until_done(call: Callable[[], Awaitable[Any]]) -> Any:
        for _ in range(100):
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                seen.add(refusal(error))
        raise AssertionError("it never succeeds")

    async with (
        running_scheduler(database_url, redis_url) as scheduler,
        # Rare enough: a call writes to many tables, and each write may fail.
        failing_writes(database_url, state, 12),
    ):
        await every_change(scheduler, until_done)
    assert seen == {CODES[state]}


async def test_a_full_disk_after_a_commit_does_not_revoke_an_acceptance(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        # The only write after the commit deletes the marker of a loaded head; it fails each time.
        async with failing_writes(database_url, "53100", 1, only=("head_markers", "delete")):
            answer = await scheduler.schedule(sender)

        assert answer.batch.accepted_count == 1
        assert any("cannot be loaded" in notice for notice in answer.notices)
        assert scheduler.value("SELECT count(*) FROM head_markers") == 1


def refusal(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Return code and reason of an error, which must have a RetryInfo."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() > 0
    return error.code().name, info.reason


async def every_change(
    scheduler: Scheduler, do: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]
) -> None:
    """Make each kind of change by calling `do`; each change takes effect once."""
    sender = await do(scheduler.sender)
    batches = []
    for n in range(3):
        options = options_for(sender, request_id=f"once-{n}")
        csv = b"email\n" + b"".join(b"r%d@b.org\n" % i for i in range(50)) + b"bad\n"
        request = batch_service_pb2.ScheduleBatchRequest(options=options, csv=csv)
        answer = await do(partial(scheduler.batches.ScheduleBatch, request))
        batches.append(answer.batch.batch_id)
    assert scheduler.value("SELECT count(*) FROM email_jobs WHERE state = 1") == 150
    assert scheduler.value("SELECT count(*) FROM batch_rejections") == 3

    changed = sender_service_pb2.UpdateSenderRequest(
        sender=sender_pb2.Sender(sender_id=sender.sender_id, hourly_limit=7)
    )
    changed.update_mask.paths.append("hourly_limit")
    await do(partial(scheduler.senders.UpdateSender, changed))
    which = {"sender_id": sender.sender_id}
    pause = sender_service_pb2.PauseSenderRequest(**which)
    await do(partial(scheduler.senders.PauseSender, pause))
    assert scheduler.value("SELECT state FROM senders") == SenderState.PAUSED
    resume = sender_service_pb2.ResumeSenderRequest(**which)
    await do(partial(scheduler.senders.ResumeSender, resume))

    job = str(scheduler.value("SELECT min(id) FROM email_jobs WHERE batch_id = %s", batches[0]))
    cancel_job = email_job_service_pb2.CancelEmailJobRequest(email_job_id=job)
    await do(partial(scheduler.jobs.CancelEmailJob, cancel_job))
    cancel = batch_service_pb2.CancelBatchRequest(batch_id=batches[1])
    await do(partial(scheduler.batches.CancelBatch, cancel))
    suppress = suppression_service_pb2.CreateSuppressionRequest(
        user_id="ann", suppression=suppression_pb2.Suppression(email="r7@b.org")
    )
    await do(partial(scheduler.suppressions.CreateSuppression, suppress))
    # The rows of a cancelled batch are updated without a further call.
    expected = {JobState.SCHEDULED: 97, JobState.CANCELLED: 51, JobState.SUPPRESSED: 2}
    await eventually(lambda: states_of(scheduler) == expected)
    counted = scheduler.rows(
        "SELECT state, sum(n)::int FROM count_deltas GROUP BY 1 HAVING sum(n) <> 0"
    )
    assert dict(counted) == expected


def states_of(scheduler: Scheduler) -> dict[int, int]:
    return dict(scheduler.rows("SELECT state, count(*) FROM email_jobs GROUP BY 1"))
