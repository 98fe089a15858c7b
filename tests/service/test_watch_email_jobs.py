"""WatchEmailJobs: every change of a job as it is committed, from a position."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import email_job_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import CancelBatchRequest
from outbox.v1.email_job_event_pb2 import EmailJobEvent
from outbox.v1.email_job_event_service_pb2 import WatchEmailJobsRequest, WatchEmailJobsResponse
from outbox.v1.email_job_service_pb2 import CancelEmailJobRequest

from outbox_server.services.scheduler.forgetting import Forgetter
from outbox_server.shared.database.engine import create_engine, unix_ms
from outbox_server.shared.events.watching import EventFilter, EventWatch
from outbox_server.shared.rpc import page_tokens
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

CSV = "email\n" + "".join(f"{name}@b.org\n" for name in "abcd")
SCHEDULED, SENT, FAILED, CANCELLED = (
    email_job_pb2.EMAIL_JOB_STATE_SCHEDULED,
    email_job_pb2.EMAIL_JOB_STATE_SENT,
    email_job_pb2.EMAIL_JOB_STATE_FAILED,
    email_job_pb2.EMAIL_JOB_STATE_CANCELLED,
)
CLAIM = (
    "UPDATE email_jobs SET state = 2, attempt = attempt + 1, lease_until = now() + interval '1 min'"
    " WHERE id = %s"
)
SETTLE = "UPDATE email_jobs SET state = 3, lease_until = NULL, finished_at = now() WHERE id = %s"


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


class JobWatch:
    """A stream, and the last token that it gave."""

    def __init__(self, scheduler: Scheduler, user_id: str = "ann", **fields: Any) -> None:
        request = WatchEmailJobsRequest(user_id=user_id, **fields)
        self.stream = scheduler.events.WatchEmailJobs(request)
        self.token = ""

    async def message(self) -> WatchEmailJobsResponse:
        async with asyncio.timeout(PATIENCE):
            message = await self.stream.read()
        assert isinstance(message, WatchEmailJobsResponse), "the stream has ended"
        self.token = message.resume_token
        return message

    async def begun(self) -> JobWatch:
        """Return once the stream has its position."""
        assert not (await self.message()).email_job_events
        return self

    async def events(self, count: int) -> list[EmailJobEvent]:
        found: list[EmailJobEvent] = []
        while len(found) < count:
            found += (await self.message()).email_job_events
        assert len(found) == count, found
        return found


def job_ids(scheduler: Scheduler) -> list[int]:
    return [job for (job,) in scheduler.rows("SELECT id FROM email_jobs ORDER BY id")]


def at(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


async def test_every_change_is_delivered_with_what_it_says(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    watch = await JobWatch(scheduler).begun()
    batch = (await scheduler.schedule(sender, CSV)).batch
    (accepted,) = await watch.events(1)
    assert (accepted.email_job_id, accepted.batch_id) == ("", batch.batch_id)
    assert (accepted.state, accepted.job_count) == (SCHEDULED, 4)
    assert accepted.sender_id == sender.sender_id
    first, second, third, fourth = job_ids(scheduler)
    # A claim, its renewal and its return are no events.
    scheduler.execute(CLAIM, first)
    scheduler.execute("UPDATE email_jobs SET lease_until = now() WHERE id = %s", first)
    scheduler.execute(
        "UPDATE email_jobs SET state = 1, attempt = 0, lease_until = NULL WHERE id = %s", first
    )
    scheduler.execute(CLAIM, first)
    scheduler.execute(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted, smtp_code, enhanced_code, message, reply_class)"
        " VALUES (%s, 1, %s, now(), now(), 3, true, 550, '5.1.1', 'unknown', 9)",
        first,
        int(sender.sender_id),
    )
    scheduler.execute(
        "UPDATE email_jobs SET state = 4, lease_until = NULL, finished_at = now() WHERE id = %s",
        first,
    )
    (failed,) = await watch.events(1)
    assert (failed.email_job_id, failed.state, failed.attempt_count) == (str(first), FAILED, 1)
    assert failed.last_outcome == email_job_pb2.ATTEMPT_OUTCOME_PERMANENT_FAILURE
    assert failed.reply_class == email_job_pb2.REPLY_CLASS_RECIPIENT
    assert (failed.smtp_code, failed.enhanced_code, failed.last_error) == (550, "5.1.1", "unknown")
    # A retry and another due time are events.
    scheduler.execute(CLAIM, second)
    scheduler.execute(
        "UPDATE email_jobs SET state = 1, lease_until = NULL, scheduled_at = '2030-01-01Z'"
        " WHERE id = %s",
        second,
    )
    scheduler.execute("UPDATE email_jobs SET scheduled_at = '2031-01-01Z' WHERE id = %s", third)
    retry, moved = await watch.events(2)
    assert (retry.email_job_id, retry.state, retry.attempt_count) == (str(second), SCHEDULED, 1)
    assert retry.schedule_time.ToDatetime(UTC) == datetime(2030, 1, 1, tzinfo=UTC)
    assert moved.schedule_time.ToDatetime(UTC) == datetime(2031, 1, 1, tzinfo=UTC)
    await scheduler.jobs.CancelEmailJob(CancelEmailJobRequest(email_job_id=str(fourth)))
    (cancelled,) = await watch.events(1)
    assert (cancelled.email_job_id, cancelled.state) == (str(fourth), CANCELLED)
    assert cancelled.HasField("schedule_time") is False
    # All others end with their batch.
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch.batch_id))
    rest = await watch.events(2)
    assert {event.email_job_id for event in rest} == {str(second), str(third)}


async def test_a_watch_has_only_the_events_of_its_filters_and_user(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    hers = (await scheduler.schedule(sender, CSV)).batch
    other = (await scheduler.schedule(sender, CSV)).batch
    bobs = await scheduler.sender("bob")
    watches = {
        "batch": await JobWatch(scheduler, batch_id=hers.batch_id).begun(),
        "states": await JobWatch(scheduler, states=[SENT]).begun(),
        "bob": await JobWatch(scheduler, "bob").begun(),
    }
    await scheduler.schedule(bobs, CSV)
    first, *_ = job_ids(scheduler)
    scheduler.execute(CLAIM, first)
    scheduler.execute(SETTLE, first)
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=other.batch_id))
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=hers.batch_id))
    found = await watches["batch"].events(4)
    assert [event.state for event in found] == [SENT, *[CANCELLED] * 3]
    (sent,) = await watches["states"].events(1)
    assert sent.email_job_id == str(first)
    (accepted,) = await watches["bob"].events(1)
    assert accepted.user_id == "bob"
    for wrong in ({"batch_id": hers.batch_id}, {"sender_id": sender.sender_id}):
        refusal = await refusal_of(JobWatch(scheduler, "bob", **wrong).stream.read())
        assert refusal.code == "NOT_FOUND"
    assert (await refusal_of(JobWatch(scheduler, "").stream.read())).reason == "USER_ID_REQUIRED"


async def test_an_event_that_is_committed_late_is_not_skipped(
    scheduler: Scheduler, sender: sender_pb2.Sender, database_url: str
) -> None:
    await scheduler.schedule(sender, CSV)
    first, second, *_ = job_ids(scheduler)
    watch = await JobWatch(scheduler).begun()
    scheduler.execute(CLAIM, first)
    scheduler.execute(CLAIM, second)
    async with await psycopg.AsyncConnection.connect(database_url) as slow:
        # The smaller id is drawn first and committed last.
        await slow.execute(SETTLE, [first])
        scheduler.execute(SETTLE, second)
        reading = asyncio.create_task(watch.message())
        done, _ = await asyncio.wait([reading], timeout=1)
        assert not done, "an event was delivered before one with a smaller id was decided"
        await slow.commit()
    found = (await reading).email_job_events
    assert [event.email_job_id for event in found] == [str(first), str(second)]


async def test_a_watch_resumes_after_the_events_that_were_processed(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    before = await JobWatch(scheduler).begun()
    await scheduler.schedule(sender, CSV)
    await before.events(1)
    token = before.token
    before.stream.cancel()
    first, second, *_ = job_ids(scheduler)
    for job in (first, second):
        scheduler.execute(CLAIM, job)
        scheduler.execute(SETTLE, job)
    resumed = await JobWatch(scheduler, resume_token=token).begun()
    assert [event.email_job_id for event in await resumed.events(2)] == [str(first), str(second)]
    # Nothing is left after the last token.
    again = await JobWatch(scheduler, resume_token=resumed.token).begun()
    scheduler.execute("UPDATE email_jobs SET scheduled_at = '2031-01-01Z' WHERE state = 1")
    assert len(await again.events(2)) == 2
    # From a time: everything, because one minute before it belongs to it.
    whole = await JobWatch(scheduler, start_time=at(datetime.now(UTC))).begun()
    assert len(await whole.events(5)) == 5
    refusal = await refusal_of(JobWatch(scheduler, "bob", resume_token=token).stream.read())
    assert refusal.reason == "RESUME_TOKEN_INVALID"
    refusal = await refusal_of(JobWatch(scheduler, resume_token="x").stream.read())
    assert refusal.reason == "RESUME_TOKEN_INVALID"


async def test_a_start_time_finds_its_place_among_many_events(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    scheduler.execute(
        "INSERT INTO job_events (id, user_id, sender_id, batch_id, email_job_id, state, attempt,"
        " happened_at) SELECT n * 3, 'ann', %s, 1, n, 6, 0, now() - interval '2000 min'"
        " + n * interval '1 min' FROM generate_series(1, 1900) n",
        int(sender.sender_id),
    )
    scheduler.execute("SELECT setval('job_events_id_seq', 5700)")
    start = datetime.now(UTC) - timedelta(minutes=1000)
    watch = await JobWatch(scheduler, start_time=at(start)).begun()
    found = (await watch.message()).email_job_events
    assert 999 <= int(found[0].email_job_id) <= 1000
    # More than one page, without a gap.
    ids = [int(event.email_job_id) for event in found]
    while len(ids) < 900:
        ids += [int(event.email_job_id) for event in (await watch.message()).email_job_events]
    assert ids == list(range(ids[0], 1901))


async def test_a_token_of_events_that_a_restore_lost_is_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    watch = await JobWatch(scheduler).begun()
    await scheduler.schedule(sender, CSV)
    for _ in range(3):
        scheduler.execute(
            "UPDATE email_jobs SET scheduled_at = scheduled_at + interval '1 day'"
            " WHERE id = (SELECT min(id) FROM email_jobs)"
        )
    await watch.events(4)
    # A restore to the time before the events: the sequence has stepped back.
    scheduler.execute("DELETE FROM job_events")
    scheduler.execute("SELECT setval('job_events_id_seq', 1, false)")
    refusal = await refusal_of(watch.stream.read())
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RESUME_TOKEN_EXPIRED")
    refusal = await refusal_of(JobWatch(scheduler, resume_token=watch.token).stream.read())
    assert refusal.reason == "RESUME_TOKEN_EXPIRED"
    # Later, the same ids belong to other events.
    scheduler.execute(
        "INSERT INTO job_events (user_id, sender_id, batch_id, state, attempt, happened_at)"
        " SELECT 'ann', 1, 1, 1, 0, now() + interval '10 s' FROM generate_series(1, 50)"
    )
    refusal = await refusal_of(JobWatch(scheduler, resume_token=watch.token).stream.read())
    assert refusal.reason == "RESUME_TOKEN_EXPIRED"


async def test_old_events_are_removed_and_a_token_from_before_is_refused(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, event_retention="1h") as scheduler:
        sender = await scheduler.sender()
        watch = await JobWatch(scheduler).begun()
        await scheduler.schedule(sender, CSV)
        await watch.events(1)
        scheduler.execute("UPDATE job_events SET happened_at = now() - interval '3 h'")
        await scheduler.schedule(sender, CSV)
        engine = create_engine(scheduler.settings)
        forgetter = Forgetter(engine, None, event_retention=scheduler.settings.event_retention)

        async def removed() -> bool:
            # The scheduler may hold the lock in its own first turn.
            await forgetter.forget()
            return bool(scheduler.value("SELECT count(*) FROM job_events") == 1)

        await eventually(removed)
        await engine.dispose()
        resumed = await JobWatch(scheduler, resume_token=watch.token).begun()
        assert len(await resumed.events(1)) == 1
        # A token of two hours ago: events after it may have been removed.
        stamp = unix_ms(datetime.now(UTC) - timedelta(hours=2))
        stream = page_tokens.digest_filters("ann")
        stale = page_tokens.encode("events of jobs", stream, (f"1.{stamp}",))
        refusal = await refusal_of(JobWatch(scheduler, resume_token=stale).stream.read())
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RESUME_TOKEN_EXPIRED")
        # From the same time on: begins with the oldest event that is kept.
        start = at(datetime.now(UTC) - timedelta(days=9))
        kept = await JobWatch(scheduler, start_time=start).begun()
        assert len(await kept.events(1)) == 1


async def test_a_quiet_watch_gets_new_positions(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    engine = create_engine(scheduler.settings)
    watch = EventWatch(
        engine,
        timedelta(days=7),
        pause=timedelta(milliseconds=20),
        heartbeat=timedelta(milliseconds=50),
    )
    stop = asyncio.Event()
    running = asyncio.create_task(watch.run(stop))
    pages = watch.follow(EventFilter("nobody"), None)
    async with asyncio.timeout(PATIENCE):
        first = (await anext(pages)).position
        await scheduler.schedule(sender, CSV)
        later = (await anext(pages)).position
        while later.event_id == first.event_id:
            later = (await anext(pages)).position
    assert later.at > first.at
    await pages.aclose()
    stop.set()
    await running
    await engine.dispose()
