"""Reads counts: the rollups plus the deltas that are not yet folded, in one snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Interval,
    Select,
    bindparam,
    case,
    cast,
    false,
    func,
    select,
    true,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.cooldowns.columns import COOLDOWN_COLUMNS, cooldown_of
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.counts import JobCounts, sender_counts, user_counts
from outbox_server.shared.database.engine import snapshot
from outbox_server.shared.database.models import (
    Attempt,
    Cooldown,
    CountDelta,
    EmailJob,
    Sender,
    SenderHourCount,
)
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.database.pauses import has_paused_batch, in_paused_batch
from outbox_server.shared.states import JobState

_HOUR: Final = timedelta(hours=1)
_HOURS_SHOWN: Final = 24


@dataclass(frozen=True, slots=True)
class HourCounts:
    """The jobs that ended in the hour that begins at `start` (UTC)."""

    start: datetime
    sent: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class SenderStats:
    """The result of GetSenderStats, as of `read_at`."""

    sender_id: int
    counts: JobCounts
    # The last 24 hours. The current hour comes last.
    hours: Sequence[HourCounts]
    # The first waiting job by (due, id), and its due time. None means that no job waits.
    next_job_id: int | None
    next_due: datetime | None
    # Sends in the trailing window.
    window_used: int
    hourly_limit: int
    cooldown: CooldownRecord | None
    # It is not compared, because watchers would otherwise see a change each time.
    read_at: datetime = field(compare=False)


@dataclass(frozen=True, slots=True)
class UserSender:
    """One sender of a user, with its counts."""

    sender_id: int
    email: str
    counts: JobCounts


@dataclass(frozen=True, slots=True)
class UserStats:
    """The result of GetUserStats, as of `read_at`."""

    counts: JobCounts
    senders: Sequence[UserSender]
    read_at: datetime


async def read_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None, window: timedelta
) -> SenderStats | None:
    """Return the stats of one sender, or None if it does not exist or belongs to another user.

    The connection must be a `snapshot`. `window` is the length of the trailing window.
    """
    statement = owned_by(_SENDER, Sender.user_id, user_id)
    values = {"sender_id": sender_id, "window": window}
    found = (await connection.execute(statement, values)).one_or_none()
    if found is None:
        return None
    counts = await sender_counts(connection, [sender_id])
    return SenderStats(
        sender_id=sender_id,
        counts=counts[sender_id],
        hours=await _read_hours(connection, sender_id, found.read_at),
        next_job_id=found.next_job_id,
        next_due=found.next_due,
        window_used=found.window_used,
        hourly_limit=found.hourly_limit,
        cooldown=cooldown_of(found),
        read_at=found.read_at,
    )


@dataclass(frozen=True, slots=True)
class WatchedSender:
    """The stats of a watched sender. None means that it was deleted."""

    stats: SenderStats | None


async def read_watched(
    engine: AsyncEngine, window: timedelta, sender_ids: Iterable[int]
) -> dict[int, WatchedSender]:
    """Return the watched senders in one snapshot. The caller has checked who owns them."""
    async with snapshot(engine) as connection:
        return {
            sender_id: WatchedSender(await read_sender(connection, sender_id, None, window))
            for sender_id in sender_ids
        }


# The maximum number of waiting jobs of paused batches that are skipped to find the one that is sent
# next.
_MOST_PASSED: Final = 1_000


def _sender_statement() -> Select[Any]:
    # The first waiting job whose batch is not paused, if it is among the first few.
    some = (
        select(
            EmailJob.id,
            EmailJob.scheduled_at,
            func.coalesce(in_paused_batch(Sender.id), false()).label("paused"),
        )
        .where(EmailJob.sender_id == Sender.id, waits_of(Sender.id))
        .order_by(EmailJob.scheduled_at, EmailJob.id)
        .limit(case((has_paused_batch(Sender.id), _MOST_PASSED), else_=1))
        .correlate(Sender)
        .subquery("some")
    )
    first = (
        select(some.c.id, some.c.scheduled_at)
        .order_by(some.c.paused, some.c.scheduled_at, some.c.id)
        .limit(1)
        .lateral("first")
    )
    window_used = (
        select(func.count())
        .select_from(Attempt)
        .where(
            Attempt.sender_id == Sender.id,
            Attempt.counted,
            # Not clock_timestamp(): an index cannot be searched by a value that changes meanwhile.
            Attempt.ended_at > func.statement_timestamp() - bindparam("window", type_=Interval),
        )
        .correlate(Sender)
        .scalar_subquery()
    )
    return (
        select(
            Sender.hourly_limit,
            func.statement_timestamp().label("read_at"),
            first.c.id.label("next_job_id"),
            first.c.scheduled_at.label("next_due"),
            window_used.label("window_used"),
            *COOLDOWN_COLUMNS,
        )
        .outerjoin_from(Sender, first, true())
        .outerjoin(Cooldown, Cooldown.sender_id == Sender.id)
        .where(Sender.id == bindparam("sender_id"), Sender.deleted_at.is_(None))
    )


# Building it for each call would take a fifth of the call's processor time.
_SENDER: Final = _sender_statement()


async def _read_hours(
    connection: AsyncConnection, sender_id: int, now: datetime
) -> Sequence[HourCounts]:
    """Return the counts of the last 24 hours, the oldest first. The last hour contains `now`."""
    current = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    first = current - (_HOURS_SHOWN - 1) * _HOUR
    rows = await connection.execute(_HOURS, {"sender_id": sender_id, "first": first})
    found = {(hour.astimezone(UTC), state): n for hour, state, n in rows}
    starts = [first + number * _HOUR for number in range(_HOURS_SHOWN)]
    return [
        HourCounts(
            start,
            sent=found.get((start, JobState.SENT), 0),
            failed=found.get((start, JobState.FAILED), 0),
        )
        for start in starts
    ]


def _hours_statement() -> Select[Any]:
    ends = (int(JobState.SENT), int(JobState.FAILED))
    parts = union_all(
        *(
            select(table.hour, table.state, table.n).where(
                table.sender_id == bindparam("sender_id"),
                table.hour >= bindparam("first"),
                table.state.in_(ends),
            )
            for table in (SenderHourCount, CountDelta)
        )
    ).subquery("part")
    return select(parts.c.hour, parts.c.state, cast(func.sum(parts.c.n), BigInteger)).group_by(
        parts.c.hour, parts.c.state
    )


_HOURS: Final = _hours_statement()


async def read_user(
    connection: AsyncConnection, user_id: str, after_sender_id: int, limit: int
) -> UserStats:
    """Return the stats of one user, and of its first `limit` senders after `after_sender_id`.

    Deleted senders are included, so that the counts of all senders add up to the counts of the
    user. The connection must be a `snapshot`.
    """
    statement = owned_by(
        select(Sender.id, Sender.email)
        .where(Sender.id > after_sender_id)
        .order_by(Sender.id)
        .limit(limit),
        Sender.user_id,
        user_id,
    )
    read_at: datetime = (await connection.execute(select(func.statement_timestamp()))).scalar_one()
    page = (await connection.execute(statement)).all()
    counts = await sender_counts(connection, [row.id for row in page])
    return UserStats(
        counts=await user_counts(connection, user_id),
        senders=[UserSender(row.id, row.email, counts[row.id]) for row in page],
        read_at=read_at,
    )
