"""Changes the jobs that match a filter, a part in each transaction.

A part chooses some batches (`job_set_rows`), locks them, and finds and stores by one statement
which of their jobs are changed (`job_changes`). The next part continues after the last job that
was looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    any_,
    false,
    func,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage import job_changes, job_set_rows
from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.cancelling import store_cancellations
from outbox_server.services.scheduler.storage.conditions import condition, job_leaves, job_state
from outbox_server.services.scheduler.storage.counted_states import has_counted
from outbox_server.services.scheduler.storage.job_changes import NewTime
from outbox_server.services.scheduler.storage.job_filters import (
    JobFilter,
    JobPosition,
    batch_condition,
    is_batch_level,
)
from outbox_server.services.scheduler.storage.job_set_rows import SetRows, next_rows
from outbox_server.services.scheduler.storage.walking import (
    next_batches,
    skip_older,
)
from outbox_server.shared.database.cancellations import (
    BLOCK_BITS,
    being_cancelled,
    is_being_changed,
)
from outbox_server.shared.database.counts import batch_counts
from outbox_server.shared.database.models import Batch, EmailJob, JobChange, JobChangeBlock, Sender
from outbox_server.shared.filters.fields import (
    FieldTest,
    Filter,
    required,
)
from outbox_server.shared.filters.grammar import leaves
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.quotas.storage import check_waiting_jobs, lock_user, read_quotas
from outbox_server.shared.states import BatchState, JobChangeKind, JobState
from outbox_server.shared.user_quotas import UserQuotas

# The rows of at most this many jobs are written in the transaction that finds them.
_WRITTEN_WITH_THE_CHANGE: Final = 5_000
# The maximum number of batches that one part cancels, because each needs a row lock.
_CANCELLED_BATCHES: Final = 1_000
_WAITING: Final = FieldTest("state", "=", int(JobState.SCHEDULED))


@dataclass(frozen=True, slots=True)
class ChangedJobs:
    """How many jobs a part has changed, or would change, and where the next part continues.

    `sender_ids` is empty if nothing was changed.
    """

    jobs: int = 0
    sender_ids: frozenset[int] = frozenset()
    # None means that there are no more.
    reached: JobPosition | None = None
    # The part must wait until rows of earlier changes of `sender_ids` are written.
    waits: bool = False


def is_about_batches(tree: Filter | None) -> bool:
    """Return whether the filter means all waiting jobs of some batches, or none of them."""
    return all(term == _WAITING or is_batch_level(term) for term in required(tree))


async def owner_of_senders(connection: AsyncConnection, sender_ids: Collection[int]) -> str | None:
    """Return the user that owns these senders, which have one owner."""
    these = Sender.id == any_(literal(list(sender_ids), ARRAY(BigInteger)))
    return await connection.scalar(select(Sender.user_id).where(these).limit(1))


@dataclass(frozen=True, slots=True)
class SetChange:
    """What is done with the jobs that match. `new` is the time of RESCHEDULE, `quotas` of RETRY."""

    kind: JobChangeKind
    new: NewTime | None = None
    # The default quotas of a user.
    quotas: UserQuotas | None = None
    # Change only these jobs. None means any.
    job_ids: Sequence[int] | None = None

    @property
    def state(self) -> JobState:
        """The state of the jobs before the change."""
        return JobState.FAILED if self.kind is JobChangeKind.RETRY else JobState.SCHEDULED


async def count_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, change: SetChange
) -> ChangedJobs:
    """Count some jobs that match, and change nothing."""
    rows = await next_rows(connection, which, after, change.state, change.job_ids)
    if not rows.batch_ids:
        return ChangedJobs(reached=rows.reached)
    batch_ids = (await connection.scalars(_changeable(rows, change))).all()
    matching = await _matching(connection, which, rows, batch_ids, change.kind)
    counted = select(func.count()).select_from(matching.subquery())
    return ChangedJobs(await connection.scalar(counted) or 0, reached=rows.reached)


async def change_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, change: SetChange
) -> ChangedJobs:
    """Change some jobs that match, after earlier changes that decide which jobs these are.

    Raises:
        ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
    """
    rows = await next_rows(connection, which, after, change.state, change.job_ids)
    earlier = await _unwritten_before(connection, which, after, rows, change.kind)
    if earlier:
        return ChangedJobs(0, earlier, after, waits=True)
    if not rows.batch_ids:
        return ChangedJobs(reached=rows.reached)
    found = await _lock_active(connection, rows, change)
    if not found:
        return ChangedJobs(reached=rows.reached)
    batch_ids = [row.id for row in found]
    matching = await _matching(connection, which, rows, batch_ids, change.kind)
    if await _waits_for_times(connection, which, batch_ids, matching, change):
        return ChangedJobs(0, rows.sender_ids, after, waits=True)
    stored = await job_changes.store_changes(
        connection, matching.cte("picked"), change.kind, change.new
    )
    jobs = sum(each.jobs for each in stored)
    if change.quotas is not None and stored:
        quotas = await read_quotas(connection, found[0].user_id, change.quotas)
        await check_waiting_jobs(connection, found[0].user_id, jobs, quotas, added=True)
    if jobs <= _WRITTEN_WITH_THE_CHANGE:
        # Retention may have removed some of the jobs since they were found.
        jobs = sum([await job_changes.write_whole(connection, each.change_id) for each in stored])
    elif change.kind is not JobChangeKind.RETRY:
        await job_changes.hold_batches(connection, stored)
    senders = frozenset(each.sender_id for each in stored)
    if senders:
        await mark_stale(connection, sorted(senders))
    return ChangedJobs(jobs, senders, rows.reached)


def _changeable(rows: SetRows, change: SetChange) -> Any:
    """Return the statement that reads the batches whose jobs can be changed, with their owners."""
    these = Batch.id == any_(literal(rows.batch_ids, ARRAY(BigInteger)))
    found: Any = select(Batch.id, Batch.user_id)
    found = found.where(these, Batch.state == BatchState.ACTIVE)
    if change.kind is JobChangeKind.RETRY:
        # No mail of a deleted sender is sent again. The other changes need no check: a deleted
        # sender has no waiting jobs.
        sender = select(Sender.id).where(Sender.id == Batch.sender_id, Sender.deleted_at.is_(None))
        found = found.where(sender.correlate(Batch).exists())
    return found


async def _lock_active(connection: AsyncConnection, rows: SetRows, change: SetChange) -> Any:
    """Lock the batches whose jobs can be changed, and for a retry their owner."""
    if change.quotas is not None:
        these = Batch.id == any_(literal(rows.batch_ids, ARRAY(BigInteger)))
        owner = await connection.scalar(select(Batch.user_id).where(these).limit(1))
        if owner is None:  # retention has removed the batches meanwhile
            return []
        await lock_user(connection, owner)
    # Waits for marks in progress. Locked in the order of ids, so that there are no deadlocks.
    locked = _changeable(rows, change).order_by(Batch.id).with_for_update(key_share=True, of=Batch)
    return (await connection.execute(locked)).all()


async def _unwritten_before(
    connection: AsyncConnection,
    which: JobFilter,
    after: JobPosition,
    rows: SetRows,
    kind: JobChangeKind,
) -> frozenset[int]:
    """Return the senders whose earlier changes must be written first.

    A sender may have a limited number of unwritten changes. And jobs whose retry is stored are
    FAILED until it is written, so a change of the waiting jobs would leave them out.
    """
    if rows.batch_ids and not await job_changes.has_room(connection, rows.sender_ids):
        return rows.sender_ids
    if kind is JobChangeKind.RETRY:
        return frozenset()
    batches = next_batches(which, after).where(
        Batch.state == BatchState.ACTIVE, batch_condition(which.tree), job_changes.is_retried()
    )
    senders = await connection.scalars(batches.with_only_columns(Batch.sender_id).distinct())
    return frozenset(senders)


async def _waits_for_times(
    connection: AsyncConnection,
    which: JobFilter,
    batch_ids: Sequence[int],
    matching: Any,
    change: SetChange,
) -> bool:
    """Return whether new times of earlier calls must be written first to the locked batches.

    Otherwise an earlier call's time could be written last, or the filter could see an outdated
    time.
    """
    if change.kind is JobChangeKind.RETRY:
        return False
    compares = which.tree is not None and any(
        test.field == "schedule_time" for test in leaves(which.tree)
    )
    if change.new is None and not compares:
        return False
    earlier = await job_changes.unwritten_times(connection, batch_ids)
    if not earlier:
        return False
    if change.new is None or earlier != {change.new}:
        return True
    # The unwritten time is that of this call: of other jobs or, with a fixed time, of the same
    # ones.
    if not compares or change.new.at is not None:
        return False
    again = matching.where(is_being_changed(JobChangeKind.RESCHEDULE))
    return bool(await connection.scalar(select(again.exists())))


async def count_meant(
    connection: AsyncConnection, which: JobFilter, job_ids: Sequence[int] | None
) -> int:
    """Count the jobs of some batches, or some of them by their ids, in any state."""
    if job_ids is None:
        # The number of a batch was stored by its intake.
        total = func.coalesce(func.sum(Batch.accepted_count), 0)
        return int(await connection.scalar(which.owned(select(total))) or 0)
    these = EmailJob.id == any_(literal(job_ids, ARRAY(BigInteger)))
    batches = which.owned(select(Batch.id).where(Batch.id == EmailJob.batch_id))
    counted = select(func.count()).select_from(EmailJob)
    counted = counted.where(these, batches.correlate(EmailJob).exists())
    return int(await connection.scalar(counted) or 0)


async def _matching(
    connection: AsyncConnection,
    which: JobFilter,
    rows: SetRows,
    batch_ids: Sequence[int],
    kind: JobChangeKind,
) -> Any:
    """Return the statement that reads the jobs that match, of batches that are locked."""
    these = any_(literal(batch_ids, ARRAY(BigInteger)))
    # Jobs of the earlier parts of this change are left out.
    blocks = select(JobChangeBlock.block).where(
        JobChangeBlock.change_id == JobChange.id,
        JobChangeBlock.block >= (rows.after_id + 1) >> BLOCK_BITS,
    )
    others = select(JobChange.kind).where(JobChange.batch_id == these, blocks.exists()).distinct()
    unwritten = set((await connection.scalars(others)).all())
    batches: Any = select(Batch.id, Batch.created_at, Batch.labels, Batch.test)
    batch = batches.where(Batch.id == these).subquery("batch")
    # No batch is cancelled here, so a job can only be in a change of some jobs.
    cancelled = being_cancelled if JobChangeKind.CANCEL in unwritten else false
    leaves = {
        **job_leaves(batch.c.created_at, batch.c.labels, batch.c.test),
        "state": job_state(cancelled),
    }
    found = (
        select(EmailJob.id, EmailJob.batch_id, EmailJob.sender_id)
        .join(batch, batch.c.id == EmailJob.batch_id)
        .where(rows.place, condition(which.tree, leaves))
    )
    if kind is JobChangeKind.RETRY:
        # An erased recipient has no address to send to.
        found = found.where(EmailJob.recipient != "")
        if kind in unwritten:
            found = found.where(~is_being_changed(kind))
    return found


async def cancel_batches_part(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, *, count_only: bool = False
) -> ChangedJobs:
    """Cancel some batches with open jobs that match, as `cancel_batch` does.

    Batches whose open jobs are all in flight are cancelled too, so that failed attempts are not
    tried again. The result counts the waiting jobs. With `count_only`, nothing is changed.
    """
    after = await skip_older(connection, which, after)
    # Failed jobs whose retry is stored would wait again, so batches with such jobs are cancelled
    # too.
    waits = has_counted({JobState.SCHEDULED}) | job_changes.is_retried()
    found = await search(
        connection,
        next_batches(which, after).where(Batch.state == BatchState.ACTIVE),
        Batch.id,
        batch_condition(which.tree) & waits,
        _CANCELLED_BATCHES,
        descending=False,
        most=job_set_rows.ROWS_AT_ONCE,
    )
    ids = [row.id for row in found.rows]
    last = ids[-1] if len(ids) == _CANCELLED_BATCHES else found.reached
    reached = None if last is None else which.after_batch(last)
    # Locked in the order of ids, so that two cancellations cannot deadlock.
    these = Batch.id == any_(literal(ids, ARRAY(BigInteger)))
    locked = select(Batch.id).where(these, Batch.state == BatchState.ACTIVE).order_by(Batch.id)
    if not count_only:
        locked = locked.with_for_update()
    counts = await batch_counts(connection, (await connection.execute(locked)).scalars().all())
    retried = set(await connection.scalars(select(Batch.id).where(these, job_changes.is_retried())))
    opened = [batch_id for batch_id, each in counts.items() if each.open or batch_id in retried]
    jobs = sum(counts[batch_id].scheduled for batch_id in opened)
    if count_only or not opened:
        return ChangedJobs(jobs, reached=reached)
    senders = await store_cancellations(connection, opened)
    await mark_stale(connection, sorted(senders))
    return ChangedJobs(jobs, senders, reached)
