"""Moves jobs out of a final state: FAILED jobs wait again, UNCERTAIN jobs as a caller decides.

The batch is locked against cancellation and the sender against deletion, both until the commit. So
a later cancellation or deletion finds the jobs and ends them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    any_,
    bindparam,
    cast,
    func,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.counted_states import may_have
from outbox_server.shared.database.count_deltas import counting_moves
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import Batch, EmailJob, Sender
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.heads.markers import marking_stale
from outbox_server.shared.quotas.storage import check_waiting_jobs, lock_user, read_quotas
from outbox_server.shared.states import BatchState, JobState
from outbox_server.shared.user_quotas import UserQuotas

# The number of jobs that one transaction moves, in about 0.5 s.
_CHUNK: Final = 20_000


@dataclass(frozen=True, slots=True)
class FailedJobs:
    """Which failed jobs to retry. None means any. A field besides `user_id` must be set."""

    user_id: str | None
    batch_id: int | None = None
    sender_id: int | None = None
    job_ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class RetriedJobs:
    """How many jobs wait again, how many others matched, and the senders whose heads changed."""

    jobs: int
    skipped: int
    sender_ids: tuple[int, ...]


async def retry_failed(
    engine: AsyncEngine,
    which: FailedJobs,
    chunk: int = _CHUNK,
    *,
    quotas: UserQuotas | None = None,
    record: Callable[[AsyncConnection, ReopenedJobs], Awaitable[None]] | None = None,
) -> RetriedJobs:
    """Move failed jobs back to SCHEDULED, due now, with all their retries.

    Each `chunk` of a batch has its own transaction. If the call is interrupted, the caller can
    simply repeat it. Jobs of cancelled batches and of deleted senders are left alone. `quotas` has
    the default quotas of a user; None means no quotas. `record` records a chunk that has moved
    jobs, in its transaction.

    Raises:
        ResourceExhausted: USER_WAITING_JOBS_EXCEEDED. Chunks that were already moved stay so.
    """
    async with engine.connect() as connection:
        matched = (await connection.execute(_count_matching(which))).scalar_one()
        batches = (await connection.execute(_batches_with_failures(which))).scalars().all()
    jobs = 0
    senders: set[int] = set()
    for batch_id in batches:
        after: int | None = 0
        while after is not None:

            async def step(
                connection: AsyncConnection, batch_id: int = batch_id, after: int = after
            ) -> ReopenedJobs:
                if quotas is None:
                    done = await _retry_chunk(connection, which, batch_id, after, chunk)
                else:
                    async with keeping_quota(connection, batch_id, quotas) as moved:
                        done = await _retry_chunk(connection, which, batch_id, after, chunk)
                        moved.append(done.jobs)
                if done.jobs and record is not None:
                    await record(connection, done)
                return done

            moved = await in_transaction(engine, step)
            jobs += moved.jobs
            if moved.jobs:
                senders.add(moved.sender_id)
            after = moved.last_id if moved.jobs == chunk else None
    return RetriedJobs(jobs, max(matched - jobs, 0), tuple(sorted(senders)))


@dataclass(frozen=True, slots=True)
class ReopenedJobs:
    """How many jobs of a batch wait again, its sender, and the id of the last job."""

    jobs: int = 0
    sender_id: int = 0
    # The id of the last job.
    last_id: int = 0


async def _retry_chunk(
    connection: AsyncConnection, which: FailedJobs, batch_id: int, after: int, chunk: int
) -> ReopenedJobs:
    sender_id = await lock_sendable(connection, batch_id)
    if sender_id is None:
        return ReopenedJobs()
    failed = (EmailJob.batch_id == batch_id) & (EmailJob.id > after)
    if which.job_ids is not None:
        failed &= _named(which)
    statement = _reopen(failed, JobState.FAILED, JobState.SCHEDULED, chunk)
    row = (await connection.execute(statement)).one()
    return ReopenedJobs(row.jobs, sender_id, row.last_id)


async def retry_named(
    connection: AsyncConnection, batch_id: int, jobs: ColumnElement[bool]
) -> ReopenedJobs:
    """Move the failed ones of some jobs of a batch back to SCHEDULED.

    None is moved if the batch is cancelled or its sender deleted.
    """
    sender_id = await lock_sendable(connection, batch_id)
    if sender_id is None:
        return ReopenedJobs()
    this = (EmailJob.batch_id == batch_id) & jobs
    row = (await connection.execute(_reopen(this, JobState.FAILED, JobState.SCHEDULED, None))).one()
    return ReopenedJobs(row.jobs, sender_id, row.last_id)


@asynccontextmanager
async def keeping_quota(
    connection: AsyncConnection, batch_id: int, defaults: UserQuotas
) -> AsyncIterator[list[int]]:
    """Lock the owner of a batch, and check its quota at the end of the block.

    The block appends to the list how many jobs it moved to SCHEDULED.

    Raises:
        ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
    """
    owner = select(Batch.user_id).where(Batch.id == batch_id)
    user_id = (await connection.execute(owner)).scalar_one()
    await lock_user(connection, user_id)
    moved: list[int] = []
    yield moved
    if sum(moved):
        quotas = await read_quotas(connection, user_id, defaults)
        await check_waiting_jobs(connection, user_id, sum(moved), quotas, added=True)


async def lock_sendable(connection: AsyncConnection, batch_id: int) -> int | None:
    """Lock a batch and its sender until the commit, and return the sender.

    Return None if the batch is cancelled or its sender deleted. If FOR SHARE has to wait for a
    cancellation, PostgreSQL checks the conditions again afterwards.
    """
    statement = (
        select(Batch.sender_id)
        .join(Sender, Sender.id == Batch.sender_id)
        .where(
            Batch.id == batch_id,
            Batch.state == BatchState.ACTIVE,
            Sender.deleted_at.is_(None),
        )
        .with_for_update(read=True)
    )
    return (await connection.execute(statement)).scalar_one_or_none()


def _owned(which: FailedJobs) -> Select[int]:
    statement = owned_by(select(Batch.id), Batch.user_id, which.user_id)
    if which.batch_id is not None:
        statement = statement.where(Batch.id == which.batch_id)
    if which.sender_id is not None:
        statement = statement.where(Batch.sender_id == which.sender_id)
    return statement


def _named(which: FailedJobs) -> ColumnElement[bool]:
    return EmailJob.id == any_(bindparam("ids", list(which.job_ids or ()), ARRAY(BigInteger)))


def _count_matching(which: FailedJobs) -> Select[int]:
    """Count all jobs that match, in any state. The number of a batch was stored by its intake."""
    if which.job_ids is None:
        batches = _owned(which).with_only_columns(Batch.accepted_count).subquery()
        return select(cast(func.coalesce(func.sum(batches.c.accepted_count), 0), BigInteger))
    return (
        select(func.count())
        .select_from(EmailJob)
        .where(
            _named(which),
            _owned(which).where(Batch.id == EmailJob.batch_id).correlate(EmailJob).exists(),
        )
    )


def _batches_with_failures(which: FailedJobs) -> Select[int]:
    if which.job_ids is None:
        return _owned(which).where(may_have(frozenset({JobState.FAILED}))).order_by(Batch.id)
    of_jobs = select(EmailJob.batch_id).where(_named(which))
    return _owned(which).where(Batch.id.in_(of_jobs)).order_by(Batch.id)


async def resolve(connection: AsyncConnection, job_id: int, state: JobState) -> bool:
    """Move a job from UNCERTAIN to SENT or SCHEDULED. Return False if it is not UNCERTAIN.

    A job that becomes SENT counts as sent when its last attempt ended and it became UNCERTAIN.
    """
    statement = _reopen(EmailJob.id == job_id, JobState.UNCERTAIN, state, 1)
    return bool((await connection.execute(statement)).one().jobs)


def _reopen(which: ColumnElement[bool], was: JobState, state: JobState, limit: int | None) -> Any:
    """Return the statement that moves jobs out of a final state and updates counts and markers."""
    waits = state is JobState.SCHEDULED
    if waits:
        # Of an erased recipient there is no address to send to.
        which &= EmailJob.recipient != ""
    # Locked in the order of ids, as settlements and cancellations lock them.
    picked = (
        select(EmailJob.id, EmailJob.finished_at)
        .where(which, in_state(was))
        .order_by(EmailJob.id)
        .limit(limit)
        .with_for_update()
        .cte("picked")
    )
    now = func.statement_timestamp()
    expire_after = (
        select(Batch.expire_after_ms).where(Batch.id == EmailJob.batch_id).scalar_subquery()
    )
    again = {
        "scheduled_at": now,
        # Counts from now, which is the new due time.
        "expires_at": now + expire_after * cast("1 millisecond", INTERVAL),
        "failures": 0,
        "deferred_since": null(),
        "finished_at": null(),
    }
    moved = (
        update(EmailJob)
        .where(EmailJob.id == picked.c.id)
        .values(state=state, **(again if waits else {}))
        .returning(EmailJob.id, EmailJob.sender_id, EmailJob.batch_id, picked.c.finished_at)
        .cte("moved")
    )
    # Subtracted from the hour in which the jobs ended, so that a recount by hours gives the same.
    hour = func.date_trunc("hour", moved.c.finished_at)
    groups = (
        select(
            moved.c.sender_id,
            moved.c.batch_id,
            hour.label("hour"),
            cast(func.count(), BigInteger).label("n"),
            func.max(moved.c.id).label("last_id"),
        )
        .group_by(moved.c.sender_id, moved.c.batch_id, hour)
        .cte("groups")
    )
    parts = [counting_moves(groups, was=was, state=state)]
    if waits:
        parts.append(marking_stale(groups))
    return (
        select(
            cast(func.coalesce(func.sum(groups.c.n), 0), BigInteger).label("jobs"),
            func.coalesce(func.max(groups.c.last_id), 0).label("last_id"),
        )
        .select_from(groups)
        .add_cte(*parts)
    )
