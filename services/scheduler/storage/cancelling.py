"""Ends waiting jobs, with the counts and the marker that belong to it, in one statement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    SmallInteger,
    cast,
    func,
    insert,
    literal,
    select,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.scheduler.storage.access import in_transaction
from services.scheduler.storage.batches import mark_cancelled
from shared.counts import in_state
from shared.models import CountDelta, EmailJob, HeadMarker
from shared.states import JobState

# Jobs that one transaction cancels: some 0.5 s.
_CHUNK: Final = 20_000
_DELTA: Final = ("sender_id", "batch_id", "hour", "state", "n")


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

    A job that a dispatcher is marking SENDING at this moment is waited for, and then left alone:
    it is no longer SCHEDULED.
    """
    row = (await connection.execute(_statement(which, state, limit))).one()
    return Moved(row.jobs, tuple(row.senders or ()), row.last_id)


def _statement(which: ColumnElement[bool], state: JobState, limit: int | None) -> Any:
    # Locked in the order of ids, as settlements are, so that they wait for one another and do not
    # deadlock.
    waiting = (
        select(EmailJob.id)
        .where(which, in_state(JobState.SCHEDULED))
        .order_by(EmailJob.id)
        .limit(limit)
        .with_for_update()
        .cte("waiting")
    )
    # One time for the rows and their deltas: a recount by hours gives the same.
    now = func.statement_timestamp()
    moved = (
        update(EmailJob)
        .where(EmailJob.id == waiting.c.id)
        .values(state=state, finished_at=now)
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
    hour = func.date_trunc("hour", now)
    deltas = (
        insert(CountDelta)
        .from_select(
            _DELTA,
            union_all(
                *(
                    select(
                        groups.c.sender_id,
                        groups.c.batch_id,
                        hour,
                        literal(int(of), SmallInteger),
                        sign * groups.c.n,
                    )
                    for of, sign in ((JobState.SCHEDULED, -1), (state, 1))
                )
            ),
        )
        .cte("deltas")
    )
    markers = (
        insert(HeadMarker)
        .from_select(("sender_id",), select(groups.c.sender_id).distinct())
        .cte("markers")
    )
    return (
        select(
            cast(func.coalesce(func.sum(groups.c.n), 0), BigInteger).label("jobs"),
            func.array_agg(groups.c.sender_id.distinct()).label("senders"),
            func.coalesce(func.max(groups.c.last_id), 0).label("last_id"),
        )
        .select_from(groups)
        .add_cte(deltas, markers)
    )


@dataclass(frozen=True, slots=True)
class CancelledBatch:
    """What cancelling a batch came to."""

    sender_id: int
    jobs: int


async def cancel_batch(
    engine: AsyncEngine, batch_id: int, user_id: str | None, chunk: int = _CHUNK
) -> CancelledBatch | None:
    """Cancel what waits of a batch; None: there is none, or not for this user.

    A transaction for each `chunk` of jobs: one for a million would outlive the call's deadline, and
    then have cancelled nothing. What is committed is CANCELLED for good; a call that was cut off
    is simply made again.
    """
    jobs = after = 0
    while True:

        async def step(connection: AsyncConnection, after: int = after) -> tuple[int | None, Moved]:
            sender_id = await mark_cancelled(connection, batch_id, user_id)
            if sender_id is None:
                return None, Moved(0, (), 0)
            # From the last one on: those before would be looked at in each transaction again.
            which = (EmailJob.batch_id == batch_id) & (EmailJob.id > after)
            return sender_id, await end_waiting(connection, which, JobState.CANCELLED, chunk)

        sender_id, moved = await in_transaction(engine, step)
        if sender_id is None:
            return None
        jobs += moved.jobs
        after = moved.last_id
        if moved.jobs < chunk:
            return CancelledBatch(sender_id, jobs)
