"""The ids of senders, batches and jobs, also when two processes issue the same ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import grpc
import pytest
from outbox.v1 import batch_pb2
from outbox.v1.batch_service_pb2 import UploadBatchRequest
from outbox.v1.sender_service_pb2 import PauseSenderRequest
from redis.asyncio import Redis

from outbox_server.cli.options import to_timestamp
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.id_source import ID_TRIES, IdSource
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler

NOW_MS = 1_796_000_000_000
FIRST = NOW_MS << 21


class Script:
    """Random numbers that a test has chosen: these, and then 0 for ever."""

    def __init__(self, *numbers: int) -> None:
        self._left = list(numbers)
        self.asked = 0

    def __call__(self, _bits: int) -> int:
        self.asked += 1
        return self._left.pop(0) if self._left else 0


def scripted(script: Script) -> IdSource:
    """Return a source that issues FIRST and the ids after it, unless the script says otherwise."""
    return IdSource(lambda: NOW_MS, script)


@asynccontextmanager
async def two_schedulers(
    database_url: str, redis_url: str, script: Script
) -> AsyncIterator[tuple[Scheduler, Scheduler]]:
    """Run two schedulers of one database. The ids of both begin at FIRST."""
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(
                running_scheduler(database_url, redis_url, scripted(numbers))
            )
            for numbers in (Script(), script)
        ]
        yield one, other


def csv(count: int, name: str = "r") -> str:
    return "email\n" + "".join(f"{name}{i}@b.org\n" for i in range(count))


def rows_of(scheduler: Scheduler, batch: batch_pb2.Batch) -> list[int]:
    """Return the row numbers of a batch's jobs in the order of their ids."""
    rows = scheduler.rows(
        "SELECT row_number FROM email_jobs WHERE batch_id = %s ORDER BY id", int(batch.batch_id)
    )
    return [number for (number,) in rows]


def sequences(scheduler: Scheduler) -> dict[str, int]:
    return {
        table: scheduler.value(f"SELECT nextval('{table}_id_seq')")
        for table in ("senders", "batches", "email_jobs")
    }


async def test_no_id_that_a_caller_sees_comes_from_a_sequence(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        before = sequences(scheduler)
        sender = await scheduler.sender()
        batch = (await scheduler.schedule(sender, csv(3))).batch
        later = to_timestamp(datetime.now(UTC) + timedelta(hours=1))
        spread = (await scheduler.schedule(sender, csv(3), spread_until=later)).batch
        # The two values that `sequences` took itself.
        assert sequences(scheduler) == {table: value + 1 for table, value in before.items()}
        jobs = [job for (job,) in scheduler.rows("SELECT id FROM email_jobs ORDER BY id")]
        for one in (int(sender.sender_id), int(batch.batch_id), int(spread.batch_id), *jobs):
            assert 10**18 < one < 2**63
        assert rows_of(scheduler, batch) == rows_of(scheduler, spread) == [1, 2, 3]


async def test_the_ids_of_a_batch_do_not_tell_those_of_the_next(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        for _ in range(6):
            await scheduler.schedule(sender, csv(2))
        batches = scheduler.rows(
            "SELECT batch_id, min(id) FROM email_jobs GROUP BY batch_id ORDER BY batch_id"
        )
    for place in (0, 1):
        ids = [batch[place] for batch in batches]
        assert ids == sorted(ids)
        assert len({following - one for one, following in pairwise(ids)}) > 1


async def test_a_sender_a_batch_and_its_jobs_whose_ids_are_in_use_get_others(
    database_url: str, redis_url: str
) -> None:
    # The other scheduler takes FIRST for its sender, and then ids that the first one has used.
    script = Script(0, 0, 0, 0)
    async with two_schedulers(database_url, redis_url, script) as (one, other):
        sender = await one.sender()
        first = (await one.schedule(sender, csv(20))).batch
        assert (int(sender.sender_id), int(first.batch_id)) == (FIRST, FIRST + 1)

        theirs = await other.sender("bob")
        assert int(theirs.sender_id) == FIRST + 1
        assert script.asked == 2
        second = (await other.schedule(theirs, csv(20, "s"))).batch
        assert rows_of(one, first) == rows_of(other, second) == list(range(1, 21))
        assert script.asked > 4, "no id of the batch or of its jobs was in use"
        assert other.value("SELECT count(DISTINCT id) FROM email_jobs") == 40


async def test_a_batch_whose_id_is_in_use_is_not_taken_for_a_repeated_request(
    database_url: str, redis_url: str
) -> None:
    script = Script(1)
    async with two_schedulers(database_url, redis_url, script) as (one, other):
        sender = await one.sender()
        first = (await one.schedule(sender, csv(1))).batch
        answer = await other.schedule(sender, csv(1))
        assert not answer.replayed
        assert int(first.batch_id) == FIRST + 1
        # A group has tried FIRST + 1, and FIRST + 2 for the job.
        assert int(answer.batch.batch_id) == FIRST + 3
        again = await one.schedule(sender, csv(1), request_id=answer.batch.request_id)
        assert (again.replayed, again.batch.batch_id) == (True, answer.batch.batch_id)


async def test_a_spread_batch_whose_ids_are_in_use_gets_others(
    database_url: str, redis_url: str
) -> None:
    later = to_timestamp(datetime.now(UTC) + timedelta(hours=1))
    script = Script()
    async with two_schedulers(database_url, redis_url, script) as (one, other):
        sender = await one.sender()
        await one.schedule(sender, csv(20))
        batch = (await other.schedule(sender, csv(20, "s"), spread_until=later)).batch
        assert script.asked > 2, "no id was in use"
        assert batch.accepted_count == 20
        assert rows_of(other, batch) == list(range(1, 21))
        dues = other.rows(
            "SELECT scheduled_at FROM email_jobs WHERE batch_id = %s ORDER BY id",
            int(batch.batch_id),
        )
        assert dues == sorted(dues)


async def answer_of(call: Awaitable[Any], again: Callable[[], Awaitable[Any]]) -> Any:
    """Return the answer to a call, or to another one if PostgreSQL has ended a deadlock by it.

    A scheduler that waits for the ids of the other one may hold what that one needs next.
    """
    async with asyncio.timeout(PATIENCE):
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            return await again()


@pytest.mark.parametrize("ends", ["completed", "cancelled"])
async def test_ids_of_an_upload_that_is_still_open_are_not_used_twice(
    database_url: str, redis_url: str, ends: str
) -> None:
    # The jobs of the other scheduler begin among those of the upload, and then after them. It tries
    # ids for a group, which waits only a second, and then for the batch alone.
    script = Script(0, 0, 0, 0, 10_000)
    async with two_schedulers(database_url, redis_url, script) as (one, other):
        sender = await one.sender()
        open_end = asyncio.Event()

        async def parts() -> AsyncIterator[UploadBatchRequest]:
            yield UploadBatchRequest(options=options_for(sender))
            yield UploadBatchRequest(chunk=csv(5_000, "u").encode())
            await open_end.wait()

        upload = one.batches.UploadBatch(parts())
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        copied = (
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
            " AND query LIKE 'RELEASE%%'"
        )
        await eventually(lambda: one.value(copied) == 1)
        schedule = asyncio.create_task(other.schedule(sender, csv(20)))
        # It waits for a second at most, which a busy machine may not show.
        await eventually(lambda: one.value(waiting) > 0 or schedule.done())
        if ends == "completed":
            open_end.set()
            answer = await answer_of(upload, lambda: one.batches.UploadBatch(parts()))
            uploaded = answer.batch
            assert rows_of(one, uploaded) == list(range(1, 5_001))
        else:
            upload.cancel()
        answer = await answer_of(schedule, lambda: other.schedule(sender, csv(20)))
        batch = answer.batch
        assert rows_of(one, batch) == list(range(1, 21))
        open_end.set()


async def test_an_intake_that_finds_no_free_ids_stores_nothing_and_can_be_repeated(
    database_url: str, redis_url: str
) -> None:
    # The first scheduler uses the ids from FIRST + 2 on for its jobs.
    script = Script(0, 1)
    async with two_schedulers(database_url, redis_url, script) as (one, other):
        sender = await one.sender()
        # Another scheduler tries ids for a group first, and then for the batch alone.
        await one.schedule(sender, csv(2 + ID_TRIES))
        refusal = await refusal_of(other.schedule(sender, csv(1, "s"), request_id="again"))
        assert refusal.code == "INTERNAL"
        assert script.asked == 2 + 1 + ID_TRIES
        assert one.value("SELECT count(*) FROM batches") == 1
        answer = await other.schedule(sender, csv(1, "s"), request_id="again")
        assert (answer.replayed, answer.batch.accepted_count) == (False, 1)


async def test_the_release_before_this_one_inserts_beside_it(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        answer = await scheduler.schedule(sender, csv(2))
        # As that release does: without ids.
        scheduler.execute("INSERT INTO senders (user_id, email, hourly_limit) VALUES ('o', 'o', 1)")
        scheduler.execute(
            "INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)"
            " VALUES (%s, %s, now(), 3, 'old@b.org')",
            int(answer.batch.batch_id),
            int(sender.sender_id),
        )
        scheduler.execute("INSERT INTO head_markers (sender_id) VALUES (%s)", int(sender.sender_id))
        newest = scheduler.value("SELECT row_number FROM email_jobs ORDER BY id LIMIT 1")
        assert newest == 3, "an id of a sequence is above the new ones"


async def test_a_revision_of_a_sender_that_a_failover_has_lost_is_not_used_again(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        pause = PauseSenderRequest(sender_id=(await scheduler.sender()).sender_id)
        await scheduler.senders.PauseSender(pause)
        lost = scheduler.value("SELECT revision FROM senders")
        scheduler.execute("UPDATE senders SET revision = 1, state = 1")
        await scheduler.senders.PauseSender(pause)
        assert scheduler.value("SELECT revision FROM senders") > lost > 1


async def test_two_installations_with_equal_ids_send_mails_with_different_message_ids(
    new_database: Callable[[], str], redis_url: str, inbox: Inbox, redis: Redis
) -> None:
    ids = []
    for number in range(2):
        database_url = new_database()
        values = options(database_url, redis_url, inbox.url)
        async with (
            running_scheduler(
                database_url, redis_url, scripted(Script()), min_gap="0"
            ) as scheduler,
            running(settings_of(values)),
        ):
            await scheduler.schedule(await scheduler.sender(), csv(10, f"i{number}r"))
            expected = 10 * (number + 1)
            await eventually(lambda expected=expected: len(inbox.mails) == expected)  # type: ignore[misc]
            ids.append(scheduler.rows("SELECT id FROM email_jobs ORDER BY id"))
        await redis.flushall()
    assert ids[0] == ids[1]
    assert len({mail.message_id for mail in inbox.mails}) == 20
