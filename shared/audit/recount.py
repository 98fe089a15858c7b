"""Compares the stored counts of jobs with a recount of the rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from sqlalchemy import Select, and_, func, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.cancellations import state_now
from outbox_server.shared.database.counts import JobCounts, batch_counts, sender_counts
from outbox_server.shared.database.models import (
    Batch,
    CountDelta,
    EmailJob,
    PurgedCount,
    Sender,
    SenderHourCount,
)
from outbox_server.shared.states import FINAL_STATES, JobState

_ReadCounts: TypeAlias = Callable[
    [AsyncConnection, Iterable[int]], Awaitable[Mapping[int, JobCounts]]
]

_ROWS_AT_ONCE: Final = 2_000


async def stats_mismatch(connection: AsyncConnection) -> int:
    """Return how many counts differ from a recount: by sender, by batch, and by hour of the end.

    A recount counts the rows, and the rows that were removed after their retention.
    Counts by sender and batch are compared as callers see them, including cancellations in
    progress. Counts by hour are compared with the rows: jobs still to be cancelled have no hour.
    """
    return (
        await _count_mismatch(connection, Sender.id, "sender_id", sender_counts)
        + await _count_mismatch(connection, Batch.id, "batch_id", batch_counts)
        + (await connection.scalar(_hour_mismatch()) or 0)
    )


async def _count_mismatch(
    connection: AsyncConnection, owner: Any, owner_of: str, read: _ReadCounts
) -> int:
    """Compare the counts of all senders or batches with their rows, page by page."""
    off, last = 0, 0
    while True:
        page = select(owner).where(owner > last).order_by(owner).limit(_ROWS_AT_ONCE)
        ids = (await connection.execute(page)).scalars().all()
        if not ids:
            return off
        last = ids[-1]
        of_job, of_purged = getattr(EmailJob, owner_of), getattr(PurgedCount, owner_of)
        rows = union_all(
            select(of_job.label("key"), state_now().label("state"), literal(1).label("n")).where(
                of_job.in_(ids)
            ),
            select(of_purged, PurgedCount.state, PurgedCount.n).where(of_purged.in_(ids)),
        ).subquery("rows")
        found = await connection.execute(
            select(rows.c.key, rows.c.state, func.sum(rows.c.n)).group_by(rows.c.key, rows.c.state)
        )
        recount = {(key, state): n for key, state, n in found}
        counted = await read(connection, ids)
        off += sum(
            counts[state] != recount.get((key, int(state)), 0)
            for key, counts in counted.items()
            for state in JobState
        )


def _hour_mismatch() -> Select[Any]:
    keys = ("sender_id", "hour", "state")
    parts = union_all(
        select(
            SenderHourCount.sender_id,
            SenderHourCount.hour,
            SenderHourCount.state,
            SenderHourCount.n,
        ),
        select(CountDelta.sender_id, CountDelta.hour, CountDelta.state, CountDelta.n).where(
            CountDelta.state != int(JobState.SCHEDULED)
        ),
    ).subquery()
    counted = (
        select(*(parts.c[key] for key in keys), func.sum(parts.c.n).label("n"))
        .group_by(*(parts.c[key] for key in keys))
        .subquery("counted")
    )
    hour = func.date_trunc("hour", EmailJob.finished_at)
    rows = union_all(
        select(EmailJob.sender_id, hour.label("hour"), EmailJob.state, func.count().label("n"))
        .where(EmailJob.state.in_(FINAL_STATES))
        .group_by(EmailJob.sender_id, hour, EmailJob.state),
        select(PurgedCount.sender_id, PurgedCount.hour, PurgedCount.state, PurgedCount.n),
    ).subquery()
    found = (
        select(*(rows.c[key] for key in keys), func.sum(rows.c.n).label("n"))
        .group_by(*(rows.c[key] for key in keys))
        .subquery("found")
    )
    same = and_(*(counted.c[key] == found.c[key] for key in keys))
    return (
        select(func.count())
        .select_from(counted.join(found, same, full=True))
        .where(func.coalesce(counted.c.n, 0) != func.coalesce(found.c.n, 0))
    )
