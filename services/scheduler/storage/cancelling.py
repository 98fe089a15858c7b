"""Ends waiting jobs, with the counts and the marker that belong to it, in one statement.

A whole batch is ended by one row, which its jobs' rows follow
(shared/database/cancellations.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.cancellations import is_now
from outbox_server.shared.database.count_deltas import counting_moves
from outbox_server.shared.database.counts import batch_counts, in_state
from outbox_server.shared.database.models import Batch, BatchCancellation, EmailJob
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.heads.markers import mark_stale, marking_stale
from outbox_server.shared.states import BatchState, JobState

# Rows that one transaction moves: some 0.3 s.
SWEPT_AT_ONCE: Final = 20_000


@dataclass(frozen=True, slots=True)
class Moved:
    """How many jobs were moved to a final state, and whose heads have changed by that."""

    jobs: int
    sender_ids: tuple[int, ...]
    # The last of them; 0: there was none.
    last_id: int


async def end_waiting(
    connection: AsyncConnection,
    which: ColumnElement[bool],
    state: JobState,
    limit: int | None = None,
) -> Moved:
    """Move the waiting jobs that `which` names to a final state; `limit`: the first so many.

    What its batch has cancelled already does not wait. A job that a dispatcher is marking SENDING
    at this moment is waited for, and then left alone: it is no longer SCHEDULED.
    """
    waiting = which & is_now(JobState.SCHEDULED)
    statement = _statement(waiting, state, func.statement_timestamp(), limit)
    row = (await connection.execute(statement)).one()
    return Moved(row.jobs, tuple(row.senders or ()), row.last_id)


def _statement(
    which: ColumnElement[bool],
    state: JobState,
    at: ColumnElement[datetime],
    limit: int | None,
    *,
    heads: bool = True,
) -> Any:
    """Move jobs, with their counts; `heads`: with markers for the heads that lose them."""
    # Locked in the order of ids, as settlements are, so that they wait for one another and do not
    # deadlock.
    waiting = (
        select(EmailJob.id)
        .where(which)
        .order_by(EmailJob.id)
        .limit(limit)
        .with_for_update()
        .cte("waiting")
    )
    # `at` is one time for the rows and their deltas: a recount by hours gives the same.
    moved = (
        update(EmailJob)
        .where(EmailJob.id == waiting.c.id)
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
    return (
        select(
            cast(func.coalesce(func.sum(groups.c.n), 0), BigInteger).label("jobs"),
            func.array_agg(groups.c.sender_id.distinct()).label("senders"),
            func.coalesce(func.max(groups.c.last_id), 0).label("last_id"),
        )
        .select_from(groups)
        .add_cte(*parts)
    )


@dataclass(frozen=True, slots=True)
class CancelledBatch:
    """What cancelling a batch came to."""

    sender_id: int
    jobs: int


async def cancel_batch(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> CancelledBatch | None:
    """Cancel what waits of a batch; None: there is none, or not for this user.

    The lock waits for marks of the batch that are under way (they hold it FOR SHARE), and they
    look at its state again once they have waited for ours. So what waits at the count is not
    begun any more. Its rows are another matter: `sweep`.
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
        return CancelledBatch(row.sender_id, 0)
    waiting = (await batch_counts(connection, [batch_id]))[batch_id].scheduled
    now = func.now()
    await connection.execute(
        update(Batch)
        .where(Batch.id == batch_id)
        .values(state=BatchState.CANCELLED, cancelled_at=now)
    )
    await connection.execute(
        insert(BatchCancellation).values(
            batch_id=batch_id, sender_id=row.sender_id, cancelled_at=now
        )
    )
    await mark_stale(connection, [row.sender_id])
    return CancelledBatch(row.sender_id, waiting)


async def unswept(connection: AsyncConnection) -> Sequence[int]:
    """Return the cancelled batches whose rows are not all CANCELLED yet."""
    found = select(BatchCancellation.batch_id).order_by(BatchCancellation.batch_id)
    return (await connection.execute(found)).scalars().all()


async def sweep(connection: AsyncConnection, batch_id: int, limit: int = SWEPT_AT_ONCE) -> bool:
    """Move up to `limit` rows of a cancelled batch to CANCELLED; return whether more may follow.

    The row of the cancellation is locked meanwhile, and left to whoever has it: the work of a
    process that dies is free at once. What is in flight is for a later call.
    """
    this = BatchCancellation.batch_id == batch_id
    locked = select(BatchCancellation.swept_to, BatchCancellation.cancelled_at).where(this)
    found = (await connection.execute(locked.with_for_update(skip_locked=True))).one_or_none()
    if found is None:
        return False
    # Before the rows: nothing of the batch begins any more, so what is not in flight now cannot
    # come back behind our look at them.
    in_flight = await _is_sending(connection, batch_id)
    statement = _statement(
        (EmailJob.batch_id == batch_id)
        & (EmailJob.id > found.swept_to)
        & in_state(JobState.SCHEDULED),
        JobState.CANCELLED,
        literal(found.cancelled_at, EmailJob.finished_at.type),
        limit,
        # They lost them when the batch was cancelled.
        heads=False,
    )
    moved = (await connection.execute(statement)).one()
    if moved.jobs == limit:
        # From the last one on: those before would be looked at in each transaction again.
        await connection.execute(
            update(BatchCancellation).where(this).values(swept_to=moved.last_id)
        )
        return True
    if in_flight:
        return False
    if found.swept_to:
        # What has come back may be anywhere; now that it is over, once more from the first.
        await connection.execute(update(BatchCancellation).where(this).values(swept_to=0))
        return True
    await connection.execute(delete(BatchCancellation).where(this))
    return False


async def _is_sending(connection: AsyncConnection, batch_id: int) -> bool:
    # Of all jobs in flight, which are few: by their index and not by the batch's, see `counts`.
    return bool((await batch_counts(connection, [batch_id]))[batch_id].sending)
