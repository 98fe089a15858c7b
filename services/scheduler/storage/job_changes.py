"""Changes many jobs of some batches by one statement, and writes their rows later, in parts.

To update a million rows takes 15 to 30 s, because each has a new version, its entries in the
indexes, and an event. To find them and to store one bit for each takes less than 1 s. So a change
is a row in `job_changes` for each batch, and blocks of bits in `job_change_blocks`.

The batches are locked, which waits for the marks under way. Until all rows of a large change are
written, nothing of its batches is sent (`Batch.respreading`, shared/database/pauses.py). So no job
of the change is begun after its commit, whatever is written first. From the commit on, a job that
is being cancelled *is* CANCELLED (shared/database/cancellations.py). A new due time, and the state
of a job that is retried, are seen when its row is written.

A part updates some rows and deletes their blocks, in one transaction. So any scheduler can continue
after a crash, at any place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Integer,
    any_,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.cancelling import end_these
from outbox_server.services.scheduler.storage.reopening import retry_named
from outbox_server.shared.bounds import LATEST_DUE
from outbox_server.shared.database.cancellations import (
    BLOCK_BITS,
    BLOCK_JOBS,
    block_of,
    is_now,
    place_in_block,
)
from outbox_server.shared.database.lookups import is_looked_up
from outbox_server.shared.database.models import (
    Batch,
    BatchRespread,
    EmailJob,
    JobChange,
    JobChangeBlock,
    Sender,
)
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.states import JobChangeKind, JobState

# The number of rows that one transaction writes, in about 0.3 s.
WRITTEN_AT_ONCE: Final = 10_000
# The maximum number of changes of a sender, approximately, that are not written yet. A load of its
# head compares their batches with each job that it passes: 0.4 s for a million jobs.
MOST_UNWRITTEN: Final = 250
_READ_AT_ONCE: Final = 1_000
_BIT: Final = literal(1, BigInteger)


@dataclass(frozen=True, slots=True)
class NewTime:
    """When jobs become due: at a time, or later by `delay` than planned now."""

    at: datetime | None = None
    delay: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class StoredChange:
    """The change of one batch: `jobs` of its jobs."""

    change_id: int
    batch_id: int
    sender_id: int
    jobs: int


async def store_changes(
    connection: AsyncConnection, jobs: FromClause, kind: JobChangeKind, new: NewTime | None = None
) -> Sequence[StoredChange]:
    """Store a change of each batch that has some of `jobs`.

    `jobs` has `batch_id`, `sender_id` and `id`. The caller has locked the batches.
    None of the jobs may be in an unwritten change of this kind.
    """
    block = block_of(jobs.c.id)
    bits = func.bit_or(_BIT.op("<<")(place_in_block(jobs.c.id)))
    blocks = (
        select(
            jobs.c.batch_id,
            jobs.c.sender_id,
            block.label("block"),
            bits.label("bits"),
            func.count().label("n"),
        )
        .group_by(jobs.c.batch_id, jobs.c.sender_id, block)
        .cte("blocks")
    )
    n = cast(func.sum(blocks.c.n), BigInteger)
    at = None if new is None else new.at
    delay = None if new is None or new.at is not None else new.delay
    batches = select(
        blocks.c.batch_id,
        blocks.c.sender_id,
        literal(int(kind), Integer),
        func.statement_timestamp(),
        literal(at, TIMESTAMP(timezone=True)),
        literal(delay, INTERVAL),
        n,
        # The number of blocks that have about WRITTEN_AT_ONCE jobs.
        func.greatest(func.count() * WRITTEN_AT_ONCE // n, 1),
    ).group_by(blocks.c.batch_id, blocks.c.sender_id)
    columns = ("batch_id", "sender_id", "kind", "changed_at", "due_at", "delay", "n", "step")
    added = (
        insert(JobChange)
        .from_select(columns, batches)
        .returning(JobChange.id, JobChange.batch_id, JobChange.sender_id, JobChange.n)
        .cte("added")
    )
    stored = insert(JobChangeBlock).from_select(
        ("change_id", "block", "bits"),
        select(added.c.id, blocks.c.block, blocks.c.bits).join(
            added, added.c.batch_id == blocks.c.batch_id
        ),
    )
    statement = select(*added.c).add_cte(stored.cte("stored"))
    return [StoredChange(*row) for row in await connection.execute(statement)]


async def hold_batches(connection: AsyncConnection, changes: Collection[StoredChange]) -> None:
    """Keep the mail of the batches back until the rows of all changes are written."""
    ids = literal([each.batch_id for each in changes], ARRAY(BigInteger))
    await connection.execute(update(Batch).where(Batch.id == any_(ids)).values(respreading=True))


async def has_room(connection: AsyncConnection, sender_ids: Iterable[int]) -> bool:
    """Return whether the senders have few enough changes that are not written."""
    these = JobChange.sender_id == any_(literal(list(sender_ids), ARRAY(BigInteger)))
    some = select(JobChange.id).where(these).limit(MOST_UNWRITTEN).subquery()
    return (await connection.scalar(select(func.count()).select_from(some)) or 0) < MOST_UNWRITTEN


def is_retried() -> ColumnElement[bool]:
    """Return the condition that a batch has failed jobs whose retry is not written."""
    retries = select(JobChange.batch_id).where(JobChange.kind == int(JobChangeKind.RETRY))
    return Batch.id.in_(retries)


async def unwritten_times(
    connection: AsyncConnection, batch_ids: Sequence[int]
) -> frozenset[NewTime | None]:
    """Return the new due times of some batches that are not written. None stands for a respread."""
    these = literal(batch_ids, ARRAY(BigInteger))
    changes = select(JobChange.due_at, JobChange.delay).where(
        JobChange.batch_id == any_(these), JobChange.kind == int(JobChangeKind.RESCHEDULE)
    )
    times: set[NewTime | None] = {
        NewTime(row.due_at, row.delay or timedelta(0))
        for row in await connection.execute(changes.distinct())
    }
    respreads = select(BatchRespread.batch_id).where(BatchRespread.batch_id == any_(these))
    if await connection.scalar(respreads.limit(1)) is not None:
        times.add(None)
    return frozenset(times)


async def unwritten(connection: AsyncConnection, sender_ids: Collection[int]) -> Sequence[int]:
    """Return the oldest changes of some senders whose rows are not all written."""
    these = JobChange.sender_id == any_(literal(list(sender_ids), ARRAY(BigInteger)))
    found = select(JobChange.id).where(these).order_by(JobChange.id).limit(_READ_AT_ONCE)
    return (await connection.execute(found)).scalars().all()


async def oldest_of_users(connection: AsyncConnection) -> Sequence[int]:
    """Return the oldest change of each user whose rows are not all written."""
    oldest = func.min(JobChange.id)
    found = (
        select(oldest)
        .join(Sender, Sender.id == JobChange.sender_id)
        .group_by(Sender.user_id)
        .order_by(oldest)
        .limit(_READ_AT_ONCE)
    )
    return (await connection.execute(found)).scalars().all()


async def write_whole(connection: AsyncConnection, change_id: int) -> int:
    """Write all rows of a change whose batch this transaction has locked. Return how many."""
    jobs = 0
    ended: int | None = None
    while ended is None:
        moved, ended = await _write_next(connection, change_id)
        jobs += moved
    return jobs


async def write_part(connection: AsyncConnection, change_id: int) -> int | None:
    """Write some rows of a change. Return the sender if that was the end; else None.

    Return 0 if another process is working on it, or nothing is left to do.
    """
    return (await _write_next(connection, change_id))[1]


async def _write_next(connection: AsyncConnection, change_id: int) -> tuple[int, int | None]:
    """Do the same, and also return how many rows were written."""
    this = JobChange.id == change_id
    found = (await connection.execute(select(JobChange).where(this))).one_or_none()
    if found is None:
        return 0, 0
    # The batch is locked before the change and the rows, as in every change of a batch and its
    # jobs. A lock FOR SHARE, for a retry, lets marks go on, which take the same lock.
    shared = found.kind == JobChangeKind.RETRY
    batch = select(Batch.id).where(Batch.id == found.batch_id)
    locked = batch.with_for_update(read=shared, key_share=not shared, skip_locked=True)
    if await connection.scalar(locked) is None:
        return 0, 0
    again = select(JobChange).where(this).with_for_update(skip_locked=True)
    change = (await connection.execute(again)).one_or_none()
    if change is None:
        return 0, 0
    of_this = JobChangeBlock.change_id == change_id
    first = select(JobChangeBlock.block, JobChangeBlock.bits).where(of_this)
    blocks = (
        await connection.execute(first.order_by(JobChangeBlock.block).limit(change.step))
    ).all()
    ids = list(_ids(blocks))
    moved = await _write(connection, change, ids) if ids else 0
    if moved is not None and len(blocks) == change.step:
        last = JobChangeBlock.block <= blocks[-1].block
        await connection.execute(delete(JobChangeBlock).where(of_this, last))
        left = func.greatest(JobChange.n - moved, 0)
        await connection.execute(update(JobChange).where(this).values(n=left))
        return moved, None
    await connection.execute(delete(JobChangeBlock).where(of_this))
    await connection.execute(delete(JobChange).where(this))
    batch_id: int = change.batch_id
    sender_id: int = change.sender_id
    if change.kind != JobChangeKind.RETRY:
        # A trigger keeps the batch `respreading` while other changes or new times are not written.
        await connection.execute(
            update(Batch).where(Batch.id == batch_id, Batch.respreading).values(respreading=False)
        )
    await mark_stale(connection, [sender_id])
    return moved or 0, sender_id


def _ids(blocks: Iterable[Any]) -> Iterable[int]:
    for block in blocks:
        first = block.block << BLOCK_BITS
        yield from (first + k for k in range(BLOCK_JOBS) if block.bits >> k & 1)


async def _write(connection: AsyncConnection, change: Any, ids: list[int]) -> int | None:
    """Write the rows of some jobs. Return how many; None if none of the change can be written."""
    these = EmailJob.id == any_(literal(ids, ARRAY(BigInteger)))
    these &= EmailJob.batch_id == change.batch_id
    match JobChangeKind(change.kind):
        case JobChangeKind.CANCEL:
            return await end_these(connection, these, JobState.CANCELLED, change.changed_at)
        case JobChangeKind.RESCHEDULE:
            return await _reschedule(connection, change, these)
        case JobChangeKind.RETRY:
            done = await retry_named(connection, change.batch_id, these)
            # For example, the sender was deleted. Its failed jobs stay as they are.
            return done.jobs if done.sender_id else None


async def _reschedule(connection: AsyncConnection, change: Any, these: ColumnElement[bool]) -> int:
    """Give jobs their new due time.

    A mark compares the due time by PostgreSQL's clock, so a job that a dispatcher has claimed
    meanwhile is not sent too early.
    """
    picked = (
        select(EmailJob.id)
        .where(these, is_now(JobState.SCHEDULED))
        .order_by(EmailJob.id)
        .with_for_update()
        .cte("picked")
    )
    wanted: Any = literal(change.due_at, TIMESTAMP(timezone=True))
    if change.due_at is None:
        wanted = EmailJob.scheduled_at + literal(change.delay, INTERVAL)
    due = func.least(func.greatest(wanted, func.statement_timestamp()), LATEST_DUE)
    expire_after = (
        select(Batch.expire_after_ms).where(Batch.id == change.batch_id).scalar_subquery()
    )
    moved = (
        update(EmailJob)
        .where(is_looked_up(EmailJob.id, picked.c.id))
        .values(scheduled_at=due, expires_at=due + expire_after * cast("1 millisecond", INTERVAL))
        .returning(EmailJob.scheduled_at)
        .cte("moved")
    )
    statement = select(func.count(), func.max(moved.c.scheduled_at)).select_from(moved)
    jobs, last_due = (await connection.execute(statement)).one()
    if jobs:
        # For forecasts.
        await connection.execute(
            update(Batch)
            .where(Batch.id == change.batch_id, Batch.last_due_at < last_due)
            .values(last_due_at=last_due)
        )
    return int(jobs)
