"""Gives the waiting jobs of a batch new due times, in parts that continue after a crash.

While a batch is `respreading`, nothing of it is sent (shared/database/pauses.py). So no job is sent
at its old time after the call that asked for the new ones, and it does not matter in which order
the rows are written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import BigInteger, any_, case, cast, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.bounds import LATEST_DUE
from outbox_server.shared.database.cancellations import is_now
from outbox_server.shared.database.lookups import is_looked_up
from outbox_server.shared.database.models import (
    Batch,
    BatchRespread,
    EmailJob,
    JobChange,
    JobChangeBlock,
)
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.states import JobChangeKind, JobState

# The number of rows that one transaction changes, in about 0.4 s.
AT_ONCE: Final = 10_000
_MILLISECOND: Final = timedelta(milliseconds=1)


async def begin_respread(
    connection: AsyncConnection, batch_id: int, start: datetime, spacing_ms: int
) -> None:
    """Store the new times of a batch, whose row is locked.

    They replace all times of its jobs that are not written yet: an earlier respread, and changes of
    some jobs.
    """
    replaced = (
        delete(JobChange)
        .where(JobChange.batch_id == batch_id, JobChange.kind == int(JobChangeKind.RESCHEDULE))
        .returning(JobChange.id)
        .cte("replaced")
    )
    await connection.execute(
        delete(JobChangeBlock).where(JobChangeBlock.change_id.in_(select(replaced.c.id)))
    )
    values = {"start_at": start, "spacing_ms": spacing_ms, "done_to": 0, "placed": 0}
    await connection.execute(
        insert(BatchRespread)
        .values(batch_id=batch_id, **values)
        .on_conflict_do_update(index_elements=["batch_id"], set_=values)
    )


async def unfinished_of(connection: AsyncConnection, sender_ids: Collection[int]) -> Sequence[int]:
    """Return the batches of some senders whose new times are not all written."""
    these = Batch.sender_id == any_(literal(list(sender_ids), ARRAY(BigInteger)))
    found = select(BatchRespread.batch_id).join(Batch, Batch.id == BatchRespread.batch_id)
    return (await connection.scalars(found.where(these).order_by(Batch.id))).all()


async def unfinished(connection: AsyncConnection) -> Sequence[int]:
    """Return the batches whose new times are not all written."""
    found = select(BatchRespread.batch_id).order_by(BatchRespread.batch_id)
    return (await connection.execute(found)).scalars().all()


async def respread_part(
    connection: AsyncConnection, batch_id: int, limit: int = AT_ONCE
) -> int | None:
    """Give the next jobs their times. Return the sender if that was the end; else None.

    Return 0 if another process is working on it, or nothing is left to do. Failed jobs whose retry
    is stored are waited for: they get new times, too.
    """
    this = BatchRespread.batch_id == batch_id
    # The batch is locked before the rows, as in every change of a batch and its jobs.
    batch = select(Batch.id).where(Batch.id == batch_id)
    locked = await connection.scalar(batch.with_for_update(key_share=True, skip_locked=True))
    work = (
        await connection.execute(
            select(BatchRespread).where(this).with_for_update(skip_locked=True)
        )
    ).one_or_none()
    retries = select(JobChange.id).where(
        JobChange.batch_id == batch_id, JobChange.kind == int(JobChangeKind.RETRY)
    )
    if work is None or locked is None or await connection.scalar(retries.limit(1)) is not None:
        return 0
    moved = (await connection.execute(_moving(batch_id, work, limit))).one()
    placed = work.placed + moved.jobs
    if moved.jobs == limit:
        await connection.execute(
            update(BatchRespread).where(this).values(done_to=moved.last_id, placed=placed)
        )
        return None
    spacing = work.spacing_ms * _MILLISECOND
    last_due = min(work.start_at + max(placed - 1, 0) * spacing, LATEST_DUE)
    await connection.execute(delete(BatchRespread).where(this))
    # A trigger keeps the batch `respreading` while changes of its jobs are not written.
    ended = (
        update(Batch)
        .where(Batch.id == batch_id)
        .values(respreading=False, last_due_at=last_due, spread_count=placed)
        .returning(Batch.sender_id)
    )
    sender_id = (await connection.execute(ended)).scalar_one_or_none()
    if sender_id is None:
        return 0
    await mark_stale(connection, [sender_id])
    return sender_id


def _moving(batch_id: int, work: Any, limit: int) -> Any:
    # Locked in the order of ids, as settlements lock them, so that there are no deadlocks.
    picked = (
        select(EmailJob.id)
        .where(
            EmailJob.batch_id == batch_id,
            EmailJob.id > work.done_to,
            is_now(JobState.SCHEDULED),
        )
        .order_by(EmailJob.id)
        .limit(limit)
        .with_for_update()
        .cte("picked")
    )
    place = func.row_number().over(order_by=picked.c.id) - 1 + work.placed
    places = select(picked.c.id, place.label("place")).cte("places")
    millisecond = cast("1 millisecond", INTERVAL)
    start = literal(work.start_at, TIMESTAMP(timezone=True))
    planned = func.least(
        start + places.c.place * literal(work.spacing_ms, BigInteger) * millisecond, LATEST_DUE
    )
    # A retry waits at least as long as its back-off says.
    due: Any = case(
        (EmailJob.attempt > 0, func.greatest(planned, EmailJob.scheduled_at)), else_=planned
    )
    expire_after = select(Batch.expire_after_ms).where(Batch.id == batch_id).scalar_subquery()
    moved = (
        update(EmailJob)
        .where(is_looked_up(EmailJob.id, places.c.id))
        .values(scheduled_at=due, expires_at=due + expire_after * millisecond)
        .returning(EmailJob.id)
        .cte("moved")
    )
    return select(
        func.count().label("jobs"), func.coalesce(func.max(moved.c.id), 0).label("last_id")
    ).select_from(moved)
