"""The SQL of the audit, without the recount. Large tables are read with server-side cursors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Double,
    Select,
    and_,
    case,
    cast,
    extract,
    func,
    select,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.audit.jobs import JobTrace
from outbox_server.shared.database.cancellations import state_now
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import (
    Attempt,
    Batch,
    EmailJob,
    Installation,
    PurgedCount,
    Sender,
    UserRow,
)
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.states import AttemptOutcome, JobState

_Statement: TypeAlias = Select[*tuple[Any, ...]]
_ROWS_AT_ONCE: Final = 2_000
_DOUBTFUL: Final = (AttemptOutcome.IN_DOUBT, AttemptOutcome.LEASE_EXPIRED)
# Any running dispatcher recovers a job within moments after its lease expired.
_STUCK_AFTER: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class AuditedSender:
    """A sender (it may be deleted) with its current limits."""

    sender_id: int
    email: str
    hourly_limit: int
    min_gap_ms: int | None
    # The time of its last change. None means that it was never changed.
    changed_at: datetime | None
    user_id: str


@dataclass(frozen=True, slots=True)
class AuditedUser:
    """A user with the limits that were set for it. None means those of all users."""

    user_id: str
    hourly_limit: int | None = None
    min_gap_ms: int | None = None
    # The time of its last change. None means that it was never changed.
    changed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """The result of a recount of the rows."""

    # A waiting job of a cancelled batch counts as CANCELLED.
    by_state: dict[JobState, int]
    # Number of jobs that were removed after OUTBOX_RETENTION. They are not judged.
    purged: int
    # Number of jobs that the batches accepted, and of those without a row.
    accepted: int
    missing: int
    # Number of jobs in SENDING although their lease expired long ago.
    stuck: int
    in_doubt: int


async def installation_id(connection: AsyncConnection) -> str | None:
    """Return the id in the Message-IDs of this installation; None if it has sent no mail."""
    return await connection.scalar(select(Installation.installation_id))


async def read_senders(connection: AsyncConnection) -> dict[int, AuditedSender]:
    """Return every sender by its id."""
    changed = case((Sender.revision > 1, Sender.updated_at))
    rows = await connection.execute(
        select(
            Sender.id,
            Sender.email,
            Sender.hourly_limit,
            Sender.min_gap_ms,
            changed.label("changed_at"),
            Sender.user_id,
        )
    )
    return {row.id: AuditedSender(*row) for row in rows}


async def read_users(connection: AsyncConnection) -> dict[str, AuditedUser]:
    """Return every user for which something was set, by its id."""
    rows = await connection.execute(
        select(UserRow.user_id, UserRow.hourly_limit, UserRow.min_gap_ms, UserRow.updated_at)
    )
    return {row.user_id: AuditedUser(*row) for row in rows}


async def stream_sends_of_users(
    connection: AsyncConnection, user_ids: Iterable[str]
) -> AsyncIterator[tuple[str, float, float]]:
    """Yield (user, start, end) of every send of these users, ordered by user and end."""
    statement = (
        select(Sender.user_id, _seconds(Attempt.started_at), _seconds(Attempt.ended_at))
        .join(Sender, Sender.id == Attempt.sender_id)
        .where(
            Sender.user_id.in_(list(user_ids)),
            Attempt.counted,
            Attempt.outcome != AttemptOutcome.LEASE_EXPIRED,
        )
        .order_by(Sender.user_id, Attempt.ended_at)
    )
    async for row in await _stream(connection, statement):
        yield row[0], row[1], row[2]


async def read_totals(connection: AsyncConnection) -> Totals:
    """Count all jobs again from their rows."""
    states = select(state_now().label("state")).subquery("states")
    by_state = await connection.execute(
        select(states.c.state, func.count()).group_by(states.c.state)
    )
    each = union_all(
        select(EmailJob.batch_id, func.count().label("n")).group_by(EmailJob.batch_id),
        select(PurgedCount.batch_id, PurgedCount.n),
    ).subquery()
    rows = (
        select(each.c.batch_id, func.sum(each.c.n).label("n")).group_by(each.c.batch_id).subquery()
    )
    short = Batch.accepted_count - func.coalesce(rows.c.n, 0)
    accepted, missing = (
        await connection.execute(
            select(
                func.coalesce(func.sum(Batch.accepted_count), 0),
                func.coalesce(func.sum(func.greatest(short, 0)), 0),
            ).join_from(Batch, rows, rows.c.batch_id == Batch.id, isouter=True)
        )
    ).one()
    stuck = select(func.count()).where(
        in_state(JobState.SENDING),
        EmailJob.lease_until < func.statement_timestamp() - _STUCK_AFTER,
    )
    in_doubt = select(func.count()).where(Attempt.outcome.in_(_DOUBTFUL))
    return Totals(
        by_state={JobState(state): n for state, n in by_state},
        purged=int(await connection.scalar(select(func.coalesce(func.sum(PurgedCount.n), 0))) or 0),
        accepted=int(accepted),
        missing=int(missing),
        stuck=await connection.scalar(stuck) or 0,
        in_doubt=await connection.scalar(in_doubt) or 0,
    )


def _seconds(time: Any) -> ColumnElement[float]:
    return cast(extract("epoch", time), Double)


async def stream_sends(connection: AsyncConnection) -> AsyncIterator[tuple[int, float, float]]:
    """Yield (sender, start, end) of every send, ordered by sender and end.

    Attempts whose lease expired are left out: whether and when they were sent is unknown.
    """
    statement = (
        select(Attempt.sender_id, _seconds(Attempt.started_at), _seconds(Attempt.ended_at))
        .where(Attempt.counted, Attempt.outcome != AttemptOutcome.LEASE_EXPIRED)
        .order_by(Attempt.sender_id, Attempt.ended_at)
    )
    async for row in await _stream(connection, statement):
        yield row[0], row[1], row[2]


async def stream_job_ids(connection: AsyncConnection) -> AsyncIterator[int]:
    """Yield the id of every job, in ascending order."""
    async for (job_id,) in await _stream(connection, select(EmailJob.id).order_by(EmailJob.id)):
        yield job_id


async def stream_jobs(
    connection: AsyncConnection, receiver_id: str | None
) -> AsyncIterator[tuple[JobTrace, int]]:
    """Yield every job and its sender, ordered by the job's id.

    A send went to the SMTP side if its reply names `receiver_id`; None means that all did.
    """
    of_job = Attempt.email_job_id == EmailJob.id
    sent = Attempt.outcome == AttemptOutcome.SENT
    to_smtp_side = sent if receiver_id is None else and_(sent, _names(receiver_id))
    statement = (
        select(
            EmailJob.id,
            EmailJob.sender_id,
            state_now(),
            EmailJob.attempt,
            func.coalesce(func.max(Attempt.attempt), 0),
            func.count().filter(sent),
            func.count().filter(to_smtp_side),
            func.count().filter(Attempt.outcome.in_(_DOUBTFUL)),
            func.coalesce(func.bool_or(Attempt.started_at > EmailJob.finished_at), False),
        )
        .join_from(EmailJob, Attempt, of_job, isouter=True)
        .group_by(EmailJob.id)
        .order_by(EmailJob.id)
    )
    async for job_id, sender_id, state, *numbers in await _stream(connection, statement):
        yield JobTrace(job_id, JobState(state), *numbers), sender_id


def _names(receiver_id: str) -> ColumnElement[bool]:
    return func.strpos(Attempt.message, receiver_id) > 0


async def _stream(connection: AsyncConnection, statement: _Statement) -> Any:
    return await connection.stream(statement, execution_options={"yield_per": _ROWS_AT_ONCE})


@dataclass(frozen=True, slots=True)
class Interval:
    """A span of time; None at either end means that it has no bound there."""

    start: datetime | None = None
    end: datetime | None = None

    def contains(self, time: Any, reach: timedelta = timedelta(0)) -> list[ColumnElement[bool]]:
        """Return the conditions that `time` is within it, or up to `reach` before it."""
        conditions: list[ColumnElement[bool]] = []
        if self.start is not None:
            conditions.append(time >= self.start - reach)
        if self.end is not None:
            conditions.append(time < self.end)
        return conditions


@dataclass(frozen=True, slots=True)
class SenderLimits:
    """The current limits of one sender."""

    hourly_limit: int
    min_gap_ms: int | None


async def read_limits(
    connection: AsyncConnection, sender_id: int, user_id: str | None
) -> SenderLimits | None:
    """Return the limits of a sender; None if this user has no such sender."""
    statement = select(Sender.hourly_limit, Sender.min_gap_ms).where(
        Sender.id == sender_id, Sender.deleted_at.is_(None)
    )
    row = (await connection.execute(owned_by(statement, Sender.user_id, user_id))).one_or_none()
    return None if row is None else SenderLimits(*row)


async def stream_sends_of(
    connection: AsyncConnection, sender_id: int, interval: Interval, reach: timedelta
) -> AsyncIterator[tuple[datetime, datetime]]:
    """Yield (start, end) of the sends that took an entry, in the order of their ends.

    They ended within the interval, or up to `reach` before it.
    """
    statement = (
        select(Attempt.started_at, Attempt.ended_at)
        .where(
            Attempt.sender_id == sender_id,
            Attempt.counted,
            *interval.contains(Attempt.ended_at, reach),
        )
        .order_by(Attempt.ended_at, Attempt.started_at)
    )
    async for row in await _stream(connection, statement):
        yield row.started_at, row.ended_at


async def count_sends(
    connection: AsyncConnection, sender_id: int, interval: Interval
) -> tuple[int, int]:
    """Return how many jobs were sent, and how many sends were not the first of their job."""
    may_have_sent = Attempt.outcome.in_((AttemptOutcome.SENT, *_DOUBTFUL))
    sends = func.count().filter(may_have_sent)
    jobs = func.count(Attempt.email_job_id.distinct()).filter(may_have_sent)
    sent = func.count(Attempt.email_job_id.distinct()).filter(
        Attempt.outcome == AttemptOutcome.SENT
    )
    statement = select(sent.label("sent"), (sends - jobs).label("again")).where(
        Attempt.sender_id == sender_id, Attempt.counted, *interval.contains(Attempt.ended_at)
    )
    row = (await connection.execute(statement)).one()
    return row.sent, row.again


async def count_missing(connection: AsyncConnection, sender_id: int) -> int:
    """Return how many accepted jobs of a sender have no row and were not removed by retention."""
    accepted = select(func.coalesce(func.sum(Batch.accepted_count), 0)).where(
        Batch.sender_id == sender_id
    )
    there = (
        select(func.count())
        .select_from(EmailJob)
        .join(Batch, Batch.id == EmailJob.batch_id)
        .where(Batch.sender_id == sender_id)
    )
    purged = (
        select(func.coalesce(func.sum(PurgedCount.n), 0))
        .select_from(PurgedCount)
        .join(Batch, Batch.id == PurgedCount.batch_id)
        .where(Batch.sender_id == sender_id)
    )
    found = select(accepted.scalar_subquery() - there.scalar_subquery() - purged.scalar_subquery())
    return int(await connection.scalar(found) or 0)
