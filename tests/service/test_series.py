"""QuerySenderSeries: the ends of attempts over time, and their lateness."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest_asyncio
from outbox.v1 import stats_pb2
from outbox.v1 import stats_service_pb2 as proto

from outbox_server.cli.options import to_duration, to_timestamp
from tests.for_each import for_each_case
from tests.service.test_stats import StatsServer, fails, running

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
SENT, TEMPORARY, PERMANENT = 1, 2, 3
SCHEDULED, DONE, FAILED = 1, 3, 4
MINUTE = timedelta(minutes=1)


@pytest_asyncio.fixture
async def stats(database_url: str) -> AsyncIterator[StatsServer]:
    async with running(database_url) as server:
        yield server


async def job(
    stats: StatsServer, sender: int, state: int, *attempts: tuple[datetime, int, int]
) -> None:
    """Record a job with its attempts, as (end, outcome, ms late)."""
    number = await stats.sql(
        "INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, state,"
        " attempt, finished_at) VALUES (1, %s, now(), 1, 'b@x.test', %s, %s, %s) RETURNING id",
        sender,
        state,
        len(attempts),
        attempts[-1][0] if state > SCHEDULED else None,
    )
    for attempt, (end, outcome, late_ms) in enumerate(attempts, 1):
        await stats.sql(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
            " counted, late_ms) VALUES (%s, %s, %s, %s, %s, %s, true, %s)",
            number,
            attempt,
            sender,
            end,
            end,
            outcome,
            late_ms,
        )


async def series(stats: StatsServer, sender: int, **more: Any) -> list[stats_pb2.SeriesPoint]:
    request = proto.QuerySenderSeriesRequest(sender_id=str(sender), **more)
    return list((await stats.stub.QuerySenderSeries(request)).points)


async def test_each_bucket_counts_the_attempts_that_ended_in_it(stats: StatsServer) -> None:
    sender, other = await stats.sender(), await stats.sender()
    await job(stats, sender, DONE, (NOON, SENT, 0))
    await job(
        stats, sender, DONE, (NOON + 59 * MINUTE, TEMPORARY, 0), (NOON + 61 * MINUTE, SENT, 5)
    )
    await job(stats, sender, FAILED, (NOON, TEMPORARY, 0), (NOON + 2 * MINUTE, PERMANENT, 0))
    await job(stats, sender, SCHEDULED, (NOON + 119 * MINUTE, TEMPORARY, 0))
    await job(stats, sender, DONE, (NOON + 180 * MINUTE, SENT, 0))
    await job(stats, other, DONE, (NOON, SENT, 0))

    points = await series(
        stats,
        sender,
        start_time=to_timestamp(NOON + 10 * MINUTE),
        end_time=to_timestamp(NOON + 180 * MINUTE),
    )

    assert [point.start_time.ToDatetime(UTC) for point in points] == [
        NOON + hour * 60 * MINUTE for hour in range(3)
    ]
    counts = [(point.sent_count, point.failed_count, point.retried_count) for point in points]
    assert counts == [(1, 1, 2), (1, 0, 1), (0, 0, 0)]
    assert not points[2].HasField("lateness_p50")


async def test_jobs_of_a_cancelled_batch_are_not_counted_as_retried(stats: StatsServer) -> None:
    sender = await stats.sender()
    await job(stats, sender, SCHEDULED, (NOON, TEMPORARY, 0))
    hour = {"start_time": to_timestamp(NOON), "end_time": to_timestamp(NOON + 60 * MINUTE)}
    (point,) = await series(stats, sender, **hour)
    assert point.retried_count == 1
    # Its row is updated later.
    await stats.sql("INSERT INTO batch_cancellations VALUES (1, %s, now())", sender)
    (point,) = await series(stats, sender, **hour)
    assert point.retried_count == 0


async def test_lateness_is_given_as_percentiles_of_the_sent_mails(stats: StatsServer) -> None:
    sender = await stats.sender()
    for late_ms in range(10, 1_011, 10):
        await job(stats, sender, DONE, (NOON, SENT, late_ms))
    await job(stats, sender, FAILED, (NOON, PERMANENT, 60_000))
    (point,) = await series(
        stats,
        sender,
        start_time=to_timestamp(NOON),
        end_time=to_timestamp(NOON + MINUTE),
        bucket=to_duration(MINUTE),
    )
    assert (point.sent_count, point.late_count) == (101, 1)
    late = (point.lateness_p50, point.lateness_p95, point.lateness_p99)
    assert [span.ToMilliseconds() for span in late] == [510, 960, 1_000]


async def test_the_default_series_is_the_last_day_by_the_hour(stats: StatsServer) -> None:
    points = await series(stats, await stats.sender())
    assert len(points) == 25
    span = points[-1].start_time.ToDatetime(UTC) - points[0].start_time.ToDatetime(UTC)
    assert span == timedelta(days=1)


@for_each_case(
    "fields reason",
    [
        ({"bucket": timedelta(seconds=59)}, "BUCKET_INVALID"),
        ({"bucket": timedelta(minutes=7)}, "BUCKET_INVALID"),
        ({"bucket": timedelta(days=2)}, "BUCKET_INVALID"),
        ({"bucket": MINUTE, "start_time": NOON - timedelta(days=8)}, "BUCKET_INVALID"),
        ({"start_time": NOON}, "INTERVAL_INVALID"),
        ({"start_time": datetime(1, 1, 1, tzinfo=UTC)}, "INTERVAL_INVALID"),
    ],
)
async def test_an_invalid_series_request_is_refused(
    stats: StatsServer, fields: Any, reason: str
) -> None:
    request: dict[str, Any] = {"end_time": to_timestamp(NOON)}
    for name, value in fields.items():
        request[name] = to_duration(value) if name == "bucket" else to_timestamp(value)
    call = series(stats, await stats.sender(), **request)
    assert await fails(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_the_series_of_another_user_is_not_found(stats: StatsServer) -> None:
    call = series(stats, await stats.sender("anna"), user_id="bert")
    assert await fails(call) == (grpc.StatusCode.NOT_FOUND, "SENDER_NOT_FOUND")
