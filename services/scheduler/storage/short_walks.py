"""Finds jobs by indexes that lead to few rows: of an address, in flight, and the next ones due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, lateral, literal, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.conditions import (
    JOB_LEAVES,
    condition,
    has_external_id,
    is_to,
    job_leaves,
    senders_of,
)
from outbox_server.services.scheduler.storage.job_filters import (
    FoundJobs,
    JobFilter,
    JobPosition,
    id_after,
)
from outbox_server.shared.database.cancellations import waits_of
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import Batch, EmailJob, Sender
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.filters.fields import FieldTest, required_value
from outbox_server.shared.filters.grammar import leaves
from outbox_server.shared.states import JobState

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
# If a user has more jobs to one address, or more senders, the jobs are found by the batches
# instead.
_MOST_TO_ADDRESS: Final = 2_000
_MOST_SENDERS: Final = 10_000
_LATEST: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND


async def walk_address(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, limit: int
) -> FoundJobs | None:
    """Find jobs to one address, or return None if there are many jobs or very many senders."""
    address = which.only("recipient")
    if address is None:  # no address, so no mail can go to it
        return FoundJobs([])
    senders = senders_of(which.user_id)
    known, sender_id = required_value(which.tree, "sender_id")
    if known:
        senders = senders.where(Sender.id == (-1 if sender_id is None else sender_id))
    more_senders = senders.offset(_MOST_SENDERS).limit(1)
    if (await connection.execute(more_senders)).first() is not None:
        return None
    to_address = select(EmailJob.id).where(is_to(address, senders))
    more = to_address.offset(_MOST_TO_ADDRESS).limit(1)
    if (await connection.execute(more)).first() is not None:
        return None
    return await _few(connection, which, to_address, after, limit)


async def walk_in_flight(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, limit: int
) -> FoundJobs:
    """Find jobs that are being sent, which are few in the whole installation."""
    sending = select(EmailJob.id).where(in_state(JobState.SENDING))
    return await _few(connection, which, sending, after, limit)


async def walk_external_id(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, limit: int, rows: int
) -> FoundJobs:
    """Find jobs of the user with one external id, which may repeat: read at most `rows` rows."""
    place = (EmailJob.batch_id, EmailJob.id)
    named = has_external_id(which.user_id or "", which.only("external_id"))
    # A scalar subquery, not EXISTS: the planner could begin with all batches of the user.
    batch: Any = select(Batch.id).where(Batch.id == EmailJob.batch_id).correlate(EmailJob)
    owned = which.owned(batch).scalar_subquery().is_not(None)
    jobs = (
        select(*place)
        .where(named, which.beyond(place, id_after(after)), owned)
        .order_by(*which.ordered(*place))
    )
    last = (await connection.execute(jobs.offset(rows - 1).limit(1))).one_or_none()
    if last is not None:
        jobs = jobs.where(_up_to(which, place, id_after((last.batch_id, last.id))))
    matching = _matching(jobs, which)
    found = [(row.batch_id, row.id) for row in await connection.execute(matching.limit(limit))]
    if last is None or len(found) == limit:
        return FoundJobs(found)
    return FoundJobs(found, (last.batch_id, last.id))


async def _few(
    connection: AsyncConnection,
    which: JobFilter,
    few: Select[int],
    after: JobPosition,
    limit: int,
) -> FoundJobs:
    # Read first, and then row by row: LIMIT keeps the planner from beginning with all batches of
    # the user, or with another index of jobs.
    read_first = few.cte("few").prefix_with("MATERIALIZED")
    job = lateral(
        select(EmailJob.batch_id, EmailJob.id)
        .where(EmailJob.id == read_first.c.id, condition(which.tree, JOB_LEAVES))
        .limit(1),
        "job",
    )
    batch: Any = select(Batch.id).where(Batch.id == job.c.batch_id).limit(1)
    place = (job.c.batch_id, job.c.id)
    statement = (
        select(*place)
        .select_from(read_first)
        .join(job, true())
        .join(lateral(which.owned(batch), "batch"), true())
        .where(which.beyond(place, id_after(after)))
        .order_by(*which.ordered(*place))
        .limit(limit)
    )
    return FoundJobs([(row.batch_id, row.id) for row in await connection.execute(statement)])


async def walk_due(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, limit: int, rows: int
) -> FoundJobs:
    """Find waiting jobs of one sender in the order of their due times, reading at most `rows`."""
    sender_id = which.only("sender_id")
    place = (EmailJob.scheduled_at, EmailJob.id)
    owner = owned_by(select(Sender.id).where(Sender.id == sender_id), Sender.user_id, which.user_id)
    if (await connection.execute(owner)).one_or_none() is None:
        return FoundJobs([])
    jobs = (
        select(EmailJob.scheduled_at, EmailJob.id)
        .where(EmailJob.sender_id == sender_id, in_state(JobState.SCHEDULED))
        .order_by(*which.ordered(*place))
    )
    if after != which.start:
        due = _EPOCH + min(after[0], _LATEST) * _MICROSECOND
        jobs = jobs.where(which.beyond(place, [literal(due), id_after(after)[1]]))
    last = (await connection.execute(jobs.offset(rows - 1).limit(1))).one_or_none()
    if last is not None:
        jobs = jobs.where(_up_to(which, place, [literal(last[0]), literal(last[1])]))
    matching = _matching(jobs.where(waits_of(sender_id)), which).limit(limit)
    rows_found = await connection.execute(matching)
    found = [_position(row.scheduled_at, row.id) for row in rows_found]
    if last is None or len(found) == limit:
        return FoundJobs(found)
    return FoundJobs(found, _position(last.scheduled_at, last.id))


def _matching(jobs: Any, which: JobFilter) -> Any:
    """Return the jobs that match the filter. The batch is read once for each, if it is needed."""
    if which.tree is None or not any(_is_of_batch(test) for test in leaves(which.tree)):
        return jobs.where(condition(which.tree, JOB_LEAVES))
    of_job = select(Batch.created_at, Batch.labels, Batch.test)
    of_job = of_job.where(Batch.id == EmailJob.batch_id)
    # LIMIT keeps the planner from beginning with the batches.
    batch = lateral(of_job.correlate(EmailJob).limit(1), "of_job")
    matches = condition(which.tree, job_leaves(batch.c.created_at, batch.c.labels, batch.c.test))
    return jobs.join(batch, true()).where(matches)


def _is_of_batch(test: FieldTest) -> bool:
    return bool(test.key) or test.field in ("create_time", "test")


def _up_to(which: JobFilter, columns: Any, position: Any) -> ColumnElement[bool]:
    return ~which.beyond(columns, position)


def _position(scheduled_at: datetime, job_id: int) -> JobPosition:
    return (scheduled_at - _EPOCH) // _MICROSECOND, job_id
