"""Changes the jobs that match a filter, a part in each transaction.

A part finds some jobs as a list does (`walking`), so it belongs to the same user, and then changes
those that still match. The next part continues after the last job that was found.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    any_,
    cast,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.filters.fields import FieldTest, Filter, required
from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.cancelling import end_waiting
from outbox_server.services.scheduler.storage.conditions import JOB_LEAVES, condition
from outbox_server.services.scheduler.storage.counted_states import has_counted
from outbox_server.services.scheduler.storage.job_filters import (
    JobFilter,
    JobPosition,
    batch_condition,
    is_batch_level,
)
from outbox_server.services.scheduler.storage.reopening import keeping_quota, retry_named
from outbox_server.services.scheduler.storage.walking import next_batches, skip_older, walk_jobs
from outbox_server.shared.database.cancellations import is_now
from outbox_server.shared.database.counts import batch_counts
from outbox_server.shared.database.models import Batch, BatchCancellation, EmailJob, Sender
from outbox_server.shared.heads.markers import mark_stale, marking_stale
from outbox_server.shared.states import BatchState, JobState
from outbox_server.shared.user_quotas import UserQuotas

# The number of jobs that one transaction changes, in about 0.2 s, and that one part looks at.
_JOBS_AT_ONCE: Final = 5_000
_ROWS_AT_ONCE: Final = 20_000
# Each batch takes some statements to retry, and a row lock to cancel.
_RETRIED_BATCHES: Final = 50
_CANCELLED_BATCHES: Final = 1_000
_WAITING: Final = FieldTest("state", "=", int(JobState.SCHEDULED))
# The latest time that a job may get, so that it can be shown, with its expiry.
_LATEST: Final = datetime.fromisoformat("9990-01-01T00:00:00+00:00")


@dataclass(frozen=True, slots=True)
class ChangedJobs:
    """How many jobs a part has changed, or would change, and where the next part continues.

    `sender_ids` is empty if nothing was changed.
    """

    jobs: int = 0
    sender_ids: frozenset[int] = frozenset()
    # None means that there are no more.
    reached: JobPosition | None = None


def is_about_batches(tree: Filter | None) -> bool:
    """Return whether the filter means all waiting jobs of some batches, or none of them."""
    return all(term == _WAITING or is_batch_level(term) for term in required(tree))


async def owner_of_senders(connection: AsyncConnection, sender_ids: Collection[int]) -> str | None:
    """Return the user that owns these senders, which have one owner."""
    these = Sender.id == any_(literal(list(sender_ids), ARRAY(BigInteger)))
    return await connection.scalar(select(Sender.user_id).where(these).limit(1))


async def _find(
    connection: AsyncConnection, which: JobFilter, after: JobPosition
) -> tuple[list[JobPosition], JobPosition | None]:
    walked = await walk_jobs(connection, which, after, _JOBS_AT_ONCE, rows=_ROWS_AT_ONCE)
    found = list(walked.found)
    return found, found[-1] if len(found) == _JOBS_AT_ONCE else walked.reached


def _these(found: list[JobPosition], which: JobFilter) -> ColumnElement[bool]:
    """Return the condition for jobs that were found, if they still match."""
    ids = literal([job_id for _, job_id in found], ARRAY(BigInteger))
    return (EmailJob.id == any_(ids)) & condition(which.tree, JOB_LEAVES)


async def count_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition
) -> ChangedJobs:
    """Count some jobs that match, and change nothing."""
    found, reached = await _find(connection, which, after)
    return ChangedJobs(len(found), reached=reached)


async def cancel_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition
) -> ChangedJobs:
    """Cancel some waiting jobs that match."""
    found, reached = await _find(connection, which, after)
    if not found:
        return ChangedJobs(reached=reached)
    ended = await end_waiting(connection, _these(found, which), JobState.CANCELLED)
    return ChangedJobs(ended.jobs, frozenset(ended.sender_ids), reached)


async def cancel_batches_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, *, count_only: bool = False
) -> ChangedJobs:
    """Cancel some batches with open jobs that match, as `cancel_batch` does.

    A job in flight is not waiting, but after a failed attempt it would be tried again. Count the
    waiting jobs; with `count_only`, do nothing else.
    """
    after = await skip_older(connection, which, after)
    found = await search(
        connection,
        next_batches(which, after).where(Batch.state == BatchState.ACTIVE),
        Batch.id,
        batch_condition(which.tree) & has_counted({JobState.SCHEDULED}),
        _CANCELLED_BATCHES,
        descending=False,
        most=_ROWS_AT_ONCE,
    )
    ids = [row.id for row in found.rows]
    last = ids[-1] if len(ids) == _CANCELLED_BATCHES else found.reached
    reached = None if last is None else which.after_batch(last)
    # Locked in the order of ids: two cancellations never wait for one another.
    these = Batch.id == any_(literal(ids, ARRAY(BigInteger)))
    locked = select(Batch.id).where(these, Batch.state == BatchState.ACTIVE).order_by(Batch.id)
    if not count_only:
        locked = locked.with_for_update()
    counts = await batch_counts(connection, (await connection.execute(locked)).scalars().all())
    opened = [batch_id for batch_id, each in counts.items() if each.open]
    jobs = sum(counts[batch_id].scheduled for batch_id in opened)
    if count_only or not opened:
        return ChangedJobs(jobs, reached=reached)
    now = func.now()
    cancelled = (
        update(Batch)
        .where(Batch.id == any_(literal(opened, ARRAY(BigInteger))))
        .values(state=BatchState.CANCELLED, cancelled_at=now, paused_at=None, paused_until=None)
        .returning(Batch.id, Batch.sender_id, Batch.cancelled_at)
        .cte("cancelled")
    )
    added = (
        insert(BatchCancellation)
        .from_select(("batch_id", "sender_id", "cancelled_at"), select(*cancelled.c))
        .returning(BatchCancellation.sender_id)
    )
    senders = frozenset((await connection.execute(added)).scalars())
    await mark_stale(connection, sorted(senders))
    return ChangedJobs(jobs, senders, reached)


async def retry_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, quotas: UserQuotas
) -> ChangedJobs:
    """Move some failed jobs that match back to SCHEDULED.

    Raises:
        ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
    """
    found, reached = await _find(connection, which, after)
    jobs = 0
    senders: set[int] = set()
    groups = [list(group) for _, group in groupby(found, key=lambda job: job[0])]
    if len(groups) > _RETRIED_BATCHES:
        groups = groups[:_RETRIED_BATCHES]
        reached = groups[-1][-1]
    for these in groups:
        batch_id = these[0][0]
        async with keeping_quota(connection, batch_id, quotas) as moved:
            done = await retry_named(connection, batch_id, _these(these, which))
            moved.append(done.jobs)
        jobs += done.jobs
        senders |= {done.sender_id} if done.jobs else set()
    return ChangedJobs(jobs, frozenset(senders), reached)


@dataclass(frozen=True, slots=True)
class NewTime:
    """When jobs become due: at a time, or so much later than now planned."""

    at: datetime | None = None
    delay: timedelta = timedelta(0)


async def reschedule_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, new: NewTime
) -> ChangedJobs:
    """Give some waiting jobs that match another due time.

    A mark compares the due time by PostgreSQL's clock, so a job that a dispatcher has claimed
    meanwhile is not sent too early.
    """
    found, reached = await _find(connection, which, after)
    if not found:
        return ChangedJobs(reached=reached)
    picked = (
        select(EmailJob.id)
        .where(_these(found, which), is_now(JobState.SCHEDULED))
        .order_by(EmailJob.id)
        .with_for_update()
        .cte("picked")
    )
    later = EmailJob.scheduled_at + literal(new.delay, INTERVAL)
    wanted: Any = later if new.at is None else literal(new.at, TIMESTAMP(timezone=True))
    due = func.least(func.greatest(wanted, func.statement_timestamp()), _LATEST)
    expire_after = (
        select(Batch.expire_after_ms).where(Batch.id == EmailJob.batch_id).scalar_subquery()
    )
    moved = (
        update(EmailJob)
        .where(EmailJob.id == picked.c.id)
        .values(scheduled_at=due, expires_at=due + expire_after * cast("1 millisecond", INTERVAL))
        .returning(EmailJob.sender_id, EmailJob.batch_id, EmailJob.scheduled_at)
        .cte("moved")
    )
    groups = (
        select(
            moved.c.sender_id,
            moved.c.batch_id,
            func.count().label("n"),
            func.max(moved.c.scheduled_at).label("last_due"),
        )
        .group_by(moved.c.sender_id, moved.c.batch_id)
        .cte("groups")
    )
    # For forecasts.
    dated = (
        update(Batch)
        .where(Batch.id == groups.c.batch_id, Batch.last_due_at < groups.c.last_due)
        .values(last_due_at=groups.c.last_due)
        .returning(Batch.id)
        .cte("dated")
    )
    statement = select(groups.c.sender_id, groups.c.n).add_cte(marking_stale(groups), dated)
    rows = (await connection.execute(statement)).all()
    senders = frozenset(row.sender_id for row in rows)
    return ChangedJobs(sum(row.n for row in rows), senders, reached)
