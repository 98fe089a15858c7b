"""The statements that show, release and cancel held mail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Subquery,
    and_,
    any_,
    case,
    exists,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.cancelling import (
    SWEPT_AT_ONCE,
    EndedJobs,
    end_waiting,
    lock_batches,
)
from outbox_server.shared.database.cancellations import being_cancelled, is_now
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import Batch, EmailJob, HoldRelease, HoldRow, Sender
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.heads.markers import marking_stale
from outbox_server.shared.holds.conditions import may_be_sent, was_sending
from outbox_server.shared.holds.storage import HoldRecord, read_hold
from outbox_server.shared.states import JobState

# Each waiting job is compared with each of them.
MOST_RELEASES: Final = 1_000
MOST_SENDERS_SHOWN: Final = 100
_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class HeldFilter:
    """Which held jobs to take; None means any. `sending`: those SENDING when the hold began."""

    user_id: str | None = None
    sender_id: int | None = None
    batch_id: int | None = None
    due_from: datetime | None = None
    due_before: datetime | None = None
    sending: bool | None = None


@dataclass(frozen=True, slots=True)
class HeldGroupRecord:
    """The held jobs of one state and age; `age` is the number of a HeldAge."""

    sending: bool
    age: int
    jobs: int
    first_due: datetime
    last_due: datetime


@dataclass(frozen=True, slots=True)
class HeldSenderRecord:
    """The held jobs of one sender."""

    sender_id: int
    user_id: str
    email: str
    jobs: int
    overdue: int
    sending: int
    first_due: datetime
    last_due: datetime


@dataclass(frozen=True, slots=True)
class HeldJobs:
    """The held jobs by state and age, and the senders with the most of them."""

    groups: Sequence[HeldGroupRecord]
    senders: Sequence[HeldSenderRecord]
    sender_count: int


async def lock_hold(connection: AsyncConnection, *, lock: bool = True) -> HoldRecord | None:
    """Return the hold, for an operator's call; None if the installation is not held."""
    bound = owned_by(select(literal(1)), Sender.user_id, None)
    await connection.execute(bound)
    return await read_hold(connection, lock=lock)


def _matches(which: HeldFilter) -> tuple[ColumnElement[bool], ...]:
    found: list[ColumnElement[bool]] = []
    if which.user_id is not None:
        senders = select(Sender.id).where(Sender.user_id == which.user_id)
        found.append(EmailJob.sender_id.in_(senders))
    if which.sender_id is not None:
        found.append(EmailJob.sender_id == which.sender_id)
    if which.batch_id is not None:
        found.append(EmailJob.batch_id == which.batch_id)
    if which.due_from is not None:
        found.append(EmailJob.scheduled_at >= which.due_from)
    if which.due_before is not None:
        found.append(EmailJob.scheduled_at < which.due_before)
    if which.sending is not None:
        found.append(was_sending() if which.sending else ~was_sending())
    return tuple(found)


def _held(which: HeldFilter) -> Subquery:
    """Return the held jobs that match: those that wait, and those that will wait again."""
    jobs = select(
        EmailJob.id,
        EmailJob.sender_id,
        EmailJob.scheduled_at,
        EmailJob.state,
        was_sending().label("sending"),
    ).where(~may_be_sent(), *_matches(which))
    waiting = jobs.where(in_state(JobState.SCHEDULED), ~being_cancelled())
    sending = jobs.where(in_state(JobState.SENDING), was_sending())
    return waiting.union_all(sending).subquery("held")


async def read_held(connection: AsyncConnection, which: HeldFilter) -> HeldJobs:
    """Count the held jobs. The connection must be a snapshot. Every waiting job is read."""
    held = _held(which)
    ahead = held.c.scheduled_at - func.statement_timestamp()
    age = case(
        (ahead < -_DAY, 1),
        (ahead < -_HOUR, 2),
        (ahead <= timedelta(0), 3),
        (ahead <= _HOUR, 4),
        (ahead <= _DAY, 5),
        else_=6,
    ).label("age")
    dues: tuple[Any, ...] = (func.min(held.c.scheduled_at), func.max(held.c.scheduled_at))
    groups = await connection.execute(
        select(held.c.sending, age, func.count(), *dues)
        .group_by(held.c.sending, age)
        .order_by(held.c.sending.desc(), age)
    )
    by_sender = (
        select(
            held.c.sender_id,
            func.count().label("jobs"),
            func.count().filter(ahead <= timedelta(0), ~held.c.sending).label("overdue"),
            func.count().filter(held.c.sending).label("sending"),
            func.min(held.c.scheduled_at).label("first_due"),
            func.max(held.c.scheduled_at).label("last_due"),
            func.count().over().label("sender_count"),
        )
        .group_by(held.c.sender_id)
        .order_by(func.count().desc(), held.c.sender_id)
        .limit(MOST_SENDERS_SHOWN)
        .subquery()
    )
    senders = (
        await connection.execute(
            select(by_sender, Sender.user_id, Sender.email)
            .join(Sender, Sender.id == by_sender.c.sender_id)
            .order_by(by_sender.c.jobs.desc(), by_sender.c.sender_id)
        )
    ).all()
    return HeldJobs(
        [HeldGroupRecord(*row) for row in groups],
        [
            HeldSenderRecord(
                row.sender_id,
                row.user_id,
                row.email,
                row.jobs,
                row.overdue,
                row.sending,
                row.first_due,
                row.last_due,
            )
            for row in senders
        ],
        senders[0].sender_count if senders else 0,
    )


async def list_releases(connection: AsyncConnection) -> Sequence[HeldFilter]:
    """Return the filters that were released, the oldest first."""
    found = await connection.execute(
        select(
            HoldRelease.user_id,
            HoldRelease.sender_id,
            HoldRelease.batch_id,
            HoldRelease.due_from,
            HoldRelease.due_before,
            HoldRelease.sending,
        ).order_by(HoldRelease.id)
    )
    return [HeldFilter(*row) for row in found]


async def request_loads(connection: AsyncConnection, which: HeldFilter) -> tuple[int, list[int]]:
    """Request loads of the senders of held jobs that match. Return how many jobs, and the senders.

    It must come before the release, after which they are not held any more.
    """
    held = _held(which)
    groups = (
        select(held.c.sender_id, func.count().label("n")).group_by(held.c.sender_id).cte("groups")
    )
    rows = (
        await connection.execute(
            select(groups.c.sender_id, groups.c.n).add_cte(marking_stale(groups))
        )
    ).all()
    return sum(row.n for row in rows), [row.sender_id for row in rows]


async def add_release(connection: AsyncConnection, which: HeldFilter) -> None:
    """Release all mail that matches, also mail that is accepted later."""
    await connection.execute(
        insert(HoldRelease).values(
            user_id=which.user_id,
            sender_id=which.sender_id,
            batch_id=which.batch_id,
            due_from=which.due_from,
            due_before=which.due_before,
            sending=which.sending,
        )
    )


async def cancel_held(connection: AsyncConnection, which: HeldFilter, after: int) -> EndedJobs:
    """Cancel the next held jobs after an id, at most as many as one transaction should move.

    `last_id` of the result is where the next call continues; 0 if no jobs are left.
    """
    matches = and_(~may_be_sent(), *_matches(which))
    waiting = and_(EmailJob.id > after, is_now(JobState.SCHEDULED), matches)
    next_jobs = select(EmailJob.id, EmailJob.batch_id).where(waiting).order_by(EmailJob.id)
    found = (await connection.execute(next_jobs.limit(SWEPT_AT_ONCE))).all()
    batch_ids = literal(sorted({row.batch_id for row in found}), ARRAY(BigInteger))
    await lock_batches(connection, Batch.id == any_(batch_ids))
    these = EmailJob.id == any_(literal([row.id for row in found], ARRAY(BigInteger)))
    ended = await end_waiting(connection, these & matches, JobState.CANCELLED)
    return replace(ended, last_id=found[-1].id if len(found) == SWEPT_AT_ONCE else 0)


async def count_sending(connection: AsyncConnection, which: HeldFilter) -> int:
    """Return how many held jobs that match are still SENDING."""
    held = _held(which)
    count = select(func.count()).select_from(held).where(held.c.state == JobState.SENDING)
    return int(await connection.scalar(count) or 0)


async def any_held(connection: AsyncConnection) -> bool:
    """Return whether any job is held."""
    held = _held(HeldFilter())
    return bool(await connection.scalar(select(exists(select(held.c.id)))))


async def is_held(connection: AsyncConnection, job_id: int) -> bool:
    """Return whether a waiting job is held."""
    statement = select(select(HoldRow.singleton).exists() & ~may_be_sent()).where(
        EmailJob.id == job_id
    )
    return bool(await connection.scalar(statement))
