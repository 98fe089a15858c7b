"""The limits that a user has for all its senders: set by operators, explained and forecast."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import email_job_service_pb2 as pb
from outbox.v1 import sender_pb2
from outbox.v1.user_pb2 import User, UserLimits
from outbox.v1.user_service_pb2 import GetUserRequest, UpdateUserRequest

from outbox_server.cli.options import to_duration
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.database.engine import create_engine, snapshot
from outbox_server.shared.forecast.forecasts import forecast_batch
from outbox_server.shared.forecast.pace import Rules
from outbox_server.shared.forecast.simulation import Bound
from outbox_server.shared.states import JobState
from tests import dispatchers
from tests.eventually import eventually
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

HOUR = timedelta(hours=1)


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0", shards=3) as running:
        yield running


async def update(scheduler: Scheduler, mask: tuple[str, ...] = (), **limits: Any) -> User:
    request = UpdateUserRequest(user=User(user_id="ann", limits=UserLimits(**limits)))
    if mask:
        request.update_mask.CopyFrom(FieldMask(paths=mask))
    found: User = await scheduler.users.UpdateUser(request)
    return found


def sent_before(scheduler: Scheduler, sender: sender_pb2.Sender, *ago: timedelta) -> None:
    for number, before in enumerate(ago):
        scheduler.execute(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted) VALUES (%s, 1, %s, now() - %s, now() - %s, 1, true)",
            1_000_000 + number,
            int(sender.sender_id),
            before,
            before,
        )


async def explained(scheduler: Scheduler, batch_id: str) -> pb.ExplainEmailJobResponse:
    job = scheduler.value("SELECT min(id) FROM email_jobs WHERE batch_id = %s", int(batch_id))
    return await scheduler.jobs.ExplainEmailJob(pb.ExplainEmailJobRequest(email_job_id=str(job)))


def is_sent(scheduler: Scheduler, count: int) -> bool:
    found = scheduler.value("SELECT count(*) FROM email_jobs WHERE state = %s", JobState.SENT)
    return bool(found == count)


def left(until: Any) -> float:
    return float((until.ToDatetime(UTC) - datetime.now(UTC)).total_seconds())


async def test_limits_are_set_shown_and_reset(scheduler: Scheduler) -> None:
    await scheduler.sender()
    found = await update(scheduler, hourly_limit=10, min_gap=to_duration(timedelta(seconds=2)))
    assert (found.limits.hourly_limit, found.limits.min_gap.seconds) == (10, 2)
    assert found.effective_limits == found.limits
    found = await update(scheduler, ("limits.min_gap",))
    assert not found.limits.HasField("min_gap")
    assert found.effective_limits.HasField("min_gap")
    assert found.limits.hourly_limit == 10
    found = await update(scheduler, ("limits",))
    assert found.limits == UserLimits()
    assert found.effective_limits.hourly_limit == 0
    assert (await scheduler.users.GetUser(GetUserRequest(user_id="ann"))).limits == UserLimits()


@for_each_case(
    "field limits",
    [
        ("user.limits.hourly_limit", {"hourly_limit": -1}),
        ("user.limits.hourly_limit", {"hourly_limit": 1_000_001}),
        ("user.limits.min_gap", {"min_gap": to_duration(timedelta(seconds=-1))}),
        ("user.limits.min_gap", {"min_gap": to_duration(timedelta(days=1, seconds=1))}),
    ],
)
async def test_a_limit_out_of_bounds_is_refused(
    scheduler: Scheduler, field: str, limits: dict[str, Any]
) -> None:
    refusal = await refusal_of(update(scheduler, **limits))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "USER_LIMIT_INVALID")
    assert field in str(refusal)


async def test_the_limit_of_the_user_is_explained_and_forecast(scheduler: Scheduler) -> None:
    one, two = await scheduler.sender(), await scheduler.sender()
    sent_before(scheduler, one, HOUR / 2, HOUR / 4)
    await update(scheduler, hourly_limit=2)
    batch = (await scheduler.schedule(two, "email\na@b.org\nb@b.org\nc@b.org\n")).batch
    found = await explained(scheduler, batch.batch_id)
    assert found.wait_reason == pb.WAIT_REASON_USER_HOURLY_LIMIT
    assert left(found.wait_end_time) == pytest.approx(1_800, abs=60)
    assert left(found.estimated_send_time) == pytest.approx(1_800, abs=60)
    assert "2 mails that its user has for all senders" in found.explanation

    settings = scheduler.settings
    engine = create_engine(settings, lookups_only=True)
    try:
        async with snapshot(engine) as connection:
            forecast = await forecast_batch(
                connection, int(two.sender_id), int(batch.batch_id), Rules.from_settings(settings)
            )
    finally:
        await engine.dispose()
    assert forecast.bound is Bound.USER_WINDOW
    assert forecast.end is not None
    # The third mail waits for the first to leave the window.
    assert (forecast.end - datetime.now(UTC)).total_seconds() == pytest.approx(5_400, abs=60)


async def test_the_gap_of_the_user_is_explained(scheduler: Scheduler) -> None:
    one, two = await scheduler.sender(), await scheduler.sender()
    sent_before(scheduler, one, timedelta(seconds=1))
    await update(scheduler, min_gap=to_duration(timedelta(minutes=10)))
    batch = (await scheduler.schedule(two, "email\na@b.org\n")).batch
    found = await explained(scheduler, batch.batch_id)
    assert found.wait_reason == pb.WAIT_REASON_USER_GAP
    assert left(found.wait_end_time) == pytest.approx(599, abs=60)


async def test_a_change_takes_effect_while_mail_waits(scheduler: Scheduler, inbox: Inbox) -> None:
    senders = [await scheduler.sender() for _ in range(4)]
    await update(scheduler, hourly_limit=3)
    for sender in senders:
        await scheduler.schedule(sender, "email\na@b.org\nb@b.org\n")
    options = dispatchers.options(
        scheduler.settings.database_url,
        scheduler.settings.redis_url,
        inbox.url,
        min_gap="0",
        shards=3,
    )
    async with dispatchers.running(dispatchers.settings_of(options)):
        await eventually(partial(is_sent, scheduler, 3))
        await update(scheduler, hourly_limit=5)
        await eventually(partial(is_sent, scheduler, 5))
        await update(scheduler, hourly_limit=0)
        await eventually(partial(is_sent, scheduler, 8))
