"""Reads the waiting mail of a sender from PostgreSQL, in the order of sending.

If there are few jobs, they are read one by one; otherwise they are computed from the batches. So a
forecast costs about the same at any size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    bindparam,
    cast,
    func,
    literal,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.models import (
    Batch,
    BatchCount,
    CountDelta,
    EmailJob,
)
from outbox_server.shared.database.pauses import sendable_of
from outbox_server.shared.forecast.batch_pauses import after_pauses
from outbox_server.shared.forecast.job_groups import first_of, in_order
from outbox_server.shared.forecast.microseconds import MICROSECOND, to_us
from outbox_server.shared.forecast.pace import SenderPace
from outbox_server.shared.forecast.simulation import JobGroup
from outbox_server.shared.states import BatchState, JobState

# The maximum number of jobs that are read one by one, in about 20 ms.
MOST_JOBS: Final = 20_000


@dataclass(frozen=True, slots=True)
class BacklogPosition:
    """The position of a job in the order of sending."""

    due: datetime
    job_id: int

    def before(self) -> ColumnElement[bool]:
        """Return the condition that a job comes before this one; the head's index serves it."""
        return tuple_(EmailJob.scheduled_at, EmailJob.id) < tuple_(
            literal(self.due, EmailJob.scheduled_at.type), literal(self.job_id)
        )


# The statement for jobs is built once, because that takes longer than to run it for a sender.
_SENDER: Final[Any] = bindparam("sender_id", type_=BigInteger)


async def read_backlog(
    connection: AsyncConnection, sender_id: int, pace: SenderPace, batch_id: int | None
) -> list[JobGroup]:
    """Return a sender's waiting mail in the order of sending; `mine` counts jobs of `batch_id`."""
    if pace.waiting <= MOST_JOBS:
        return await _read_jobs(connection, sender_id, pace, batch_id)
    return await _read_batches(connection, sender_id, pace, batch_id)


async def count_ahead(
    connection: AsyncConnection,
    sender_id: int,
    place: BacklogPosition,
    most: int,
    *,
    paused: bool = False,
) -> int:
    """Return how many waiting jobs of a sender come before `place`, at most `most`.

    Jobs of paused batches do not count, unless the job at `place` is of one (`paused`).
    """
    waits = waits_of(sender_id) if paused else sendable_of(sender_id)
    jobs = (
        select(EmailJob.id)
        .where(EmailJob.sender_id == sender_id, waits, place.before())
        .limit(most)
        .subquery()
    )
    return int(await connection.scalar(select(func.count()).select_from(jobs)) or 0)


async def read_ahead(
    connection: AsyncConnection,
    sender_id: int,
    pace: SenderPace,
    place: BacklogPosition,
    ahead: int,
) -> list[JobGroup]:
    """Return the `ahead` waiting jobs before `place`, in the order of sending."""
    if ahead <= MOST_JOBS:
        return await _read_jobs(connection, sender_id, pace, None, place)
    return first_of(await _read_batches(connection, sender_id, pace, None), ahead)


def _jobs_statement(until: ColumnElement[bool]) -> Select[Any]:
    order = (EmailJob.scheduled_at, EmailJob.id)
    place = func.row_number().over(order_by=order)
    place_in_batch = func.row_number().over(
        partition_by=(EmailJob.scheduled_at, EmailJob.batch_id, EmailJob.expires_at),
        order_by=EmailJob.id,
    )
    # Neighbours of one batch and due time have the same difference. A retry moves the due time, but
    # not the time at which the job expires.
    jobs = (
        select(
            EmailJob.id,
            EmailJob.scheduled_at,
            EmailJob.expires_at,
            EmailJob.batch_id,
            (place - place_in_batch).label("group"),
        )
        .where(EmailJob.sender_id == _SENDER, waits_of(_SENDER), until)
        .order_by(*order)
        .limit(2 * MOST_JOBS)
        .subquery()
    )
    return (
        select(jobs.c.scheduled_at, jobs.c.expires_at, jobs.c.batch_id, func.count().label("n"))
        .group_by(jobs.c.scheduled_at, jobs.c.expires_at, jobs.c.batch_id, jobs.c.group)
        .order_by(jobs.c.scheduled_at, func.min(jobs.c.id))
    )


_JOBS: Final = _jobs_statement(true())


async def _read_jobs(
    connection: AsyncConnection,
    sender_id: int,
    pace: SenderPace,
    batch_id: int | None,
    until: BacklogPosition | None = None,
) -> list[JobGroup]:
    """Return groups from the jobs; each group is of one batch, due time and expiry."""
    statement = _JOBS if until is None else _jobs_statement(until.before())
    rows = await connection.execute(statement, {"sender_id": sender_id})
    return after_pauses(
        (
            (
                row.batch_id,
                JobGroup(
                    due=to_us(row.scheduled_at),
                    count=row.n,
                    mine=row.n if row.batch_id == batch_id else 0,
                    expire_after=row.expires_at
                    and (row.expires_at - row.scheduled_at) // MICROSECOND,
                ),
            )
            for row in rows
        ),
        pace.pauses,
    )


async def _read_batches(
    connection: AsyncConnection, sender_id: int, pace: SenderPace, batch_id: int | None
) -> list[JobGroup]:
    """Return groups computed from the batches: the last jobs of each, evenly spaced."""
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
            func.coalesce(Batch.spread_count, Batch.accepted_count).label("spread"),
            Batch.expire_after_ms,
            waiting.c.n,
        )
        .join(waiting, waiting.c.batch_id == Batch.id)
        .where(Batch.state == BatchState.ACTIVE)
        .order_by(Batch.id)
    )
    groups = []
    for row in rows:
        last_due = to_us(row.last_due_at or row.start_at)
        step = (last_due - to_us(row.start_at)) // max(row.spread - 1, 1)
        group = JobGroup(
            due=last_due - (row.n - 1) * step,
            count=row.n,
            step=step,
            mine=row.n if row.id == batch_id else 0,
            expire_after=row.expire_after_ms and row.expire_after_ms * 1_000,
        )
        groups.append((row.id, group))
    # A user may have very many batches.
    return await asyncio.to_thread(_ordered, groups, pace.pauses)


def _ordered(
    groups: Sequence[tuple[int, JobGroup]], pauses: Mapping[int, int | None]
) -> list[JobGroup]:
    return after_pauses(groups, pauses) if pauses else in_order(group for _, group in groups)
