"""PauseBatch, ResumeBatch, and pauses that end by themselves, with a dispatcher that sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1 import email_job_service_pb2 as jobs_pb
from outbox.v1.audit_service_pb2 import ListAuditEventsRequest
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    GetBatchRequest,
    ListBatchesRequest,
    PauseBatchRequest,
    ResumeBatchRequest,
    WatchBatchRequest,
)
from outbox.v1.sender_service_pb2 import (
    GetSenderRequest,
    ListSendersRequest,
    PauseSenderRequest,
    ResumeSenderRequest,
)

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import dispatcher as dispatcher_module
from outbox_server.shared.database.pauses import MOST_PAUSED_BATCHES
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World


@dataclass
class PausingStack:
    """A scheduler, and what it takes to run a dispatcher."""

    scheduler: Scheduler
    values: dict[str, str]
    inbox: Inbox
    world: World

    def sent(self) -> list[str]:
        """Return the recipients of the mails in the inbox, in the order of arrival."""
        return [recipient for mail in self.inbox.mails for recipient in mail.rcpt_tos]

    async def batch(self, sender: sender_pb2.Sender, *names: str, **fields: Any) -> batch_pb2.Batch:
        """Schedule a mail to each name."""
        csv = "email\n" + "".join(f"{name}@b.org\n" for name in names)
        return (await self.scheduler.schedule(sender, csv, **fields)).batch

    async def pause(self, batch: batch_pb2.Batch, **fields: Any) -> batch_pb2.Batch:
        request = PauseBatchRequest(batch_id=batch.batch_id, **fields)
        return await self.scheduler.batches.PauseBatch(request)

    async def resume(self, batch: batch_pb2.Batch, **fields: Any) -> batch_pb2.Batch:
        request = ResumeBatchRequest(batch_id=batch.batch_id, **fields)
        return await self.scheduler.batches.ResumeBatch(request)

    async def get(self, batch: batch_pb2.Batch) -> batch_pb2.Batch:
        return await self.scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch.batch_id))

    async def explain(self, batch: batch_pb2.Batch) -> jobs_pb.ExplainEmailJobResponse:
        """Explain the first waiting job of a batch."""
        job = self.scheduler.value(
            "SELECT min(id) FROM email_jobs WHERE batch_id = %s AND state = 1", int(batch.batch_id)
        )
        request = jobs_pb.ExplainEmailJobRequest(email_job_id=str(job))
        return await self.scheduler.jobs.ExplainEmailJob(request)


@pytest_asyncio.fixture
async def stack(
    database_url: str, redis_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PausingStack]:
    # The dispatcher acts only on computed times and on wake-ups.
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT", timedelta(hours=1))
    values = options(database_url, redis_url, inbox.url)
    async with (
        running_scheduler(database_url, redis_url, min_gap="0") as scheduler,
        World(settings_of(values)) as world,
    ):
        yield PausingStack(scheduler, values, inbox, world)


def soon(**delta: float) -> Timestamp:
    """Return a time from now on."""
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(**delta))
    return stamp


def time_of(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


async def test_a_paused_batch_waits_and_the_other_mail_of_its_sender_is_sent(
    stack: PausingStack,
) -> None:
    sender = await stack.scheduler.sender(min_gap=None)
    paused = await stack.batch(sender, "a1", "a2")
    answer = await stack.pause(paused, reason="a typo", identity="ann")
    assert answer.state == batch_pb2.BATCH_STATE_PAUSED
    assert answer.HasField("pause_time")
    assert not answer.HasField("pause_end_time")
    other = await stack.batch(sender, "b1", "b2")

    async with running(settings_of(stack.values)):
        await eventually(lambda: len(stack.sent()) == 2)
        assert sorted(stack.sent()) == ["b1@b.org", "b2@b.org"]
        found = await stack.explain(paused)
        assert found.wait_reason == jobs_pb.WAIT_REASON_BATCH_PAUSED
        assert not found.HasField("wait_end_time")
        assert not found.HasField("estimated_send_time")
        assert "ResumeBatch" in found.explanation
        assert not (await stack.get(paused)).HasField("forecast_end_time")
        # Nobody looks for the jobs of the batch: Redis has none of them.
        assert await stack.world.redis.keys("*due*") == []

        listed = ListBatchesRequest(user_id="ann", filter="state = PAUSED")
        page = await stack.scheduler.batches.ListBatches(listed)
        assert [batch.batch_id for batch in page.batches] == [paused.batch_id]

        resumed = await stack.resume(paused)
        assert resumed.state == batch_pb2.BATCH_STATE_ACTIVE
        assert not resumed.HasField("pause_time")
        await eventually(lambda: len(stack.sent()) == 4)
    assert (await stack.get(paused)).state == batch_pb2.BATCH_STATE_DONE
    assert (await stack.get(other)).state == batch_pb2.BATCH_STATE_DONE
    events = await stack.scheduler.audit.ListAuditEvents(ListAuditEventsRequest(user_id="ann"))
    [pause] = [event for event in events.audit_events if event.action == "PauseBatch"]
    assert (pause.reason, pause.identity) == ("a typo", "ann")
    assert (pause.before["paused"], pause.after["paused"]) == (False, True)


async def test_only_sends_in_flight_complete_after_a_pause(stack: PausingStack) -> None:
    body = asyncio.Event()
    async with ScriptedServer({"body": (Wait(body), Succeed())}) as server:
        values = {**stack.values, "smtp_url": server.url, "dispatcher_concurrency": "2"}
        sender = await stack.scheduler.sender()
        batch = await stack.batch(sender, *(f"a{number}" for number in range(100)))
        async with running(settings_of(values)):
            await eventually(lambda: server.waiting["body"] > 0)
            await stack.pause(batch)
            begun = (await stack.get(batch)).counts.sending_count
            assert 1 <= begun <= 2
            body.set()

            async def settled() -> bool:
                return not (await stack.get(batch)).counts.sending_count

            await eventually(settled)
            counts = (await stack.get(batch)).counts
            assert (counts.sent_count, counts.scheduled_count) == (begun, 100 - begun)
            await stack.resume(batch)
            await eventually(stack.world.done)
    await stack.world.check_counts()


async def test_a_pause_until_a_time_ends_by_itself_also_after_a_flushall(
    stack: PausingStack,
) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1")
    later = await stack.batch(sender, "b1", schedule_time=soon(hours=5))
    end = soon(hours=1)
    paused = await stack.pause(batch, pause_end_time=end)
    assert time_of(paused.pause_end_time) == time_of(end)
    async with running(settings_of(stack.values)) as dispatcher:
        await eventually(dispatcher.serving)
        end = soon(seconds=2)
        await stack.pause(batch, pause_end_time=end)
        await stack.world.redis.flushall()
        await eventually(lambda: len(stack.sent()) == 1)
    assert stack.inbox.mails[0].started_at >= time_of(end).timestamp()
    assert (await stack.get(later)).counts.scheduled_count == 1


async def test_nothing_is_sent_before_the_end_of_a_pause(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1", schedule_time=soon(milliseconds=400))
    end = soon(hours=1)
    await stack.pause(batch, pause_end_time=end)
    found = await stack.explain(batch)
    assert found.wait_reason == jobs_pb.WAIT_REASON_BATCH_PAUSED
    assert time_of(found.wait_end_time) == time_of(end)
    assert time_of(found.estimated_send_time) >= time_of(end)
    assert time_of((await stack.get(batch)).forecast_end_time) >= time_of(end)
    end = soon(milliseconds=1500)
    await stack.pause(batch, pause_end_time=end)
    async with running(settings_of(stack.values)):
        await eventually(lambda: len(stack.sent()) == 1)
    started = stack.scheduler.value("SELECT started_at FROM attempts")
    assert started >= time_of(end)
    assert (await stack.get(batch)).state == batch_pb2.BATCH_STATE_DONE


async def test_a_sender_is_paused_until_a_time(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1", schedule_time=soon(milliseconds=300))
    end = soon(hours=1)
    request = PauseSenderRequest(sender_id=sender.sender_id, pause_end_time=end)
    paused = await stack.scheduler.senders.PauseSender(request)
    assert paused.state == sender_pb2.SENDER_STATE_PAUSED
    assert time_of(paused.pause_end_time) == time_of(end)
    again = await stack.scheduler.senders.PauseSender(request)
    assert again.etag == paused.etag
    found = await stack.explain(batch)
    assert found.wait_reason == jobs_pb.WAIT_REASON_SENDER_PAUSED
    assert time_of(found.wait_end_time) == time_of(end)
    assert time_of((await stack.get(batch)).forecast_end_time) >= time_of(end)
    end = soon(milliseconds=1500)
    request = PauseSenderRequest(sender_id=sender.sender_id, pause_end_time=end)
    await stack.scheduler.senders.PauseSender(request)
    async with running(settings_of(stack.values)):
        await stack.world.redis.flushall()
        await eventually(lambda: len(stack.sent()) == 1)
    assert stack.scheduler.value("SELECT started_at FROM attempts") >= time_of(end)
    get = GetSenderRequest(sender_id=sender.sender_id)
    after = await stack.scheduler.senders.GetSender(get)
    assert after.state == sender_pb2.SENDER_STATE_ACTIVE
    assert not after.HasField("pause_end_time")
    listed = ListSendersRequest(user_id="ann", filter="state = ACTIVE")
    page = await stack.scheduler.senders.ListSenders(listed)
    assert [one.sender_id for one in page.senders] == [sender.sender_id]


async def test_a_resume_ends_the_pause_of_a_sender_before_its_time(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    pause = PauseSenderRequest(sender_id=sender.sender_id, pause_end_time=soon(hours=1))
    await stack.scheduler.senders.PauseSender(pause)
    await stack.batch(sender, "a1")
    async with running(settings_of(stack.values)) as dispatcher:
        await eventually(dispatcher.serving)
        assert stack.sent() == []
        resume = ResumeSenderRequest(sender_id=sender.sender_id)
        await stack.scheduler.senders.ResumeSender(resume)
        await eventually(lambda: len(stack.sent()) == 1)


async def test_a_paused_batch_can_be_cancelled_and_its_jobs_expire(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1", "a2")
    await stack.pause(batch)
    cancel = CancelBatchRequest(batch_id=batch.batch_id)
    cancelled = await stack.scheduler.batches.CancelBatch(cancel)
    assert cancelled.cancelled_count == 2
    assert cancelled.batch.state == batch_pb2.BATCH_STATE_CANCELLED
    assert not cancelled.batch.HasField("pause_time")
    for call in (stack.pause(batch), stack.resume(batch)):
        refused = await refusal_of(call)
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "BATCH_CANCELLED")
    expiring = await stack.batch(sender, "b1", expire_after=timedelta(seconds=1))
    await stack.pause(expiring, pause_end_time=soon(milliseconds=1200))
    async with running(settings_of(stack.values)):

        async def expired() -> bool:
            return (await stack.get(expiring)).counts.expired_count == 1

        await eventually(expired)
    assert stack.sent() == []


@pytest.mark.parametrize("delta", [timedelta(seconds=-5), timedelta(days=367)])
async def test_a_pause_ends_in_the_future_and_within_a_year(
    stack: PausingStack, delta: timedelta
) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1", schedule_time=soon(hours=1))
    until = soon(seconds=delta.total_seconds())
    pause = PauseSenderRequest(sender_id=sender.sender_id, pause_end_time=until)
    for call in (
        stack.pause(batch, pause_end_time=until),
        stack.scheduler.senders.PauseSender(pause),
    ):
        refused = await refusal_of(call)
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "PAUSE_END_TIME_INVALID")
        assert list(refused.violations) == ["pause_end_time"]
    assert (await stack.get(batch)).state == batch_pb2.BATCH_STATE_ACTIVE


async def test_pauses_resumes_and_a_cancel_at_once_leave_one_result(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, *(f"a{number}" for number in range(50)))
    async with running(settings_of(stack.values)):
        calls = [
            partial(stack.pause, batch),
            partial(stack.resume, batch),
            partial(stack.pause, batch, pause_end_time=soon(seconds=60)),
        ] * 5
        await asyncio.gather(*(call() for call in calls))
        cancel = CancelBatchRequest(batch_id=batch.batch_id)
        await stack.scheduler.batches.CancelBatch(cancel)

        async def ended() -> bool:
            counts = (await stack.get(batch)).counts
            return not counts.scheduled_count and not counts.sending_count

        await eventually(ended)
    counts = (await stack.get(batch)).counts
    assert counts.sent_count + counts.cancelled_count == 50
    assert len(stack.sent()) == counts.sent_count
    await stack.world.check_counts()


async def test_a_watch_shows_a_pause_and_its_end(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1", schedule_time=soon(hours=1))
    states = []
    async with asyncio.timeout(PATIENCE):
        watch = stack.scheduler.batches.WatchBatch(WatchBatchRequest(batch_id=batch.batch_id))
        async for change in watch:
            states.append(change.batch.state)
            if len(states) == 1:
                await stack.pause(batch, pause_end_time=soon(hours=1))
            if len(states) == 2:
                # It ends at once, but not before the watch has shown it.
                stack.scheduler.execute("UPDATE batches SET paused_until = now()")
            if len(states) == 3:
                break
        watch.cancel()
    active, paused = batch_pb2.BATCH_STATE_ACTIVE, batch_pb2.BATCH_STATE_PAUSED
    assert states == [active, paused, active]


async def test_etags_request_ids_and_repeated_calls(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1", schedule_time=soon(hours=1))
    paused = await stack.pause(batch, request_id="once", etag=(await stack.get(batch)).etag)
    assert await stack.pause(batch, request_id="once", etag="1.1") == paused
    assert (await stack.pause(batch)).etag == paused.etag
    refused = await refusal_of(stack.resume(batch, etag="0"))
    assert refused.reason == "ETAG_MISMATCH"
    await stack.resume(batch, etag=paused.etag)
    assert (await stack.resume(batch)).state == batch_pb2.BATCH_STATE_ACTIVE


async def test_a_sender_has_a_limited_number_of_paused_batches(stack: PausingStack) -> None:
    sender = await stack.scheduler.sender()
    batch = await stack.batch(sender, "a1", schedule_time=soon(hours=1))
    stack.scheduler.execute(
        "INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at, duplicates,"
        " mode, paused_at) SELECT 'ann', %s, 'r' || n, '', now(), 1, 1, now()"
        " FROM generate_series(1, %s) n",
        int(sender.sender_id),
        MOST_PAUSED_BATCHES,
    )
    refused = await refusal_of(stack.pause(batch))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "TOO_MANY_PAUSED_BATCHES")
