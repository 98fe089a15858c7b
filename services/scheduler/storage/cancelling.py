"""Ends waiting jobs, and updates the counts and the markers, in one statement.

A whole batch is cancelled by one row; the rows of its jobs are updated later
(shared/database/cancellations.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    any_,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.cancellations import is_now
from outbox_server.shared.database.count_deltas import counting_moves
from outbox_server.shared.database.counts import batch_counts, in_state
from outbox_server.shared.database.lookups import is_looked_up
from outbox_server.shared.database.models import (
    Batch,
    BatchCancellation,
    BatchCount,
    CountDelta,
    EmailJob,
    JobChange,
    JobChangeBlock,
)
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.heads.markers import mark_stale, marking_stale
from outbox_server.shared.states import BatchState, JobState

# The number of rows that one transaction moves, in about 0.3 s.
SWEPT_AT_ONCE: Final = 20_000
_BATCHES_AT_ONCE: Final = 5_000


@dataclass(frozen=True, slots=True)
class EndedJobs:
    """How many jobs were moved to a final state, and the senders whose heads have changed."""

    jobs: int
    sender_ids: tuple[int, ...]
    # The id of the last job; 0 if there was none.
    last_id: int


async def end_waiting(
    connection: AsyncConnection,
    which: ColumnElement[bool],
    state: JobState,
    limit: int | None = None,
) -> EndedJobs:
    """Move the waiting jobs that match `which` to a final state, at most `limit` of them.

    Jobs of a cancelled batch do not wait. If a dispatcher is marking a job SENDING at this moment,
    the statement waits for it and then leaves the job alone, because it is no longer SCHEDULED.
    """
    waiting = which & is_now(JobState.SCHEDULED)
    statement = _statement(waiting, state, func.statement_timestamp(), limit)
    row = (await connection.execute(statement)).one()
    return EndedJobs(row.jobs, tuple(row.senders or ()), row.last_id)


async def end_unlocked(
    connection: AsyncConnection, jobs: Mapping[int, int], state: JobState
) -> Sequence[int]:
    """Move those of some jobs that wait to a final state, and return them. Wait for no lock.

    `jobs` has the batch of each. Jobs that are locked, or whose batches are, are left alone.
    """
    these = Batch.id == any_(literal(sorted(set(jobs.values())), ARRAY(BigInteger)))
    # The batches are locked as by `lock_batches`.
    locked = select(Batch.id).where(these).order_by(Batch.id)
    found = await connection.scalars(locked.with_for_update(read=True, skip_locked=True))
    batches = set(found)
    ids = [job_id for job_id, batch_id in jobs.items() if batch_id in batches]
    waiting = EmailJob.id == any_(literal(ids, ARRAY(BigInteger)))
    waiting &= is_now(JobState.SCHEDULED)
    statement = _statement(
        waiting, state, func.statement_timestamp(), None, skip_locked=True, ids=True
    )
    return (await connection.execute(statement)).one().ids or ()


async def lock_batches(connection: AsyncConnection, which: ColumnElement[bool]) -> None:
    """Lock batches against changes of many of their jobs, before some of these are ended.

    Such a change counts the waiting jobs that it means, without a lock on each.
    """
    locked = select(Batch.id).where(which).order_by(Batch.id).with_for_update(read=True)
    await connection.execute(locked)


async def end_these(
    connection: AsyncConnection, which: ColumnElement[bool], state: JobState, at: datetime
) -> int:
    """Move jobs whose rows are SCHEDULED to the final state that they have had since `at`.

    Return how many. Their heads were marked when the change was committed.
    """
    since = literal(at, EmailJob.finished_at.type)
    statement = _statement(which & in_state(JobState.SCHEDULED), state, since, None, heads=False)
    return int((await connection.execute(statement)).one().jobs)


def _statement(
    which: ColumnElement[bool],
    state: JobState,
    at: ColumnElement[datetime],
    limit: int | None,
    *,
    heads: bool = True,
    skip_locked: bool = False,
    ids: bool = False,
) -> Any:
    """Return the statement that moves jobs and updates the counts, and the markers if `heads`.

    It returns the `ids` of the moved jobs, if they are wanted.
    """
    # Locked in the order of ids, as settlements lock them, so that there are no deadlocks.
    waiting = (
        select(EmailJob.id)
        .where(which)
        .order_by(EmailJob.id)
        .limit(limit)
        .with_for_update(skip_locked=skip_locked)
        .cte("waiting")
    )
    # `at` is used for the rows and for their deltas, so that a recount by hours gives the same.
    moved = (
        update(EmailJob)
        .where(is_looked_up(EmailJob.id, waiting.c.id))
        .values(state=state, finished_at=at)
        .returning(EmailJob.id, EmailJob.sender_id, EmailJob.batch_id)
        .cte("moved")
    )
    groups = (
        select(
            moved.c.sender_id,
            moved.c.batch_id,
            cast(func.count(), BigInteger).label("n"),
            func.max(moved.c.id).label("last_id"),
        )
        .group_by(moved.c.sender_id, moved.c.batch_id)
        .cte("groups")
    )
    hour = func.date_trunc("hour", at)
    parts = [counting_moves(groups, was=JobState.SCHEDULED, state=state, hour=hour)]
    if heads:
        parts.append(marking_stale(groups))
    named = [select(func.array_agg(moved.c.id)).scalar_subquery().label("ids")] if ids else []
    return (
        select(
            cast(func.coalesce(func.sum(groups.c.n), 0), BigInteger).label("jobs"),
            func.array_agg(groups.c.sender_id.distinct()).label("senders"),
            func.coalesce(func.max(groups.c.last_id), 0).label("last_id"),
            *named,
        )
        .select_from(groups)
        .add_cte(*parts)
    )


@dataclass(frozen=True, slots=True)
class CancelledBatch:
    """The result of cancelling a batch. `was` is its state before."""

    sender_id: int
    jobs: int
    was: BatchState


async def cancel_batch(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> CancelledBatch | None:
    """Cancel the waiting jobs of a batch.

    Return None if the batch does not exist or belongs to another user. The lock waits for marks of
    the batch that are under way, which lock it FOR SHARE. Later marks wait for this lock and then
    check the state again. So no job that is counted here is begun later. `sweep` updates the rows.
    """
    locked = owned_by(
        select(Batch.sender_id, Batch.state).where(Batch.id == batch_id).with_for_update(),
        Batch.user_id,
        user_id,
    )
    row = (await connection.execute(locked)).one_or_none()
    if row is None:
        return None
    if row.state == BatchState.CANCELLED:
        return CancelledBatch(row.sender_id, 0, BatchState.CANCELLED)
    waiting = (await batch_counts(connection, [batch_id]))[batch_id].scheduled
    await store_cancellations(connection, [batch_id])
    await mark_stale(connection, [row.sender_id])
    return CancelledBatch(row.sender_id, waiting, BatchState(row.state))


async def store_cancellations(
    connection: AsyncConnection, batch_ids: Collection[int]
) -> frozenset[int]:
    """Cancel batches whose rows are locked. Return their senders.

    Changes of some of their jobs are forgotten, because no job of them waits any more.
    """
    these = literal(list(batch_ids), ARRAY(BigInteger))
    forgotten = (
        delete(JobChange)
        .where(JobChange.batch_id == any_(these))
        .returning(JobChange.id)
        .cte("forgotten")
    )
    await connection.execute(
        delete(JobChangeBlock).where(JobChangeBlock.change_id.in_(select(forgotten.c.id)))
    )
    cancelled = (
        update(Batch)
        .where(Batch.id == any_(these))
        .values(
            state=BatchState.CANCELLED,
            cancelled_at=func.now(),
            paused_at=None,
            paused_until=None,
            # A trigger keeps it while new times are being written.
            respreading=False,
        )
        .returning(Batch.id, Batch.sender_id, Batch.cancelled_at)
        .cte("cancelled")
    )
    added = (
        insert(BatchCancellation)
        .from_select(("batch_id", "sender_id", "cancelled_at"), select(*cancelled.c))
        .returning(BatchCancellation.sender_id)
    )
    return frozenset((await connection.execute(added)).scalars())


async def cancel_batches_of(connection: AsyncConnection, sender_id: int) -> int:
    """Cancel all batches of a sender that have waiting jobs or jobs in flight.

    The sender's row is locked, so no batch is added meanwhile. Each batch is cancelled as by
    `cancel_batch`; `sweep` updates the rows, in parts. Return the number of cancelled jobs.
    """
    folded = select(BatchCount.batch_id).where(BatchCount.state == JobState.SCHEDULED)
    recent = select(CountDelta.batch_id).where(CountDelta.sender_id == sender_id)
    of_sender = (
        Batch.sender_id == sender_id,
        Batch.state == BatchState.ACTIVE,
        or_(
            folded.where(BatchCount.batch_id == Batch.id, BatchCount.n > 0).exists(),
            Batch.id.in_(recent),
        ),
    )
    # Locked in the order of ids, so that two cancellations cannot deadlock.
    locked = select(Batch.id).where(*of_sender).order_by(Batch.id).with_for_update()
    ids = list((await connection.execute(locked)).scalars())
    jobs = 0
    for first in range(0, len(ids), _BATCHES_AT_ONCE):
        counts = await batch_counts(connection, ids[first : first + _BATCHES_AT_ONCE])
        opened = [batch_id for batch_id, each in counts.items() if each.open]
        if not opened:
            continue
        jobs += sum(counts[batch_id].scheduled for batch_id in opened)
        await store_cancellations(connection, opened)
    return jobs


async def unswept(connection: AsyncConnection) -> Sequence[int]:
    """Return the cancelled batches whose rows are not all CANCELLED yet."""
    found = select(BatchCancellation.batch_id).order_by(BatchCancellation.batch_id)
    return (await connection.execute(found)).scalars().all()


async def sweep(connection: AsyncConnection, batch_id: int, limit: int = SWEPT_AT_ONCE) -> bool:
    """Move up to `limit` rows of a cancelled batch to CANCELLED. Return whether to call again.

    The row of the cancellation is locked meanwhile; if another process has locked it, nothing is
    done. When a process dies, its lock ends at once. Jobs in flight are left to a later call.
    """
    this = BatchCancellation.batch_id == batch_id
    locked = select(BatchCancellation.swept_to, BatchCancellation.cancelled_at).where(this)
    found = (await connection.execute(locked.with_for_update(skip_locked=True))).one_or_none()
    if found is None:
        return False
    # Read before the rows. No job of the batch begins any more, so if none is in flight now, none
    # can return to SCHEDULED after the rows were read.
    in_flight = await _is_sending(connection, batch_id)
    statement = _statement(
        (EmailJob.batch_id == batch_id)
        & (EmailJob.id > found.swept_to)
        & in_state(JobState.SCHEDULED),
        JobState.CANCELLED,
        literal(found.cancelled_at, EmailJob.finished_at.type),
        limit,
        # The heads were marked when the batch was cancelled.
        heads=False,
        # Rows that are locked are also left to a later call.
        skip_locked=True,
    )
    moved = (await connection.execute(statement)).one()
    if moved.jobs == limit:
        # The next transaction begins after the last row, so that no row is read twice.
        await connection.execute(
            update(BatchCancellation).where(this).values(swept_to=moved.last_id)
        )
        return True
    if in_flight:
        return False
    if found.swept_to:
        # Jobs that were in flight may have returned to any place, so all rows are read once more.
        await connection.execute(update(BatchCancellation).where(this).values(swept_to=0))
        return True
    if await _open_rows(connection, batch_id):
        return False
    await connection.execute(delete(BatchCancellation).where(this))
    return False


async def _open_rows(connection: AsyncConnection, batch_id: int) -> bool:
    """Return whether rows are left, by the counts: to look for them would read all rows."""
    folded = select(BatchCount.n).where(
        BatchCount.batch_id == batch_id, BatchCount.state == JobState.SCHEDULED
    )
    recent = select(CountDelta.n).where(
        CountDelta.batch_id == batch_id, CountDelta.state == JobState.SCHEDULED
    )
    part = folded.union_all(recent).subquery()
    return bool(await connection.scalar(select(func.coalesce(func.sum(part.c.n), 0) > 0)))


async def _is_sending(connection: AsyncConnection, batch_id: int) -> bool:
    # `batch_counts` reads all jobs in flight, which are few, by their own index.
    return bool((await batch_counts(connection, [batch_id]))[batch_id].sending)
