"""Moves jobs out of a final state: FAILED jobs wait again, UNCERTAIN jobs as a caller decides.

The batch is locked against cancellation and the sender against deletion, both until the commit. So
a later cancellation or deletion finds the jobs and ends them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    any_,
    cast,
    func,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.cancellations import is_being_changed
from outbox_server.shared.database.count_deltas import counting_moves
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.lookups import is_looked_up
from outbox_server.shared.database.models import Batch, EmailJob, Sender
from outbox_server.shared.heads.markers import marking_stale
from outbox_server.shared.quotas.storage import check_waiting_jobs, lock_user, read_quotas
from outbox_server.shared.states import BatchState, JobChangeKind, JobState
from outbox_server.shared.user_quotas import UserQuotas


@dataclass(frozen=True, slots=True)
class ReopenedJobs:
    """How many jobs of a batch wait again, and its sender (0: the batch sends nothing any more)."""

    jobs: int = 0
    sender_id: int = 0


async def retry_named(
    connection: AsyncConnection, batch_id: int, jobs: ColumnElement[bool]
) -> ReopenedJobs:
    """Move the failed ones of some jobs of a batch back to SCHEDULED.

    No job is moved if the batch is cancelled or its sender deleted.
    """
    sender_id = await lock_sendable(connection, batch_id)
    if sender_id is None:
        return ReopenedJobs()
    this = (EmailJob.batch_id == batch_id) & jobs
    jobs_again = await connection.scalar(_reopen(this, JobState.FAILED, JobState.SCHEDULED))
    return ReopenedJobs(jobs_again or 0, sender_id)


async def retry_job(connection: AsyncConnection, batch_id: int, job_id: int) -> None:
    """Move one job back to SCHEDULED, as `retry_named` does."""
    await retry_named(connection, batch_id, EmailJob.id == job_id)


async def unwritten_retries(connection: AsyncConnection, job_ids: Sequence[int]) -> set[int]:
    """Return which of some jobs will be retried, because a retry of them is stored."""
    these = EmailJob.id == any_(literal(job_ids, ARRAY(BigInteger)))
    stored = select(EmailJob.id).where(
        these, in_state(JobState.FAILED), is_being_changed(JobChangeKind.RETRY)
    )
    return set(await connection.scalars(stored))


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


async def resolve(connection: AsyncConnection, job_id: int, state: JobState) -> bool:
    """Move a job from UNCERTAIN to SENT or SCHEDULED. Return False if it is not UNCERTAIN.

    A job that becomes SENT counts as sent when its last attempt ended and it became UNCERTAIN.
    """
    return bool(await connection.scalar(_reopen(EmailJob.id == job_id, JobState.UNCERTAIN, state)))


def _reopen(which: ColumnElement[bool], was: JobState, state: JobState) -> Any:
    """Return the statement that moves jobs out of a final state and updates counts and markers."""
    waits = state is JobState.SCHEDULED
    if waits:
        # An erased recipient has no address to send to.
        which &= EmailJob.recipient != ""
    # Locked in the order of ids, as settlements and cancellations lock them.
    picked = (
        select(EmailJob.id, EmailJob.finished_at)
        .where(which, in_state(was))
        .order_by(EmailJob.id)
        .with_for_update()
        .cte("picked")
    )
    now = func.statement_timestamp()
    expire_after = (
        select(Batch.expire_after_ms).where(Batch.id == EmailJob.batch_id).scalar_subquery()
    )
    again = {
        "scheduled_at": now,
        # The expiry counts from now, which is the new due time.
        "expires_at": now + expire_after * cast("1 millisecond", INTERVAL),
        "failures": 0,
        "deferred_since": null(),
        "finished_at": null(),
    }
    moved = (
        update(EmailJob)
        .where(is_looked_up(EmailJob.id, picked.c.id))
        .values(state=state, **(again if waits else {}))
        .returning(EmailJob.id, EmailJob.sender_id, EmailJob.batch_id, picked.c.finished_at)
        .cte("moved")
    )
    # The jobs are subtracted from the hour in which they ended, so that a recount by hours gives
    # the same.
    hour = func.date_trunc("hour", moved.c.finished_at)
    groups = (
        select(
            moved.c.sender_id,
            moved.c.batch_id,
            hour.label("hour"),
            cast(func.count(), BigInteger).label("n"),
        )
        .group_by(moved.c.sender_id, moved.c.batch_id, hour)
        .cte("groups")
    )
    parts = [counting_moves(groups, was=was, state=state)]
    if waits:
        parts.append(marking_stale(groups))
    return (
        select(cast(func.coalesce(func.sum(groups.c.n), 0), BigInteger))
        .select_from(groups)
        .add_cte(*parts)
    )
