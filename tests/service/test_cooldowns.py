"""A sender whose account a mail server refuses: methods that show it and methods that end it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import email_job_service_pb2 as jobs_pb
from outbox.v1 import sender_pb2
from outbox.v1.email_job_pb2 import EMAIL_JOB_STATE_SENT, REPLY_CLASS_ACCOUNT
from outbox.v1.sender_service_pb2 import (
    DeleteSenderRequest,
    GetSenderRequest,
    ListSendersRequest,
    PauseSenderRequest,
    ResumeSenderRequest,
    UpdateSenderRequest,
)
from redis.asyncio import Redis
from structlog.testing import capture_logs

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.queue import Queue
from tests import cooldowns, dispatchers
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler, stored
from tests.smtp_servers import Say, ScriptedServer

MINUTE = timedelta(minutes=1)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0s") as running:
        yield running


@pytest_asyncio.fixture
async def queue(scheduler: Scheduler) -> AsyncIterator[Queue]:
    """The scheduler's only shard, complete."""
    engine, client = create_engine(scheduler.settings), connect(scheduler.settings)
    loader = HeadLoader(engine, open_queues(client, scheduler.settings), scheduler.settings)
    assert await loader.rebuild(loader.queues[0])
    yield loader.queues[0]
    await client.aclose()
    await engine.dispose()


def cool_down(scheduler: Scheduler, sender: sender_pb2.Sender, **changes: Any) -> None:
    cooldowns.begin(scheduler.execute, sender.sender_id, **changes)


async def get(scheduler: Scheduler, sender: sender_pb2.Sender) -> sender_pb2.Sender:
    request = GetSenderRequest(sender_id=sender.sender_id)
    return stored(await scheduler.senders.GetSender(request))


async def resume(scheduler: Scheduler, sender: sender_pb2.Sender) -> sender_pb2.Sender:
    return await scheduler.senders.ResumeSender(ResumeSenderRequest(sender_id=sender.sender_id))


async def update(scheduler: Scheduler, sender_id: str, **fields: Any) -> sender_pb2.Sender:
    return await scheduler.senders.UpdateSender(
        UpdateSenderRequest(
            sender=sender_pb2.Sender(sender_id=sender_id, **fields),
            update_mask=FieldMask(paths=list(fields)),
        )
    )


def rows(scheduler: Scheduler) -> list[int]:
    return [sender for (sender,) in scheduler.rows("SELECT sender_id FROM cooldowns ORDER BY 1")]


async def test_every_response_with_a_sender_shows_its_cooldown(scheduler: Scheduler) -> None:
    well, cooling = await scheduler.sender(), await scheduler.sender()
    cool_down(scheduler, cooling, probe_in=30 * MINUTE)
    found = await get(scheduler, cooling)
    now = datetime.now(UTC)
    since = now - found.cooldown.start_time.ToDatetime(UTC)
    probe = found.cooldown.next_probe_time.ToDatetime(UTC) - now
    assert since == pytest.approx(2 * MINUTE, abs=MINUTE)
    assert probe == pytest.approx(30 * MINUTE, abs=MINUTE)
    assert (found.cooldown.smtp_code, found.cooldown.enhanced_code) == (550, "5.4.5")
    assert (found.cooldown.message, found.cooldown.refusal_count) == (cooldowns.MESSAGE, 2)

    listed = await scheduler.senders.ListSenders(ListSendersRequest(user_id="ann"))
    assert [each.HasField("cooldown") for each in listed.senders] == [False, True]
    assert listed.senders[1] == found
    assert not (await get(scheduler, well)).HasField("cooldown")

    pause = PauseSenderRequest(sender_id=cooling.sender_id)
    for answer in (
        await update(scheduler, cooling.sender_id, display_name="News", hourly_limit=9),
        # An update without changes.
        await scheduler.senders.UpdateSender(
            UpdateSenderRequest(sender=sender_pb2.Sender(sender_id=cooling.sender_id))
        ),
        await scheduler.senders.PauseSender(pause),
        await scheduler.senders.PauseSender(pause),
    ):
        assert answer.cooldown == found.cooldown
    assert rows(scheduler) == [int(cooling.sender_id)]


@pytest.mark.parametrize("paused", [False, True])
async def test_a_resume_ends_the_cooldown_of_any_sender_and_logs_it(
    scheduler: Scheduler, *, paused: bool
) -> None:
    other, sender = await scheduler.sender(), await scheduler.sender()
    if paused:
        await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    cool_down(scheduler, other)
    cool_down(scheduler, sender)
    with capture_logs() as log:
        resumed = await resume(scheduler, sender)
        again = await resume(scheduler, sender)
    assert resumed.state == sender_pb2.SENDER_STATE_ACTIVE
    assert not resumed.HasField("cooldown")
    assert again == resumed
    assert rows(scheduler) == [int(other.sender_id)]
    [entry] = [each for each in log if each["event"] == "cooldown_ended"]
    assert (entry["sender"], entry["by"]) == (int(sender.sender_id), "ResumeSender")
    assert entry["reply"] == cooldowns.REPLY


async def test_after_a_resume_the_next_claim_finds_the_mail(
    scheduler: Scheduler, queue: Queue
) -> None:
    sender = await scheduler.sender()
    cool_down(scheduler, sender)
    await scheduler.schedule(sender)
    assert (await queue.claim(1)).claims == ()
    await resume(scheduler, sender)
    # No dispatcher runs: the answer comes after the load.
    [claim] = (await queue.claim(1)).claims
    assert not claim.probe


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({"smtp": sender_pb2.SmtpEndpoint(host="mail.example.com")}, True),
        # Back to the operator's relay.
        ({"smtp": None}, True),
        ({"hourly_limit": 5, "display_name": "News", "email": "b@example.com"}, False),
    ],
)
async def test_only_a_change_of_the_endpoint_ends_the_cooldown(
    scheduler: Scheduler, fields: dict[str, Any], *, ends: bool
) -> None:
    sender = await scheduler.sender(smtp=sender_pb2.SmtpEndpoint(host="old.example.com"))
    cool_down(scheduler, sender)
    with capture_logs() as log:
        updated = await update(scheduler, sender.sender_id, **fields)
    assert updated.HasField("cooldown") != ends
    assert rows(scheduler) == ([] if ends else [int(sender.sender_id)])
    ended = [each["by"] for each in log if each["event"] == "cooldown_ended"]
    assert ended == (["UpdateSender"] if ends else [])


async def test_a_deletion_ends_the_cooldown_only_if_it_succeeds(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender()
    await scheduler.schedule(sender)
    cool_down(scheduler, sender)
    request = DeleteSenderRequest(sender_id=sender.sender_id)
    assert (await refusal_of(scheduler.senders.DeleteSender(request))).reason == (
        "SENDER_HAS_OPEN_JOBS"
    )
    assert rows(scheduler) == [int(sender.sender_id)]
    await scheduler.senders.DeleteSender(
        DeleteSenderRequest(sender_id=sender.sender_id, force=True)
    )
    assert rows(scheduler) == []


async def test_another_user_neither_sees_nor_ends_a_cooldown(scheduler: Scheduler) -> None:
    sender = await scheduler.sender("ann")
    cool_down(scheduler, sender)
    name = {"sender_id": sender.sender_id, "user_id": "bob"}
    endpoint = sender_pb2.SmtpEndpoint(host="bob.example.com")
    changed = sender_pb2.Sender(sender_id=sender.sender_id, smtp=endpoint)
    for call in (
        scheduler.senders.GetSender(GetSenderRequest(**name)),
        scheduler.senders.ResumeSender(ResumeSenderRequest(**name)),
        scheduler.senders.UpdateSender(UpdateSenderRequest(sender=changed, user_id="bob")),
        scheduler.senders.DeleteSender(DeleteSenderRequest(**name, force=True)),
    ):
        refusal = await refusal_of(call)
        assert refusal.reason == "SENDER_NOT_FOUND"
        assert cooldowns.MESSAGE not in refusal.message
    assert rows(scheduler) == [int(sender.sender_id)]


async def test_a_batch_is_accepted_during_a_cooldown_and_the_answer_names_it(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender()
    cool_down(scheduler, sender, probe_in=30 * MINUTE)
    answer = await scheduler.schedule(sender)
    [notice] = [each for each in answer.notices if "refused" in each]
    assert cooldowns.REPLY in notice
    end = answer.forecast_end_time.ToDatetime(UTC) - datetime.now(UTC)
    assert end == pytest.approx(30 * MINUTE, abs=MINUTE)


async def test_a_cooldown_holds_mail_back_outlives_redis_and_a_resume_sends_at_once(
    scheduler: Scheduler, queue: Queue, database_url: str, redis_url: str, redis: Redis
) -> None:
    cooling, other = await scheduler.sender(), await scheduler.sender()
    cool_down(scheduler, cooling)
    async with ScriptedServer() as server:
        values = dispatchers.options(database_url, redis_url, server.url)
        async with dispatchers.running(dispatchers.settings_of(values)):
            await scheduler.schedule(cooling)
            await scheduler.schedule(other)
            await eventually(lambda: len(server.taken) == 1)
            assert await held_back(cooling, queue, redis)

            await redis.flushall()
            # A rebuild restores the sender, and mail is sent again.
            await eventually(lambda: held_back(cooling, queue, redis))
            await scheduler.schedule(other)
            await eventually(lambda: len(server.taken) == 2)
            [job] = scheduler.rows(
                "SELECT id, attempt FROM email_jobs WHERE sender_id = %s", int(cooling.sender_id)
            )
            assert job[1] == 0
            found = await explain(scheduler, job[0])
            assert found.wait_reason == jobs_pb.WAIT_REASON_COOLDOWN

            await resume(scheduler, cooling)
            await eventually(lambda: len(server.taken) == 3)
            found = await eventually_sent(scheduler, job[0])
            assert found.email_job.attempt_count == 1


async def explain(scheduler: Scheduler, job: int) -> jobs_pb.ExplainEmailJobResponse:
    return await scheduler.jobs.ExplainEmailJob(
        jobs_pb.ExplainEmailJobRequest(email_job_id=str(job))
    )


async def eventually_sent(scheduler: Scheduler, job: int) -> jobs_pb.ExplainEmailJobResponse:
    async def sent() -> bool:
        return (await explain(scheduler, job)).email_job.state == EMAIL_JOB_STATE_SENT

    await eventually(sent)
    return await explain(scheduler, job)


async def held_back(sender: sender_pb2.Sender, queue: Queue, redis: Redis) -> bool:
    """Return whether Redis has the sender and its next look is in half an hour or later."""
    look = await redis.zscore(queue.keys.ready, sender.sender_id)
    seconds, _ = await redis.time()
    return look is not None and look / 1000 > seconds + 1_800


async def test_a_quota_is_shown_with_the_servers_reply_and_a_resume_sends_the_waiting_mail(
    scheduler: Scheduler, database_url: str, redis_url: str
) -> None:
    sender = await scheduler.sender()
    async with ScriptedServer({"mail": Say(cooldowns.REPLY)}) as server:
        values = dispatchers.options(database_url, redis_url, server.url, cooldown="1h")
        async with dispatchers.running(dispatchers.settings_of(values)):
            await scheduler.schedule(sender)

            async def cooling() -> bool:
                return (await get(scheduler, sender)).HasField("cooldown")

            await eventually(cooling)
            shown = (await get(scheduler, sender)).cooldown
            assert (shown.smtp_code, shown.enhanced_code) == (550, "5.4.5")
            assert shown.refusal_count == 1
            job = scheduler.value("SELECT id FROM email_jobs")
            found = await explain(scheduler, job)
            assert found.wait_reason == jobs_pb.WAIT_REASON_COOLDOWN
            assert found.wait_end_time == shown.next_probe_time
            assert f"({cooldowns.REPLY}); the next probe is at" in found.explanation
            listed = await scheduler.jobs.ListAttempts(
                jobs_pb.ListAttemptsRequest(email_job_id=str(job))
            )
            assert [each.reply_class for each in listed.attempts] == [REPLY_CLASS_ACCOUNT]

            server.plan.clear()
            await resume(scheduler, sender)
            await eventually(lambda: len(server.taken) == 1)
            found = await eventually_sent(scheduler, job)
            assert found.email_job.attempt_count == 2
            assert not await cooling()


async def test_an_accepted_probe_ends_the_cooldown_for_every_reader(
    scheduler: Scheduler, database_url: str, redis_url: str
) -> None:
    sender = await scheduler.sender()
    cool_down(scheduler, sender, probe_in=timedelta(0))
    async with ScriptedServer() as server:
        values = dispatchers.options(database_url, redis_url, server.url)
        async with dispatchers.running(dispatchers.settings_of(values)):
            await scheduler.schedule(sender, "email\na@b.org\nc@d.org\n")
            await eventually(lambda: len(server.taken) == 2)

            async def over() -> bool:
                return not (await get(scheduler, sender)).HasField("cooldown")

            await eventually(over)
