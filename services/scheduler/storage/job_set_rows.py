"""Chooses the rows that one part of a change of many jobs looks at (`job_sets`).

A part looks at a limited number of rows: of some batches with jobs in the wanted state, or of one
large batch. The few jobs of an address or an external id are found in the way of a list
(`walking`), so they belong to the same user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, any_, false, literal, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.counted_states import has_counted
from outbox_server.services.scheduler.storage.job_filters import (
    LAST_ID,
    JobFilter,
    JobPosition,
    batch_condition,
    id_after,
)
from outbox_server.services.scheduler.storage.walking import (
    TROUBLE,
    in_trouble,
    next_batches,
    skip_older,
    walk_jobs,
)
from outbox_server.shared.database.cancellations import BLOCK_JOBS
from outbox_server.shared.database.counts import batch_counts
from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.filters.fields import required_value
from outbox_server.shared.states import BatchState, JobState

# The number of rows that one part reads, in about 0.2 s, and the number of batches that it looks
# at.
ROWS_AT_ONCE: Final = 200_000
_BATCHES_AT_ONCE: Final = 100
_BATCHES_SEEN: Final = 5_000
# The number of jobs that a list finds at once.
_FOUND_AT_ONCE: Final = 5_000


@dataclass(frozen=True, slots=True)
class SetRows:
    """The rows that a part looks at: those in `place`, of some batches."""

    batch_ids: Sequence[int]
    sender_ids: frozenset[int]
    place: ColumnElement[bool]
    reached: JobPosition | None
    # All rows have larger ids. A part of a batch ends with a block of `job_change_blocks`.
    after_id: int = 0


async def next_rows(
    connection: AsyncConnection,
    which: JobFilter,
    after: JobPosition,
    state: JobState,
    job_ids: Sequence[int] | None,
) -> SetRows:
    """Return the next rows to look at: of jobs in this state, or of `job_ids` if they are given."""
    if not which.states:
        return SetRows((), frozenset(), false(), None)
    if job_ids is not None:
        return await _named_rows(connection, which, job_ids)
    if any(required_value(which.tree, field)[0] for field in ("recipient", "external_id")):
        return await _few_rows(connection, which, after)
    after = await skip_older(connection, which, after)
    batches = next_batches(which, after).add_columns(Batch.sender_id)
    found = await search(
        connection,
        batches.where(Batch.state == BatchState.ACTIVE),
        Batch.id,
        batch_condition(which.tree) & has_counted({state}),
        _BATCHES_AT_ONCE,
        descending=False,
        most=_BATCHES_SEEN,
    )
    last = found.rows[-1].id if len(found.rows) == _BATCHES_AT_ONCE else found.reached
    reached = None if last is None else which.after_batch(last)
    sizes = {batch.id: batch.accepted_count for batch in found.rows}
    indexed = _by_index(state)
    if indexed is not None:
        for batch_id, counts in (await batch_counts(connection, sizes)).items():
            sizes[batch_id] = sum(counts[each] for each in TROUBLE)
    taken: list[Any] = []
    rows, after_id = 0, 0
    for batch in found.rows:
        if taken and rows + sizes[batch.id] > ROWS_AT_ONCE:
            reached = which.after_batch(taken[-1].id)
            break
        taken.append(batch)
        rows += sizes[batch.id]
    ids = [batch.id for batch in taken]
    place = EmailJob.batch_id == any_(literal(ids, ARRAY(BigInteger)))
    if rows > ROWS_AT_ONCE or after[0] in ids:
        # A large batch, or one that an earlier part has begun, is read in the order of its jobs.
        first = after if after[0] == ids[0] else (ids[0], 0)
        after_id = first[1]
        end = await _end_of_part(connection, first, state)
        taken, reached = taken[:1], (which.after_batch(ids[0]) if end is None else (ids[0], end))
        ids = ids[:1]
        place = _between(first, LAST_ID if end is None else end)
    if indexed is not None:
        place &= indexed
    return SetRows(ids, frozenset(batch.sender_id for batch in taken), place, reached, after_id)


def _between(after: JobPosition, until: int) -> ColumnElement[bool]:
    """Return the condition that a job of a batch comes after one and not after another.

    Pairs are compared, as the index by batches and jobs orders them.
    """
    place = tuple_(EmailJob.batch_id, EmailJob.id)
    return (place > tuple_(*id_after(after))) & (place <= tuple_(*id_after((after[0], until))))


def _by_index(state: JobState) -> ColumnElement[bool] | None:
    """Return the condition of an index that has the jobs in this state and few others, if any."""
    return in_trouble() if state in TROUBLE else None


async def _end_of_part(
    connection: AsyncConnection, after: JobPosition, state: JobState
) -> int | None:
    """Return the last job of a batch that a part reads; None if it reads all of them."""
    jobs = select(EmailJob.id).where(_between(after, LAST_ID))
    indexed = _by_index(state)
    if indexed is not None:
        jobs = jobs.where(indexed)
    jobs = jobs.order_by(EmailJob.batch_id, EmailJob.id)
    last = await connection.scalar(jobs.offset(ROWS_AT_ONCE - 1).limit(1))
    return None if last is None else last | (BLOCK_JOBS - 1)


async def _named_rows(
    connection: AsyncConnection, which: JobFilter, job_ids: Sequence[int]
) -> SetRows:
    these = EmailJob.id == any_(literal(job_ids, ARRAY(BigInteger)))
    batches: Any = select(Batch.id, Batch.sender_id)
    batches = batches.where(Batch.id.in_(select(EmailJob.batch_id).where(these)))
    found = (await connection.execute(which.owned(batches))).all()
    return SetRows(
        [row.id for row in found], frozenset(row.sender_id for row in found), these, None
    )


async def _few_rows(connection: AsyncConnection, which: JobFilter, after: JobPosition) -> SetRows:
    walked = await walk_jobs(connection, which, after, _FOUND_AT_ONCE, rows=_FOUND_AT_ONCE)
    found = list(walked.found)
    reached = found[-1] if len(found) == _FOUND_AT_ONCE else walked.reached
    batch_ids = sorted({batch_id for batch_id, _ in found})
    if len(batch_ids) > _BATCHES_AT_ONCE:
        batch_ids = batch_ids[:_BATCHES_AT_ONCE]
        reached = which.after_batch(batch_ids[-1])
    these = Batch.id == any_(literal(batch_ids, ARRAY(BigInteger)))
    senders = await connection.scalars(select(Batch.sender_id).where(these))
    ids = literal([job_id for _, job_id in found], ARRAY(BigInteger))
    return SetRows(batch_ids, frozenset(senders), EmailJob.id == any_(ids), reached)
