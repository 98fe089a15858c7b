"""ForecastBatch on real servers, compared with what a dispatcher then does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import pytest
import pytest_asyncio
from outbox.v1 import batch_pb2, sender_pb2, stats_service_pb2_grpc
from outbox.v1 import stats_service_pb2 as proto
from outbox.v1.batch_service_pb2 import GetBatchRequest
from outbox.v1.hold_pb2 import HeldFilter
from outbox.v1.hold_service_pb2 import BeginHoldRequest, ReleaseHeldJobsRequest
from outbox.v1.sender_service_pb2 import PauseSenderRequest

from outbox_server.cli.options import to_duration, to_timestamp
from outbox_server.services.stats.server import serve as serve_stats
from outbox_server.shared.states import AttemptOutcome
from tests import cooldowns
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler


@dataclass
class ForecastStack:
    """A scheduler and a stats service over one database."""

    scheduler: Scheduler
    stub: stats_service_pb2_grpc.StatsServiceAsyncStub

    async def forecast(self, **request: Any) -> proto.ForecastBatchResponse:
        return await self.stub.ForecastBatch(proto.ForecastBatchRequest(**request))

    async def plan(
        self, sender: sender_pb2.Sender, count: int, **options: Any
    ) -> proto.ForecastBatchResponse:
        options = {"sender_id": sender.sender_id, **options}
        planned = proto.PlannedBatch(
            options=batch_pb2.BatchOptions(**options), recipient_count=count
        )
        return await self.forecast(planned_batch=planned)


async def start(
    stack: AsyncExitStack, database_url: str, redis_url: str, **settings: Any
) -> ForecastStack:
    scheduler = await stack.enter_async_context(
        running_scheduler(database_url, redis_url, stats_listen="127.0.0.1:0", **settings)
    )
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve_stats(scheduler.settings, stop, ready=port.set_result))

    async def end() -> None:
        stop.set()
        await task

    stack.push_async_callback(end)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{await port}")
    stack.push_async_callback(channel.close)
    return ForecastStack(scheduler, stats_service_pb2_grpc.StatsServiceStub(channel))


@pytest_asyncio.fixture
async def stack(database_url: str, redis_url: str) -> AsyncIterator[ForecastStack]:
    async with AsyncExitStack() as exits:
        yield await start(exits, database_url, redis_url)


def csv_of(count: int) -> str:
    return "email\n" + "".join(f"u{number}@b.org\n" for number in range(count))


def since(time: Any, batch: batch_pb2.Batch) -> float:
    """Return the number of seconds from the acceptance of the batch to `time`."""
    took = time.ToDatetime(UTC) - batch.create_time.ToDatetime(UTC)
    return float(took.total_seconds())


async def test_a_batch_is_forecast_by_the_gap_and_by_the_window(stack: ForecastStack) -> None:
    fast = await stack.scheduler.sender(hourly_limit=5_000)
    batch = (await stack.scheduler.schedule(fast, csv_of(31))).batch
    found = await stack.forecast(batch_id=batch.batch_id)
    assert (found.job_count, found.ahead_count, found.expiring_count) == (31, 0, 0)
    assert found.binding_limit == sender_pb2.BINDING_LIMIT_MIN_GAP
    assert since(found.end_time, batch) == pytest.approx(60, abs=5)
    assert since(found.first_send_time, batch) == pytest.approx(0, abs=5)
    assert "gap binds" in found.explanation

    slow = await stack.scheduler.sender(hourly_limit=10)
    batch = (await stack.scheduler.schedule(slow, csv_of(31))).batch
    found = await stack.forecast(batch_id=batch.batch_id)
    assert found.binding_limit == sender_pb2.BINDING_LIMIT_HOURLY_LIMIT
    assert since(found.end_time, batch) == pytest.approx(3 * 3_600, abs=5)


async def test_a_forecast_of_held_mail_says_that_it_is_held(stack: ForecastStack) -> None:
    scheduler = stack.scheduler
    sender, other = await scheduler.sender(), await scheduler.sender()
    batches = [(await scheduler.schedule(sender)).batch.batch_id for _ in range(2)]
    await scheduler.holds.BeginHold(BeginHoldRequest())
    new = await scheduler.schedule(other)
    large = await scheduler.schedule(other, csv_of(2_000))
    for accepted in (new, large):
        assert not accepted.HasField("forecast_end_time")
        assert any("is held" in notice for notice in accepted.notices)
    found = await stack.forecast(batch_id=batches[0])
    assert (found.held, found.job_count, "is held" in found.explanation) == (True, 1, True)
    assert not found.HasField("first_send_time")
    assert not found.HasField("end_time")
    assert (await stack.plan(sender, 10)).held
    shown = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=batches[0]))
    assert not shown.HasField("forecast_end_time")

    released = HeldFilter(batch_id=batches[0])
    await scheduler.holds.ReleaseHeldJobs(ReleaseHeldJobsRequest(filter=released))
    found = await stack.forecast(batch_id=batches[0])
    assert (found.held, found.HasField("end_time")) == (False, True)
    assert (await stack.forecast(batch_id=batches[1])).held
    assert (await stack.plan(sender, 10)).held
    released = HeldFilter(sender_id=sender.sender_id)
    await scheduler.holds.ReleaseHeldJobs(ReleaseHeldJobsRequest(filter=released))
    assert not (await stack.forecast(batch_id=batches[1])).held
    assert not (await stack.plan(sender, 10)).held
    assert (await stack.plan(other, 10)).held
    await scheduler.holds.ReleaseHeldJobs(ReleaseHeldJobsRequest(all=True))
    assert not (await stack.plan(other, 10)).held


async def test_only_mail_that_is_due_earlier_counts_in_a_forecast(stack: ForecastStack) -> None:
    sender = await stack.scheduler.sender(hourly_limit=5_000)
    await stack.scheduler.schedule(sender, csv_of(10))
    later = to_timestamp(datetime.now(UTC) + timedelta(hours=1))
    batch = (await stack.scheduler.schedule(sender, csv_of(5), schedule_time=later)).batch
    await stack.scheduler.schedule(
        sender, csv_of(1_000), schedule_time=to_timestamp(datetime.now(UTC) + timedelta(hours=2))
    )
    found = await stack.forecast(batch_id=batch.batch_id)
    assert found.ahead_count == 10
    assert since(found.end_time, batch) == pytest.approx(3_608, abs=5)


async def test_a_planned_batch_has_the_same_forecast_as_the_real_one(stack: ForecastStack) -> None:
    sender = await stack.scheduler.sender(hourly_limit=100)
    await stack.scheduler.schedule(sender, csv_of(50))
    begin = to_timestamp(datetime.now(UTC) + timedelta(minutes=5))
    for options in (
        {},
        {"schedule_time": begin},
        {"schedule_time": begin, "spacing": to_duration(timedelta(seconds=10))},
        {"spread_until": to_timestamp(datetime.now(UTC) + timedelta(hours=2))},
    ):
        planned = await stack.plan(sender, 120, **options)
        rows = stack.scheduler.value("SELECT count(*) FROM email_jobs")
        batch = (await stack.scheduler.schedule(sender, csv_of(120), **options)).batch
        real = await stack.forecast(batch_id=batch.batch_id)
        assert stack.scheduler.value("SELECT count(*) FROM email_jobs") == rows + 120
        difference = real.end_time.ToDatetime() - planned.end_time.ToDatetime()
        assert abs(difference) < timedelta(seconds=5)
        assert (real.job_count, real.ahead_count) == (planned.job_count, planned.ahead_count)
        assert real.binding_limit == planned.binding_limit


async def test_a_spread_batch_ends_on_time_and_late_mail_expires(stack: ForecastStack) -> None:
    sender = await stack.scheduler.sender(hourly_limit=100)
    until = datetime.now(UTC) + timedelta(hours=1)
    found = await stack.plan(sender, 61, spread_until=to_timestamp(until))
    assert abs(found.end_time.ToDatetime(UTC) - until) < timedelta(seconds=2)
    assert found.binding_limit == sender_pb2.BINDING_LIMIT_SPACING
    found = await stack.plan(sender, 150, expire_after=to_duration(timedelta(minutes=10)))
    assert found.expiring_count == 50
    assert "50 expire" in found.explanation


async def test_a_forecast_keeps_the_expiry_of_a_retried_job(stack: ForecastStack) -> None:
    sender = await stack.scheduler.sender()
    in_time = to_duration(timedelta(seconds=100))
    batch = (await stack.scheduler.schedule(sender, csv_of(3), expire_after=in_time)).batch
    # As after a settlement that makes two of them wait for a retry.
    for row, backoff in ((1, 50), (2, 150)):
        stack.scheduler.execute(
            "UPDATE email_jobs SET scheduled_at = scheduled_at + %s * interval '1 s'"
            " WHERE row_number = %s",
            backoff,
            row,
        )
    found = await stack.forecast(batch_id=batch.batch_id)
    assert (found.job_count, found.expiring_count) == (3, 1)
    assert since(found.end_time, batch) == pytest.approx(50, abs=5)


async def test_many_waiting_jobs_are_forecast_by_their_batches(stack: ForecastStack) -> None:
    sender = await stack.scheduler.sender(hourly_limit=1_000)
    first = (await stack.scheduler.schedule(sender, csv_of(15_000))).batch
    second = (
        await stack.scheduler.schedule(
            sender, csv_of(15_000), spacing=to_duration(timedelta(seconds=10))
        )
    ).batch
    found = await stack.forecast(batch_id=first.batch_id)
    hour = 3_600
    # The second batch's jobs fall due between the sends of the first, whose jobs are all due now.
    assert since(found.end_time, first) == pytest.approx(14 * hour + 2_000, abs=60)
    found = await stack.forecast(batch_id=second.batch_id)
    assert found.job_count == found.ahead_count == 15_000
    assert since(found.end_time, second) == pytest.approx(15_000 * 10, abs=60)


async def test_a_paused_sender_has_no_forecast_end_and_the_answer_has_the_reason(
    stack: ForecastStack,
) -> None:
    sender = await stack.scheduler.sender()
    batch = (await stack.scheduler.schedule(sender, csv_of(3))).batch
    await stack.scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    found = await stack.forecast(batch_id=batch.batch_id)
    assert not found.HasField("end_time")
    assert "paused" in found.explanation


async def test_nothing_is_forecast_before_the_next_probe_of_a_cooldown(
    stack: ForecastStack,
) -> None:
    sender = await stack.scheduler.sender()
    batch = (await stack.scheduler.schedule(sender, csv_of(3))).batch
    execute = stack.scheduler.execute
    cooldowns.begin(execute, sender.sender_id, probe_in=timedelta(hours=1))
    # The same holds for a dry run: one more mail comes after the three.
    for found, mails, seconds in (
        (await stack.forecast(batch_id=batch.batch_id), 3, 3_604),
        (await stack.plan(sender, 1), 1, 3_606),
    ):
        assert since(found.end_time, batch) == pytest.approx(seconds, abs=8)
        assert found.binding_limit == sender_pb2.BINDING_LIMIT_COOLDOWN
        assert found.cooldown.message == cooldowns.MESSAGE
        assert found.cooldown.refusal_count == 2
        last = "1 mail" if mails == 1 else f"{mails} mails"
        assert f"({cooldowns.REPLY}); the next probe is at" in found.explanation
        assert f". If the probe is accepted: the last of {last} will be sent" in found.explanation
        assert found.explanation.endswith("; the sender's cooldown binds.")
    first = (await stack.forecast(batch_id=batch.batch_id)).first_send_time
    assert first == found.cooldown.next_probe_time

    add_attempt(stack.scheduler, sender, AttemptOutcome.CONNECTION_FAILURE, "refused")
    found = await stack.forecast(batch_id=batch.batch_id)
    assert "If the probe is accepted and the endpoint works again: the" in found.explanation
    # The cooldown is over: the forecast is the same as before.
    execute("DELETE FROM cooldowns")
    found = await stack.forecast(batch_id=batch.batch_id)
    assert not found.HasField("cooldown")
    assert since(found.end_time, batch) == pytest.approx(4, abs=8)


async def test_mail_that_expires_during_a_cooldown_is_forecast_to_expire(
    stack: ForecastStack,
) -> None:
    sender = await stack.scheduler.sender()
    cooldowns.begin(stack.scheduler.execute, sender.sender_id, probe_in=timedelta(hours=1))
    found = await stack.plan(sender, 5, expire_after=to_duration(timedelta(minutes=30)))
    assert found.expiring_count == 5
    assert cooldowns.REPLY in found.explanation
    assert found.explanation.endswith("All 5 mails expire before the limits allow to send any.")


async def test_a_forecast_shows_that_the_last_attempt_failed_to_reach_the_endpoint(
    stack: ForecastStack,
) -> None:
    sender = await stack.scheduler.sender()
    batch = (await stack.scheduler.schedule(sender, csv_of(3))).batch
    trouble = "Connection refused"

    async def explanation() -> str:
        planned = await stack.plan(sender, 5)
        found = await stack.forecast(batch_id=batch.batch_id)
        assert (trouble in planned.explanation) == (trouble in found.explanation)
        return found.explanation

    assert trouble not in await explanation()
    add_attempt(stack.scheduler, sender, AttemptOutcome.CONNECTION_FAILURE, trouble)
    found = await explanation()
    assert found.startswith("If the endpoint works again: the last of 3 mails")
    assert found.endswith(f"UTC, failed: {trouble}")
    # The text has the time of the failure, which may be long ago.
    assert len(re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", found)) == 2
    # An attempt that reached the server shows a healthy endpoint, with any outcome.
    add_attempt(stack.scheduler, sender, AttemptOutcome.TEMPORARY_FAILURE, "mailbox busy")
    assert (await explanation()).startswith("The last of 3 mails")


def add_attempt(
    scheduler: Scheduler, sender: sender_pb2.Sender, outcome: AttemptOutcome, message: str
) -> None:
    scheduler.execute(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted, message) SELECT min(id), %s, sender_id, clock_timestamp(), clock_timestamp(),"
        " %s, false, %s FROM email_jobs WHERE sender_id = %s GROUP BY sender_id",
        int(outcome),
        int(outcome),
        message,
        int(sender.sender_id),
    )


async def test_an_invalid_forecast_request_is_refused(stack: ForecastStack) -> None:
    sender = await stack.scheduler.sender(user_id="ann")
    batch = (await stack.scheduler.schedule(sender, csv_of(3))).batch
    for request, reason in (
        ({}, "FORECAST_SUBJECT_REQUIRED"),
        ({"batch_id": "999999"}, "BATCH_NOT_FOUND"),
        ({"batch_id": batch.batch_id, "user_id": "bob"}, "BATCH_NOT_FOUND"),
    ):
        assert (await refusal_of(stack.forecast(**request))).reason == reason
    day = to_duration(timedelta(days=1))
    now = to_timestamp(datetime.now(UTC))
    later = to_timestamp(datetime.now(UTC) + timedelta(hours=1))
    for count, options, field in (
        (0, {}, "planned_batch.recipient_count"),
        (10_000_001, {}, "planned_batch.recipient_count"),
        (1, {"spacing": to_duration(timedelta(days=8))}, "planned_batch.options.spacing"),
        (1, {"spacing": day, "spread_until": later}, "planned_batch.options.spread_until"),
        (1, {"spread_until": now}, "planned_batch.options.spread_until"),
        (1, {"schedule_time": later, "spread_until": later}, "planned_batch.options.spread_until"),
        (1, {"expire_after": to_duration(timedelta(0))}, "planned_batch.options.expire_after"),
    ):
        refusal = await refusal_of(stack.plan(sender, count, **options))
        assert (refusal.code, [*refusal.violations]) == ("INVALID_ARGUMENT", [field])
    other = sender_pb2.Sender(sender_id="999999")
    assert (await refusal_of(stack.plan(other, 1))).reason == "SENDER_NOT_FOUND"


async def test_a_forecast_respects_the_sending_hours(stack: ForecastStack) -> None:
    zone = ZoneInfo("Europe/Berlin")
    # The hours are over for today; they open again tomorrow, for an hour.
    opens = datetime.now(zone) - timedelta(hours=2)
    hours = sender_pb2.SendingHours(
        start=f"{opens:%H:00}",
        end=f"{opens + timedelta(hours=1):%H:00}",
        time_zone="Europe/Berlin",
    )
    sender = await stack.scheduler.sender(hourly_limit=10, sending_hours=hours)
    answer = await stack.scheduler.schedule(sender, csv_of(25))
    found = await stack.forecast(batch_id=answer.batch.batch_id)
    assert found.binding_limit == sender_pb2.BINDING_LIMIT_SENDING_HOURS
    assert "sending hours bind" in found.explanation
    # Ten per day: the last five on the third day, each day at the same local time in Berlin.
    first, end = (
        time.ToDatetime(UTC).astimezone(zone) for time in (found.first_send_time, found.end_time)
    )
    assert (first.minute, first.second) == (0, 0)
    assert first.hour == end.hour == opens.hour
    assert end.date() - first.date() == timedelta(days=2)
    assert (end.minute, end.second) == (0, 8)
    assert answer.forecast_end_time == found.end_time


async def test_a_forecast_that_takes_too_long_to_compute_is_an_estimate_that_says_so(
    stack: ForecastStack,
) -> None:
    hours = sender_pb2.SendingHours(start="00:00", end="23:59", time_zone="UTC")
    sender = await stack.scheduler.sender(hourly_limit=100, sending_hours=hours)
    spacing = to_duration(timedelta(seconds=600_000))
    found = await stack.plan(sender, 100_000, spacing=spacing)
    assert found.estimated
    assert found.end_time.ToDatetime(UTC) >= datetime.now(UTC) + 99_999 * timedelta(seconds=600_000)
    assert "estimate" in found.explanation
    found = await stack.plan(sender, 1_000, spacing=spacing)
    assert not found.estimated
    assert "estimate" not in found.explanation
    # Beyond the year 9999 there is no time to give.
    found = await stack.plan(sender, 10_000_000, spacing=spacing)
    assert not found.HasField("end_time")
    assert "too far away" in found.explanation
