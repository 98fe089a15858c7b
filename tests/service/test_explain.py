"""ExplainEmailJob: the one reason for the wait, and the time of sending."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from outbox.v1 import email_job_service_pb2 as pb
from outbox.v1 import sender_pb2
from outbox.v1.email_job_pb2 import EMAIL_JOB_STATE_CANCELLED
from outbox.v1.sender_service_pb2 import PauseSenderRequest

from outbox_server.cli.options import to_duration, to_timestamp
from outbox_server.deploy.ports import free_port
from tests import cooldowns, dispatchers
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler


async def explain(scheduler: Scheduler, job: int, **more: Any) -> pb.ExplainEmailJobResponse:
    request = pb.ExplainEmailJobRequest(email_job_id=str(job), **more)
    return await scheduler.jobs.ExplainEmailJob(request)


async def scheduled(
    scheduler: Scheduler, sender: sender_pb2.Sender, count: int = 1, **options: Any
) -> list[int]:
    """Schedule a batch; return the ids of its jobs in the order of sending."""
    csv = "email\n" + "".join(f"u{number}@b.org\n" for number in range(count))
    batch = (await scheduler.schedule(sender, csv, **options)).batch
    rows = scheduler.rows(
        "SELECT id FROM email_jobs WHERE batch_id = %s ORDER BY id", int(batch.batch_id)
    )
    return [job for (job,) in rows]


def sent_before(scheduler: Scheduler, sender: sender_pb2.Sender, *seconds: float) -> None:
    """Record sends that ended that many seconds ago."""
    for number, ago in enumerate(seconds):
        scheduler.execute(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted) VALUES (%s, 1, %s, now() - %s, now() - %s, 1, true)",
            1_000_000 + number,
            int(sender.sender_id),
            timedelta(seconds=ago),
            timedelta(seconds=ago),
        )


def left(until: Any) -> float:
    return float((until.ToDatetime(UTC) - datetime.now(UTC)).total_seconds())


async def test_a_sendable_job_waits_for_a_dispatcher(scheduler: Scheduler) -> None:
    (job,) = await scheduled(scheduler, await scheduler.sender())
    found = await explain(scheduler, job)
    assert found.wait_reason == pb.WAIT_REASON_DISPATCHER
    assert found.HasField("ahead_count")
    assert found.ahead_count == 0
    assert found.email_job.email_job_id == str(job)
    assert left(found.estimated_send_time) == pytest.approx(0, abs=5)


async def test_a_job_behind_others_shows_its_place_and_time(scheduler: Scheduler) -> None:
    sender = await scheduler.sender(hourly_limit=20)
    jobs = await scheduled(scheduler, sender, 50)
    found = await explain(scheduler, jobs[45])
    assert found.wait_reason == pb.WAIT_REASON_QUEUE
    assert found.ahead_count == 45
    assert "45 other jobs" in found.explanation
    # Two windows, and a gap for each of the five mails before it in the third.
    assert left(found.estimated_send_time) == pytest.approx(2 * 3_600 + 10, abs=5)


async def test_a_job_that_is_not_due_waits_for_its_time(scheduler: Scheduler) -> None:
    start = datetime.now(UTC) + timedelta(hours=2)
    (job,) = await scheduled(scheduler, await scheduler.sender(), schedule_time=to_timestamp(start))
    found = await explain(scheduler, job)
    assert found.wait_reason == pb.WAIT_REASON_NOT_DUE
    assert found.wait_end_time.ToDatetime(UTC) == start
    assert found.estimated_send_time.ToDatetime(UTC) == start


async def test_a_job_outside_the_sending_hours_waits_for_them(scheduler: Scheduler) -> None:
    zone = ZoneInfo("America/St_Johns")
    now = datetime.now(zone)
    # Two days ahead in the sender's time zone; the second mail follows an hour later.
    day = now.date() + timedelta(days=2)
    weekday = sender_pb2.Weekday.ValueType(day.isoweekday())
    hours = sender_pb2.SendingHours(
        weekdays=[weekday], start="09:00", end="17:00", time_zone=zone.key
    )
    sender = await scheduler.sender(sending_hours=hours, min_gap=to_duration(timedelta(hours=1)))
    first, second = await scheduled(scheduler, sender, 2)
    opens = datetime.combine(day, time(9), zone)
    for job, at in ((first, opens), (second, opens + timedelta(hours=1))):
        found = await explain(scheduler, job)
        assert found.wait_reason == pb.WAIT_REASON_SENDING_HOURS
        assert found.wait_end_time.ToDatetime(UTC) == opens
        assert found.estimated_send_time.ToDatetime(UTC) == at
        assert f"until {opens.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" in found.explanation
    # Within the hours, the explanation does not mention them.
    scheduler.execute("UPDATE senders SET sending_hours = '[[], 0, 1440, \"UTC\"]'")
    assert (await explain(scheduler, first)).wait_reason == pb.WAIT_REASON_DISPATCHER


async def test_a_job_that_failed_waits_for_its_retry(scheduler: Scheduler) -> None:
    (job,) = await scheduled(scheduler, await scheduler.sender())
    scheduler.execute(
        "UPDATE email_jobs SET attempt = 2, failures = 2, scheduled_at = now() + '25 s'"
        " WHERE id = %s",
        job,
    )
    found = await explain(scheduler, job)
    assert found.wait_reason == pb.WAIT_REASON_RETRY
    assert left(found.wait_end_time) == pytest.approx(25, abs=5)
    assert "Attempt 2 failed; attempt 3" in found.explanation


async def test_a_paused_sender_is_named_before_anything_else(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    jobs = await scheduled(scheduler, sender, 3)
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    found = await explain(scheduler, jobs[2])
    assert found.wait_reason == pb.WAIT_REASON_SENDER_PAUSED
    assert found.ahead_count == 2
    assert not found.HasField("wait_end_time")
    assert not found.HasField("estimated_send_time")


@pytest.mark.parametrize("reachable", [True, False])
async def test_gap_and_window_are_reported_separately_with_and_without_redis(
    database_url: str, redis_url: str, *, reachable: bool
) -> None:
    url = redis_url if reachable else f"redis://127.0.0.1:{free_port()}/0"
    async with running_scheduler(database_url, url, min_gap="100s") as scheduler:
        for limit, ago, reason, wait in (
            (100, (40,), pb.WAIT_REASON_MIN_GAP, 60),
            (3, (3_000, 2_000, 50), pb.WAIT_REASON_HOURLY_LIMIT, 600),
        ):
            sender = await scheduler.sender(hourly_limit=limit)
            sent_before(scheduler, sender, *ago)
            (job,) = await scheduled(scheduler, sender)
            found = await explain(scheduler, job)
            assert found.wait_reason == reason
            assert left(found.wait_end_time) == pytest.approx(wait, abs=8)
            assert left(found.estimated_send_time) == pytest.approx(wait, abs=8)
            assert ("Redis cannot be reached" in found.explanation) == (not reachable)
            scheduler.execute("DELETE FROM attempts")


async def test_an_endpoint_that_is_down_is_named_with_its_error_and_next_probe(
    scheduler: Scheduler, database_url: str, redis_url: str
) -> None:
    sender = await scheduler.sender()
    values = dispatchers.options(
        database_url,
        redis_url,
        f"smtp://127.0.0.1:{free_port()}",
        retry_backoff="60s",
        dispatcher_concurrency=1,
        min_gap="2s",
    )
    jobs = await scheduled(scheduler, sender, 6)
    async with dispatchers.running(dispatchers.settings_of(values)):
        await eventually(lambda: scheduler.value("SELECT count(*) FROM attempts") == 3)

        async def is_down() -> bool:
            found = await explain(scheduler, jobs[-1])
            return found.wait_reason == pb.WAIT_REASON_ENDPOINT_DOWN

        await eventually(is_down)
        found = await explain(scheduler, jobs[-1])
    assert left(found.wait_end_time) == pytest.approx(60, abs=15)
    assert "Connection refused" in found.explanation
    assert not found.HasField("estimated_send_time")
    found = await explain(scheduler, jobs[0])
    assert found.wait_reason == pb.WAIT_REASON_RETRY
    assert "does not count as a failure, since no session with the mail" in found.explanation


async def test_a_job_of_a_sender_in_cooldown_shows_the_reply_and_the_next_probe(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender()
    jobs = await scheduled(scheduler, sender, 3)
    cooldowns.begin(scheduler.execute, sender.sender_id, probe_in=timedelta(minutes=10))
    for job, seconds in ((jobs[0], 600), (jobs[2], 604)):
        found = await explain(scheduler, job)
        assert found.wait_reason == pb.WAIT_REASON_COOLDOWN
        assert left(found.wait_end_time) == pytest.approx(600, abs=8)
        # If the probe is accepted.
        assert left(found.estimated_send_time) == pytest.approx(seconds, abs=8)
        assert f"({cooldowns.REPLY}); the next probe is at" in found.explanation
    # The probe is due: the first job is the probe, and the others wait for its reply.
    scheduler.execute("UPDATE cooldowns SET next_probe_at = now()")
    assert (await explain(scheduler, jobs[0])).wait_reason == pb.WAIT_REASON_DISPATCHER
    found = await explain(scheduler, jobs[1])
    assert found.wait_reason == pb.WAIT_REASON_COOLDOWN
    assert not found.HasField("wait_end_time")


@pytest.mark.parametrize(("expires", "until"), [(None, "24 hours"), ("3 hours", "3 hours")])
async def test_a_deferred_job_shows_until_when_it_is_retried(
    scheduler: Scheduler, expires: str | None, until: str
) -> None:
    sender = await scheduler.sender()
    (job,) = await scheduled(scheduler, sender)
    scheduler.execute(
        "UPDATE email_jobs SET attempt = 2, deferred_since = now(),"
        " scheduled_at = now() + '10 min', expires_at = now() + %s::interval",
        expires,
    )
    scheduler.execute(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted, smtp_code, enhanced_code, message, reply_class)"
        " VALUES (%s, 2, %s, now(), now(), 2, false, 450, '4.7.1', '4.7.1 Greylisted', 6)",
        job,
        int(sender.sender_id),
    )
    found = await explain(scheduler, job)
    assert found.wait_reason == pb.WAIT_REASON_DEFERRED
    assert left(found.wait_end_time) == pytest.approx(600, abs=8)
    assert left(found.estimated_send_time) == pytest.approx(600, abs=8)
    assert "later (450 4.7.1 Greylisted); attempt 3 is at" in found.explanation
    end = scheduler.value("SELECT deferred_since + %s::interval FROM email_jobs", until)
    assert f"until {end.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" in found.explanation


async def test_a_job_that_does_not_wait_shows_its_outcome(scheduler: Scheduler) -> None:
    (job,) = await scheduled(scheduler, await scheduler.sender())
    await scheduler.jobs.CancelEmailJob(pb.CancelEmailJobRequest(email_job_id=str(job)))
    found = await explain(scheduler, job)
    assert found.email_job.state == EMAIL_JOB_STATE_CANCELLED
    assert found.wait_reason == pb.WAIT_REASON_UNSPECIFIED
    assert not found.HasField("ahead_count")
    assert "cancelled" in found.explanation


async def test_the_job_of_another_user_is_not_found(scheduler: Scheduler) -> None:
    (job,) = await scheduled(scheduler, await scheduler.sender(user_id="ann"))
    refusal = await refusal_of(explain(scheduler, job, user_id="bob"))
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "EMAIL_JOB_NOT_FOUND")


async def test_the_place_of_a_job_among_very_many_is_found_by_the_index(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender(hourly_limit=1_000)
    jobs = await scheduled(scheduler, sender, 25_000)
    found = await explain(scheduler, jobs[-1])
    assert found.ahead_count == 24_999
    assert left(found.estimated_send_time) == pytest.approx(24 * 3_600 + 1_998, abs=60)
    # The service's own query.
    options = "-c enable_seqscan=off -c enable_bitmapscan=off"
    with psycopg.connect(scheduler.settings.database_url, options=options) as connection:
        plan = connection.execute(
            "EXPLAIN SELECT id FROM email_jobs WHERE sender_id = %s AND state = 1"
            " AND (scheduled_at, id) < (now(), %s) LIMIT 1000000",
            (int(sender.sender_id), jobs[-1]),
        ).fetchall()
    assert "ix_email_jobs_head" in "".join(line for (line,) in plan)
