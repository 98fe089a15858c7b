"""WatchBatch: first the current batch, then every change, and a final message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    WatchBatchRequest,
    WatchBatchResponse,
)
from outbox.v1.email_job_service_pb2 import CancelEmailJobRequest
from sqlalchemy import Engine, event

from outbox_server.shared.rpc.watching import Watch
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

CSV = "email\na@b.org\nc@d.org\n"


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


def watch(scheduler: Scheduler, batch: batch_pb2.Batch, **fields: Any) -> Any:
    return scheduler.batches.WatchBatch(WatchBatchRequest(batch_id=batch.batch_id, **fields))


async def read(stream: Any) -> WatchBatchResponse:
    async with asyncio.timeout(PATIENCE):
        update = await stream.read()
    assert isinstance(update, WatchBatchResponse), "the stream has ended"
    return update


async def rest(stream: Any) -> list[WatchBatchResponse]:
    """Return all messages until the stream ends."""
    found = []
    async with asyncio.timeout(PATIENCE):
        while isinstance(update := await stream.read(), WatchBatchResponse):
            found.append(update)
    return found


async def cancel_one(scheduler: Scheduler) -> None:
    job = scheduler.value("SELECT min(id) FROM email_jobs WHERE state = 1")
    await scheduler.jobs.CancelEmailJob(CancelEmailJobRequest(email_job_id=str(job)))


async def test_a_watch_begins_with_the_current_counts_and_ends_with_the_last_job(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    batch = (await scheduler.schedule(sender, CSV)).batch
    stream = watch(scheduler, batch)
    first = await read(stream)
    batch.ClearField("body")
    batch.ClearField("forecast_end_time")
    assert (first.batch, first.done) == (batch, False)
    await cancel_one(scheduler)
    second = await read(stream)
    assert (second.batch.counts.scheduled_count, second.batch.counts.cancelled_count) == (1, 1)
    assert second.resume_token != first.resume_token
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch.batch_id))
    last = await read(stream)
    assert last.done
    assert last.batch.state == batch_pb2.BATCH_STATE_CANCELLED
    assert await rest(stream) == []


async def test_a_job_that_is_being_sent_is_seen(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    stream = watch(scheduler, (await scheduler.schedule(sender, CSV)).batch)
    await read(stream)
    scheduler.execute(
        "UPDATE email_jobs SET state = 2, lease_until = now() + interval '1 min', attempt = 1"
        " WHERE id = (SELECT min(id) FROM email_jobs)"
    )
    counts = (await read(stream)).batch.counts
    assert (counts.scheduled_count, counts.sending_count) == (1, 1)
    stream.cancel()


async def test_a_watch_resumes_where_it_was_interrupted(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    batch = (await scheduler.schedule(sender, CSV)).batch
    broken = watch(scheduler, batch)
    token = (await read(broken)).resume_token
    broken.cancel()
    # Nothing has changed, so the first message is the next change.
    resumed = watch(scheduler, batch, resume_token=token)
    reading = asyncio.create_task(read(resumed))
    other = watch(scheduler, batch)
    assert (await read(other)).batch.counts.scheduled_count == 2
    assert not reading.done()
    await cancel_one(scheduler)
    assert (await reading).batch.counts.scheduled_count == 1
    # The batch has changed, so the new state is the first message.
    again = watch(scheduler, batch, resume_token=token)
    assert (await read(again)).batch.counts.scheduled_count == 1
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch.batch_id))
    done = [(await rest(stream))[-1] for stream in (resumed, other, again)]
    assert all(update.done for update in done)
    # The final message is always sent.
    late = watch(scheduler, batch, resume_token=done[0].resume_token)
    assert [update.done for update in await rest(late)] == [True]


async def test_a_watch_without_a_batch_is_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    batch, other = [(await scheduler.schedule(sender, CSV)).batch for _ in range(2)]
    stream = watch(scheduler, other)
    token = (await read(stream)).resume_token
    stream.cancel()
    for fields, reason in (
        ({"user_id": "bob"}, "BATCH_NOT_FOUND"),
        ({"resume_token": "x"}, "RESUME_TOKEN_INVALID"),
        ({"resume_token": token}, "RESUME_TOKEN_INVALID"),
    ):
        assert (await refusal_of(watch(scheduler, batch, **fields).read())).reason == reason


async def test_a_batch_cancelled_during_a_read_is_never_shown_as_done(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    batch = (await scheduler.schedule(sender, CSV)).batch
    stream = watch(scheduler, batch)
    await read(stream)

    cancelled = False

    def cancel(*arguments: Any) -> None:
        """Cancel the batch between the two statements that read it and its counts."""
        nonlocal cancelled
        if "FROM batches" in arguments[2] and not cancelled:
            cancelled = True
            scheduler.execute(
                "WITH cancelled AS (UPDATE batches SET state = 2, cancelled_at = now()"
                " RETURNING id, sender_id, cancelled_at) INSERT INTO batch_cancellations"
                " (batch_id, sender_id, cancelled_at) SELECT * FROM cancelled"
            )

    event.listen(Engine, "after_cursor_execute", cancel)
    try:
        states = [update.batch.state for update in await rest(stream)]
    finally:
        event.remove(Engine, "after_cursor_execute", cancel)
    assert states == [batch_pb2.BATCH_STATE_CANCELLED]


async def test_batches_are_read_only_while_watched_and_once_for_all_watchers() -> None:
    reads: list[set[int]] = []
    state = {1: "a", 2: "b"}

    async def look(keys: Any) -> dict[int, str]:
        reads.append(set(keys))
        return dict(state)

    stop = asyncio.Event()
    watched = Watch[str](look)
    async with asyncio.TaskGroup() as group:
        group.create_task(watched.run(stop))
        followers = [watched.follow(key) for key in (1, 2, 2)]
        seen = await asyncio.gather(*(anext(follower) for follower in followers))
        assert seen == ["a", "b", "b"]
        assert reads[-1] == {1, 2}
        state[2] = "c"
        assert await asyncio.gather(*(anext(each) for each in followers[1:])) == ["c", "c"]
        for follower in followers:
            await follower.aclose()
        before = len(reads)
        idle = watched.follow(3)
        waiting = group.create_task(idle.asend(None))
        await eventually(lambda: len(reads) > before)
        assert reads[-1] == {3}
        waiting.cancel()
        stop.set()
