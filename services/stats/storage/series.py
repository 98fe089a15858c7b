"""Counts the recorded attempts of a sender by buckets of time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import BigInteger, and_, cast, extract, func, or_, select
from sqlalchemy.dialects.postgresql import ARRAY, DOUBLE_PRECISION
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.cancellations import is_now
from outbox_server.shared.database.models import Attempt, EmailJob
from outbox_server.shared.states import AttemptOutcome, JobState

# A mail counts as late if its lateness is greater.
_LATE_MS: Final = 1_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class BucketCounts:
    """The attempts that ended in one bucket."""

    sent: int
    failed: int
    retried: int
    late: int
    # The 50th, 95th and 99th percentile of the mails sent. Empty if no lateness is known.
    lateness: tuple[timedelta, ...]


async def read_series(
    connection: AsyncConnection, sender_id: int, start: datetime, end: datetime, length: timedelta
) -> dict[datetime, BucketCounts]:
    """Return the counts of each bucket in which an attempt ended, by the start of the bucket.

    `start` is a multiple of `length` after 1970.
    """
    seconds = int(length.total_seconds())
    number = cast(func.floor(extract("epoch", Attempt.ended_at) / seconds), BigInteger)
    sent = Attempt.outcome == int(AttemptOutcome.SENT)
    # The last attempt of a FAILED job counts as failed. The earlier ones were retried.
    failed = and_(
        EmailJob.state == int(JobState.FAILED), EmailJob.attempt == Attempt.attempt, ~sent
    )
    followed = or_(EmailJob.attempt > Attempt.attempt, is_now(JobState.SCHEDULED))
    percentiles = func.percentile_disc(cast([0.5, 0.95, 0.99], ARRAY(DOUBLE_PRECISION)))
    rows = await connection.execute(
        select(
            number.label("number"),
            func.count().filter(sent).label("sent"),
            func.count().filter(failed).label("failed"),
            func.count().filter(~sent, followed).label("retried"),
            func.count().filter(sent, Attempt.late_ms > _LATE_MS).label("late"),
            percentiles.within_group(Attempt.late_ms).filter(sent).label("lateness"),
        )
        # Jobs are read only for attempts that did not send the mail.
        .join(EmailJob, and_(EmailJob.id == Attempt.email_job_id, ~sent), isouter=True)
        .where(
            Attempt.sender_id == sender_id,
            Attempt.ended_at >= start,
            Attempt.ended_at < end,
        )
        .group_by(number)
    )
    return {
        _EPOCH + row.number * length: BucketCounts(
            row.sent, row.failed, row.retried, row.late, _durations(row.lateness)
        )
        for row in rows
    }


def _durations(milliseconds: list[int | None] | None) -> tuple[timedelta, ...]:
    # Either all percentiles are known or none is.
    return tuple(timedelta(milliseconds=ms) for ms in milliseconds or () if ms is not None)
