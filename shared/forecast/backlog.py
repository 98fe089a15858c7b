"""What a forecast starts from: a sender's limits, its past and its waiting mail, by PostgreSQL.

The past is at most the window's sends; the waiting mail is read job by job only while it is little,
and else as what its batches are known to be. So a forecast costs about the same at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Interval,
    cast,
    func,
    literal,
    select,
    true,
    tuple_,
    type_coerce,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.cooldowns.columns import COOLDOWN_COLUMNS, cooldown_of
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.counts import in_state, sender_counts
from outbox_server.shared.database.models import (
    Attempt,
    Batch,
    BatchCount,
    Cooldown,
    CountDelta,
    EmailJob,
    Sender,
)
from outbox_server.shared.forecast.openings import Openings
from outbox_server.shared.forecast.runs import first_of, in_order, joined
from outbox_server.shared.forecast.simulation import Limiter, Run, Sends
from outbox_server.shared.gap import effective_gap
from outbox_server.shared.states import BatchState, JobState, SenderState

# Jobs that are read one by one, in about 20 ms.
MOST_JOBS: Final = 20_000
# Sends of the window that are read; of more, every n-th.
_MOST_SENDS: Final = 2_000
# Recent sends that say what a send takes.
_SAMPLE: Final = 50
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator sets: `OUTBOX_MIN_GAP`, `OUTBOX_RATE_WINDOW`, `OUTBOX_LEASE`."""

    floor: timedelta
    window: timedelta
    lease: timedelta


@dataclass(frozen=True, slots=True)
class SenderPace:
    """What decides how fast a sender's mail goes, of the moment `now`."""

    now: int
    active: bool
    limiter: Limiter
    # Jobs that wait or are being sent.
    waiting: int
    cooldown: CooldownRecord | None = None


@dataclass(frozen=True, slots=True)
class BacklogPosition:
    """A place in the order of sending: that of one job."""

    due: datetime
    job_id: int

    def before(self) -> ColumnElement[bool]:
        """Return the condition that a job comes before; one that the head's index answers."""
        return tuple_(EmailJob.scheduled_at, EmailJob.id) < tuple_(
            literal(self.due, EmailJob.scheduled_at.type), literal(self.job_id)
        )


def to_us(time: datetime) -> int:
    """Return the time in whole microseconds since 1970."""
    return (time - _EPOCH) // _MICROSECOND


def from_us(microseconds: int) -> datetime:
    """Return the UTC time of `microseconds` since 1970.

    Raises:
        OverflowError: it is beyond the year 9999.
    """
    return _EPOCH + microseconds * _MICROSECOND


async def read_pace(connection: AsyncConnection, sender_id: int, rules: Rules) -> SenderPace:
    """Return the pace of a sender, a deleted one too; whose it is must be known already."""
    last_end = (
        select(func.max(Attempt.ended_at)).where(Attempt.sender_id == Sender.id).scalar_subquery()
    )
    row = (
        await connection.execute(
            select(
                func.statement_timestamp().label("now"),
                Sender.state,
                Sender.deleted_at,
                Sender.hourly_limit,
                Sender.min_gap_ms,
                Sender.max_in_flight,
                Sender.sending_hours,
                last_end.label("last_end"),
                *COOLDOWN_COLUMNS,
            )
            .outerjoin_from(Sender, Cooldown, Cooldown.sender_id == Sender.id)
            .where(Sender.id == sender_id)
        )
    ).one()
    now = to_us(row.now)
    cooldown = cooldown_of(row)
    takes = await _read_takes(connection, sender_id)
    sent = await _read_sends(connection, sender_id, row.hourly_limit, rules.window)
    ends = [to_us(row.last_end)] if row.last_end else []
    for began in await _read_in_flight(connection, sender_id, rules.lease):
        end = max(now, to_us(began) + takes)
        sent.append(Sends(end))
        ends.append(end)
    counts = await sender_counts(connection, [sender_id])
    gap = effective_gap(row.min_gap_ms, rules.floor)
    return SenderPace(
        now=now,
        active=row.deleted_at is None and row.state == SenderState.ACTIVE,
        limiter=Limiter(
            limit=row.hourly_limit,
            gap=gap // _MICROSECOND,
            window=rules.window // _MICROSECOND,
            max_in_flight=row.max_in_flight,
            takes=takes,
            hours=None if row.sending_hours is None else Openings.from_text(row.sending_hours),
            next_probe=None if cooldown is None else to_us(cooldown.next_probe_at),
            sent=sent,
            last_end=max(ends, default=None),
        ),
        waiting=counts[sender_id].scheduled,
        cooldown=cooldown,
    )


async def _read_takes(connection: AsyncConnection, sender_id: int) -> int:
    """Return what a send took of late, from the instant at which it was allowed to its end.

    The mean of what SMTP took, and the median of the lateness: a sender that was idle, or a
    dispatcher that was away, says nothing of the pace.
    """
    recent = (
        select((Attempt.ended_at - Attempt.started_at).label("took"), Attempt.late_ms)
        .where(Attempt.sender_id == sender_id, Attempt.counted)
        .order_by(Attempt.ended_at.desc())
        .limit(_SAMPLE)
        .subquery()
    )
    row = (
        await connection.execute(
            select(
                type_coerce(func.avg(recent.c.took), Interval()).label("took"),
                func.percentile_disc(0.5).within_group(recent.c.late_ms).label("late_ms"),
            )
        )
    ).one()
    took = row.took or timedelta(0)
    return took // _MICROSECOND + (row.late_ms or 0) * 1_000


async def _read_sends(
    connection: AsyncConnection, sender_id: int, limit: int, window: timedelta
) -> list[Sends]:
    """Return the ends in the window, at most `limit`; of very many, what every n-th says."""
    ends = (
        select(
            Attempt.ended_at,
            func.row_number().over(order_by=Attempt.ended_at.desc()).label("rank"),
            func.least(func.count().over(), limit).label("total"),
        )
        .where(
            Attempt.sender_id == sender_id,
            Attempt.counted,
            # Not clock_timestamp(): an index is not searched for what changes on the way.
            Attempt.ended_at > func.statement_timestamp() - window,
        )
        .subquery()
    )
    every = func.div(ends.c.total - 1, _MOST_SENDS) + 1
    rows = (
        await connection.execute(
            select(ends.c.ended_at, ends.c.rank, ends.c.total)
            .where(ends.c.rank <= limit, (ends.c.rank - 1) % every == 0)
            .order_by(ends.c.rank.desc())
        )
    ).all()
    if not rows:
        return []
    sends = []
    if rows[0].rank < rows[0].total:
        sends.append(Sends(to_us(rows[0].ended_at), rows[0].total - rows[0].rank))
    for one, other in pairwise(rows):
        first, count = to_us(one.ended_at), one.rank - other.rank
        sends.append(Sends(first, count, (to_us(other.ended_at) - first) // count))
    sends.append(Sends(to_us(rows[-1].ended_at)))
    return sends


async def _read_in_flight(
    connection: AsyncConnection, sender_id: int, lease: timedelta
) -> Sequence[datetime]:
    """Return since when each job in SENDING is held."""
    rows = await connection.execute(
        select(EmailJob.lease_until - lease)
        .where(EmailJob.sender_id == sender_id, in_state(JobState.SENDING))
        .order_by(EmailJob.lease_until)
    )
    return [began for began in rows.scalars() if began]


async def read_backlog(
    connection: AsyncConnection, sender_id: int, waiting: int, batch_id: int | None
) -> list[Run]:
    """Return what waits of a sender, in the order of sending; mine are the jobs of `batch_id`."""
    if waiting <= MOST_JOBS:
        return await _read_jobs(connection, sender_id, batch_id)
    return await _read_batches(connection, sender_id, batch_id)


async def count_ahead(
    connection: AsyncConnection, sender_id: int, place: BacklogPosition, most: int
) -> int:
    """Return how many waiting jobs of a sender come before `place`, at most `most`."""
    jobs = (
        select(EmailJob.id)
        .where(EmailJob.sender_id == sender_id, waits_of(sender_id), place.before())
        .limit(most)
        .subquery()
    )
    return int(await connection.scalar(select(func.count()).select_from(jobs)) or 0)


async def read_ahead(
    connection: AsyncConnection, sender_id: int, place: BacklogPosition, ahead: int
) -> list[Run]:
    """Return the `ahead` jobs that wait before `place`, in the order of sending."""
    if ahead <= MOST_JOBS:
        return await _read_jobs(connection, sender_id, None, place)
    return first_of(await _read_batches(connection, sender_id, None), ahead)


async def _read_jobs(
    connection: AsyncConnection,
    sender_id: int,
    batch_id: int | None,
    until: BacklogPosition | None = None,
) -> list[Run]:
    """Return runs as the jobs are: of one batch each, due and expiring at once."""
    order = (EmailJob.scheduled_at, EmailJob.id)
    place = func.row_number().over(order_by=order)
    place_in_batch = func.row_number().over(
        partition_by=(EmailJob.scheduled_at, EmailJob.batch_id, EmailJob.expires_at),
        order_by=EmailJob.id,
    )
    # Neighbours of one batch and one due time have the same difference. A retry moves that time,
    # and not when the job expires.
    jobs = (
        select(
            EmailJob.id,
            EmailJob.scheduled_at,
            EmailJob.expires_at,
            EmailJob.batch_id,
            (place - place_in_batch).label("group"),
        )
        .where(
            EmailJob.sender_id == sender_id,
            waits_of(sender_id),
            true() if until is None else until.before(),
        )
        .order_by(*order)
        .limit(2 * MOST_JOBS)
        .subquery()
    )
    rows = await connection.execute(
        select(jobs.c.scheduled_at, jobs.c.expires_at, jobs.c.batch_id, func.count().label("n"))
        .group_by(jobs.c.scheduled_at, jobs.c.expires_at, jobs.c.batch_id, jobs.c.group)
        .order_by(jobs.c.scheduled_at, func.min(jobs.c.id))
    )
    return list(
        joined(
            (
                row.batch_id,
                Run(
                    due=to_us(row.scheduled_at),
                    count=row.n,
                    mine=row.n if row.batch_id == batch_id else 0,
                    expire_after=row.expires_at
                    and (row.expires_at - row.scheduled_at) // _MICROSECOND,
                ),
            )
            for row in rows
        )
    )


async def _read_batches(
    connection: AsyncConnection, sender_id: int, batch_id: int | None
) -> list[Run]:
    """Return runs as the batches say: the last jobs of each, evenly spaced up to its last."""
    state = int(JobState.SCHEDULED)
    parts = union_all(
        select(BatchCount.batch_id, BatchCount.n)
        .join(Batch, Batch.id == BatchCount.batch_id)
        .where(Batch.sender_id == sender_id, BatchCount.state == state),
        select(CountDelta.batch_id, CountDelta.n).where(
            CountDelta.sender_id == sender_id, CountDelta.state == state
        ),
    ).subquery("part")
    waiting = (
        select(parts.c.batch_id, cast(func.sum(parts.c.n), BigInteger).label("n"))
        .group_by(parts.c.batch_id)
        .having(func.sum(parts.c.n) > literal(0))
        .subquery("waiting")
    )
    rows = await connection.execute(
        select(
            Batch.id,
            Batch.start_at,
            Batch.last_due_at,
            Batch.accepted_count,
            Batch.expire_after_ms,
            waiting.c.n,
        )
        .join(waiting, waiting.c.batch_id == Batch.id)
        .where(Batch.state == BatchState.ACTIVE)
        .order_by(Batch.id)
    )
    runs = []
    for row in rows:
        last_due = to_us(row.last_due_at or row.start_at)
        step = (last_due - to_us(row.start_at)) // max(row.accepted_count - 1, 1)
        runs.append(
            Run(
                due=last_due - (row.n - 1) * step,
                count=row.n,
                step=step,
                mine=row.n if row.id == batch_id else 0,
                expire_after=row.expire_after_ms and row.expire_after_ms * 1_000,
            )
        )
    return in_order(runs)
