"""AuditSender: recorded sends, replayed against the limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest_asyncio
from outbox.v1 import stats_service_pb2 as proto

from outbox_server.cli.options import to_timestamp
from tests.service.test_stats import StatsServer, fails, running

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
SENT, DOUBT = 1, 5


@pytest_asyncio.fixture
async def stats(database_url: str) -> AsyncIterator[StatsServer]:
    async with running(database_url) as server:
        yield server


async def send(
    stats: StatsServer, sender: int, job: int, at_s: float, took_s: float = 1, **more: int
) -> None:
    """Record a send that began `at_s` seconds after NOW."""
    start = NOW + timedelta(seconds=at_s)
    await stats.sql(
        "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,"
        " counted) VALUES (%s, %s, %s, %s, %s, %s, true)",
        job,
        more.get("attempt", 1),
        sender,
        start,
        start + timedelta(seconds=took_s),
        more.get("outcome", SENT),
    )


async def audit(stats: StatsServer, sender: int, **more: Any) -> proto.AuditSenderResponse:
    request = proto.AuditSenderRequest(sender_id=str(sender), **more)
    answer: proto.AuditSenderResponse = await stats.stub.AuditSender(request)
    return answer


async def test_the_audit_measures_gap_and_window_from_the_recorded_sends(
    stats: StatsServer,
) -> None:
    sender, other = await stats.sender(limit=3), await stats.sender()
    for job, at in enumerate((0, 10, 13.5, 3_600, 3_700, 3_800)):
        await send(stats, sender, job, at)
    await send(stats, other, 100, 10.5)

    found = await audit(stats, sender)

    assert found.least_gap.ToTimedelta() == timedelta(seconds=2.5)
    # The sends from 10 s to 3,600 s: the first has left the window when the fourth ends.
    assert found.most_in_window_count == 3
    assert (found.sent_count, found.duplicate_count, found.lost_count) == (6, 0, 0)
    assert found.window.ToTimedelta() == timedelta(hours=1)
    assert found.effective_min_gap.ToTimedelta() == timedelta(seconds=2)
    assert found.hourly_limit == 3


async def test_an_interval_is_audited_including_the_sends_before_it(stats: StatsServer) -> None:
    sender = await stats.sender()
    for job, at in enumerate((0, 2, 100, 104, 200, 201.5)):
        await send(stats, sender, job, at)
    found = await audit(
        stats,
        sender,
        start_time=to_timestamp(NOW + timedelta(seconds=50)),
        end_time=to_timestamp(NOW + timedelta(seconds=150)),
    )
    assert found.least_gap.ToTimedelta() == timedelta(seconds=3)
    assert (found.sent_count, found.most_in_window_count) == (2, 4)


async def test_a_second_send_of_a_job_is_a_duplicate_even_after_doubt(stats: StatsServer) -> None:
    sender = await stats.sender()
    await send(stats, sender, 1, 0, outcome=DOUBT)
    await send(stats, sender, 1, 10, attempt=2)
    await send(stats, sender, 2, 20)
    found = await audit(stats, sender)
    assert (found.sent_count, found.duplicate_count) == (2, 1)


async def test_an_accepted_job_without_a_row_is_lost(stats: StatsServer) -> None:
    sender = await stats.sender()
    await stats.sql(
        "INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at, duplicates,"
        " mode, accepted_count) VALUES ('anna', %s, 'r', '', now(), 1, 1, 3)",
        sender,
    )
    batch = await stats.sql("SELECT max(id) FROM batches")
    for _ in range(2):
        await stats.sql(
            "INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)"
            " VALUES (%s, %s, now(), 1, 'b@x.test')",
            batch,
            sender,
        )
    assert (await audit(stats, sender)).lost_count == 1


async def test_a_sender_that_sent_nothing_has_no_gap(stats: StatsServer) -> None:
    found = await audit(stats, await stats.sender())
    assert not found.HasField("least_gap")
    assert (found.sent_count, found.most_in_window_count) == (0, 0)


async def test_an_invalid_audit_request_is_refused(stats: StatsServer) -> None:
    sender = await stats.sender()
    now = to_timestamp(NOW)
    assert await fails(audit(stats, sender, start_time=now, end_time=now)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INTERVAL_INVALID",
    )
    tomorrow = to_timestamp(datetime.now(UTC) + timedelta(days=1))
    assert await fails(audit(stats, sender, start_time=tomorrow)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INTERVAL_INVALID",
    )
    assert await fails(audit(stats, sender, user_id="bert")) == (
        grpc.StatusCode.NOT_FOUND,
        "SENDER_NOT_FOUND",
    )
