"""AuditSender: replays what a sender sent against its limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from outbox.v1 import stats_service_pb2
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.stats import storage
from shared.audit import Replay
from shared.errors import InvalidInput
from shared.forecast.backlog import Rules
from shared.models import Attempt, Batch, EmailJob, Sender
from shared.ownership import owned_by
from shared.proto_mapping import from_timestamp, not_found, parse_id, to_duration
from shared.states import AttemptOutcome

# Rows that are fetched at once: all that is held of a sender's past, beside a window's ends.
_AT_ONCE: Final = 2_000
_SECOND: Final = timedelta(seconds=1)
# What may have brought a mail to its recipient.
_MAY_HAVE_SENT: Final = (
    int(AttemptOutcome.SENT),
    int(AttemptOutcome.IN_DOUBT),
    int(AttemptOutcome.LEASE_EXPIRED),
)


@dataclass(frozen=True, slots=True)
class _Interval:
    start: datetime | None
    end: datetime | None

    def holds(self, reach: timedelta = timedelta(0)) -> list[ColumnElement[bool]]:
        """Return the conditions that an attempt ended within, or up to `reach` before."""
        conditions: list[ColumnElement[bool]] = []
        if self.start is not None:
            conditions.append(Attempt.ended_at >= self.start - reach)
        if self.end is not None:
            conditions.append(Attempt.ended_at < self.end)
        return conditions


async def audit(
    engine: AsyncEngine,
    request: stats_service_pb2.AuditSenderRequest,
    user_id: str | None,
    rules: Rules,
) -> stats_service_pb2.AuditSenderResponse:
    """Answer AuditSender.

    Raises:
        InvalidInput: INTERVAL_INVALID.
        NotFound: SENDER_NOT_FOUND.
    """
    sender_id = parse_id(request.sender_id, "sender_id")
    interval = _interval(request)
    async with storage.snapshot(engine) as connection:
        limits = owned_by(
            select(Sender.hourly_limit, Sender.min_gap_ms).where(
                Sender.id == sender_id, Sender.deleted_at.is_(None)
            ),
            Sender.user_id,
            user_id,
        )
        sender = (await connection.execute(limits)).one_or_none()
        if sender is None:
            raise not_found("sender_id", request.sender_id)
        gap = max(rules.floor, timedelta(milliseconds=sender.min_gap_ms or 0))
        replay = Replay(
            rules.window / _SECOND,
            sender.hourly_limit,
            None if interval.start is None else interval.start.timestamp(),
        )
        async for start, end in _sends(connection, sender_id, interval, max(rules.window, gap)):
            replay.add(start.timestamp(), end.timestamp())
        sent, duplicates = await _count_sends(connection, sender_id, interval)
        lost = await _count_lost(connection, sender_id)
    least_gap = None
    if replay.least_gap is not None:
        least_gap = to_duration(timedelta(seconds=replay.least_gap))
    return stats_service_pb2.AuditSenderResponse(
        least_gap=least_gap,
        most_in_window_count=replay.most_in_window,
        window=to_duration(rules.window),
        sent_count=sent,
        lost_count=lost,
        duplicate_count=duplicates,
        effective_min_gap=to_duration(gap),
        hourly_limit=sender.hourly_limit,
    )


def _interval(request: stats_service_pb2.AuditSenderRequest) -> _Interval:
    start = end = None
    if request.HasField("start_time"):
        start = from_timestamp(request.start_time, "start_time")
    if request.HasField("end_time"):
        end = from_timestamp(request.end_time, "end_time")
    if start is not None and end is None and start >= datetime.now(UTC):
        raise InvalidInput.field("start_time", "must be in the past", reason="INTERVAL_INVALID")
    if start is not None and end is not None and end <= start:
        raise InvalidInput.field(
            "end_time", "must be later than start_time", reason="INTERVAL_INVALID"
        )
    # Whoever asks for the first year of the calendar asks for all.
    if start is not None and start.year <= 1:
        start = None
    return _Interval(start, end)


async def _sends(
    connection: AsyncConnection, sender_id: int, interval: _Interval, reach: timedelta
) -> AsyncIterator[tuple[datetime, datetime]]:
    """Return (start, end) of the sends that took a slot, in the order of their ends."""
    statement = (
        select(Attempt.started_at, Attempt.ended_at)
        .where(Attempt.sender_id == sender_id, Attempt.counted, *interval.holds(reach))
        .order_by(Attempt.ended_at, Attempt.started_at)
    )
    # By a cursor of the server.
    rows = await connection.stream(statement, execution_options={"yield_per": _AT_ONCE})
    async for row in rows:
        yield row.started_at, row.ended_at


async def _count_sends(
    connection: AsyncConnection, sender_id: int, interval: _Interval
) -> tuple[int, int]:
    """Return how many jobs were sent, and how many sends were not the first of their job."""
    sends = func.count().filter(Attempt.outcome.in_(_MAY_HAVE_SENT))
    jobs = func.count(Attempt.email_job_id.distinct()).filter(Attempt.outcome.in_(_MAY_HAVE_SENT))
    sent = func.count(Attempt.email_job_id.distinct()).filter(
        Attempt.outcome == int(AttemptOutcome.SENT)
    )
    statement = select(sent.label("sent"), (sends - jobs).label("again")).where(
        Attempt.sender_id == sender_id, Attempt.counted, *interval.holds()
    )
    row = (await connection.execute(statement)).one()
    return row.sent, row.again


async def _count_lost(connection: AsyncConnection, sender_id: int) -> int:
    """Return how many accepted jobs have no row: a row is always in one of the states."""
    accepted = select(func.coalesce(func.sum(Batch.accepted_count), 0)).where(
        Batch.sender_id == sender_id
    )
    there = (
        select(func.count())
        .select_from(EmailJob)
        .join(Batch, Batch.id == EmailJob.batch_id)
        .where(Batch.sender_id == sender_id)
    )
    found = select(accepted.scalar_subquery() - there.scalar_subquery())
    return int(await connection.scalar(found) or 0)
