"""The tables of e-mail jobs and attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Subquery,
    case,
    exists,
    func,
    lateral,
    select,
    true,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.cancellations import finished_now, is_now, state_now
from outbox_server.shared.database.message_ids import message_id_address
from outbox_server.shared.database.models import (
    Attempt,
    Batch,
    BatchCancellation,
    BatchCount,
    CountDelta,
    EmailJob,
    Sender,
)
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.intake.addresses import address_key
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass, enum_or_none

# The largest number of an attempt that the table can have (smallint).
MAX_ATTEMPTS: Final = 2**15 - 1


@dataclass(frozen=True, slots=True)
class PastAttempt:
    """An attempt that has ended."""

    number: int
    started_at: datetime
    ended_at: datetime
    outcome: AttemptOutcome
    smtp_code: int | None
    enhanced_code: str | None
    message: str | None
    reply_class: ReplyClass | None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job, with data of its batch, its sender and its last recorded attempt."""

    job_id: int
    batch_id: int
    sender_id: int
    user_id: str
    # For its Message-ID.
    message_id_address: str
    recipient: str
    row_number: int
    state: JobState
    scheduled_at: datetime
    finished_at: datetime | None
    attempts: int
    # Attempts that count as failures.
    failures: int
    # None means that no attempt has ended.
    last: PastAttempt | None
    # When it expires. None means never.
    expires_at: datetime | None
    # When the server first deferred the mail. None means that it never did.
    deferred_since: datetime | None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list. None means any. `recipient` is compared without regard to case."""

    user_id: str | None
    sender_id: int | None = None
    batch_id: int | None = None
    state: JobState | None = None
    recipient: str | None = None


_JOB: Final = (
    EmailJob.id,
    EmailJob.batch_id,
    EmailJob.sender_id,
    EmailJob.recipient,
    EmailJob.row_number,
    state_now().label("state"),
    EmailJob.scheduled_at,
    finished_now().label("finished_at"),
    EmailJob.attempt,
    EmailJob.failures,
    EmailJob.expires_at,
    EmailJob.deferred_since,
)


_ATTEMPT: Final = (
    Attempt.attempt,
    Attempt.started_at,
    Attempt.ended_at,
    Attempt.outcome,
    Attempt.smtp_code,
    Attempt.enhanced_code,
    Attempt.message,
    Attempt.reply_class,
)


def is_to(address: str) -> ColumnElement[bool]:
    """Return the condition that a job goes to `address`, without regard to case.

    With the locale C, PostgreSQL's lower() changes ASCII letters only. If the address has other
    letters, only the given spelling and the lower-case spelling are found.
    """
    spellings = [func.lower(spelling) for spelling in {address, address_key(address)}]
    lowered = func.lower(EmailJob.recipient)
    hashed = func.hashtext(lowered).in_([func.hashtext(spelling) for spelling in spellings])
    return hashed & lowered.in_(spellings)


def _described(jobs: Subquery) -> Select[Any]:
    """Return the statement that reads all data of `jobs`, a subquery that has their owner too."""
    last = lateral(
        select(*_ATTEMPT)
        .where(Attempt.email_job_id == jobs.c.id)
        .order_by(Attempt.attempt.desc())
        .limit(1)
    )
    return (
        select(
            *jobs.c,
            message_id_address().label("message_id_address"),
            *(column.label(f"last_{column.key}") for column in last.c),
        )
        .join(Sender, Sender.id == jobs.c.sender_id)
        .join(last, true(), isouter=True)
    )


def _record(row: Row[Any]) -> JobRecord:
    return JobRecord(
        job_id=row.id,
        batch_id=row.batch_id,
        sender_id=row.sender_id,
        user_id=row.user_id,
        message_id_address=row.message_id_address,
        recipient=row.recipient,
        row_number=row.row_number,
        state=JobState(row.state),
        scheduled_at=row.scheduled_at,
        finished_at=row.finished_at,
        attempts=row.attempt,
        failures=row.failures,
        last=None if row.last_attempt is None else _past(row, "last_"),
        expires_at=row.expires_at,
        deferred_since=row.deferred_since,
    )


def _past(row: Any, prefix: str = "") -> PastAttempt:
    """Return an attempt from the columns `_ATTEMPT`, whose labels begin with `prefix`."""
    values = {column.key: getattr(row, prefix + column.key) for column in _ATTEMPT}
    return PastAttempt(
        number=values["attempt"],
        started_at=values["started_at"],
        ended_at=values["ended_at"],
        outcome=AttemptOutcome(values["outcome"]),
        smtp_code=values["smtp_code"],
        enhanced_code=values["enhanced_code"],
        message=values["message"],
        reply_class=enum_or_none(ReplyClass, values["reply_class"]),
    )


async def read_job(
    connection: AsyncConnection, job_id: int, user_id: str | None
) -> JobRecord | None:
    """Return a job, or None if it does not exist or belongs to another user."""
    job = owned_by(
        select(*_JOB, Batch.user_id)
        .join(Batch, Batch.id == EmailJob.batch_id)
        .where(EmailJob.id == job_id),
        Batch.user_id,
        user_id,
    ).subquery("job")
    row = (await connection.execute(_described(job))).one_or_none()
    return None if row is None else _record(row)


def _owned_batches(which: JobFilter) -> Select[int, str]:
    statement = owned_by(select(Batch.id, Batch.user_id), Batch.user_id, which.user_id)
    if which.sender_id is not None:
        statement = statement.where(Batch.sender_id == which.sender_id)
    if which.batch_id is not None:
        return statement.where(Batch.id == which.batch_id)
    return statement if which.state is None else statement.where(may_have(which.state))


def may_have(state: JobState) -> ColumnElement[bool]:
    """Return the condition that a batch has jobs in this state, or had a moment ago.

    The counts of the batch tell this. Without this condition, listing waiting jobs would read all
    jobs that were ever sent.
    """
    # Jobs that are being sent are counted as waiting.
    counted = int(JobState.SCHEDULED if state is JobState.SENDING else state)
    folded = exists().where(
        BatchCount.batch_id == Batch.id, BatchCount.state == counted, BatchCount.n > 0
    )
    # If the sum of rollup and deltas is positive, at least one of the two is.
    unfolded = (
        select(CountDelta.batch_id)
        .where(CountDelta.state == counted)
        .group_by(CountDelta.batch_id)
        .having(func.sum(CountDelta.n) > 0)
    )
    found = folded | Batch.id.in_(unfolded)
    if state is JobState.CANCELLED:
        found |= Batch.id.in_(select(BatchCancellation.batch_id))
    return found


def _by_batch(which: JobFilter, after: tuple[int, int], limit: int) -> Select[Any]:
    """Return the statement that reads jobs batch by batch, the oldest first, until `limit`.

    Each batch is read by its index and yields up to `limit` jobs. A plan that sorts would have to
    read all jobs of a user.
    """
    batches = _owned_batches(which).where(Batch.id >= after[0]).order_by(Batch.id).subquery("owned")
    jobs = select(*_JOB).where(
        EmailJob.batch_id == batches.c.id,
        EmailJob.id > case((batches.c.id == after[0], after[1]), else_=0),
    )
    if which.state is not None:
        jobs = jobs.where(is_now(which.state))
    part = lateral(jobs.order_by(EmailJob.id).limit(limit), "part")
    return select(*part.c, batches.c.user_id).join(part, true()).order_by(batches.c.id, part.c.id)


def _by_recipient(which: JobFilter, after: tuple[int, int], recipient: str) -> Select[Any]:
    """Return the statement that reads the jobs to one address, which are few, by their index."""
    batches = _owned_batches(which).subquery("owned")
    jobs = (
        select(*_JOB, batches.c.user_id)
        .join(batches, batches.c.id == EmailJob.batch_id)
        .where(
            is_to(recipient),
            (EmailJob.batch_id > after[0])
            | ((EmailJob.batch_id == after[0]) & (EmailJob.id > after[1])),
        )
        .order_by(EmailJob.batch_id, EmailJob.id)
    )
    return jobs if which.state is None else jobs.where(is_now(which.state))


async def list_jobs(
    connection: AsyncConnection, which: JobFilter, after: tuple[int, int], limit: int
) -> Sequence[JobRecord]:
    """Return the first `limit` jobs after (batch, job), in the order of their acceptance."""
    if which.recipient is None:
        found = _by_batch(which, after, limit)
    else:
        found = _by_recipient(which, after, which.recipient)
    page = found.limit(limit).subquery("page")
    statement = _described(page).order_by(page.c.batch_id, page.c.id)
    return [_record(row) for row in await connection.execute(statement)]


def is_job_of(job_id: int, user_id: str | None) -> ColumnElement[bool]:
    """Return the condition for one job of this user."""
    batch = owned_by(select(Batch.id).where(Batch.id == EmailJob.batch_id), Batch.user_id, user_id)
    return (EmailJob.id == job_id) & batch.correlate(EmailJob).exists()


async def job_exists(connection: AsyncConnection, job_id: int, user_id: str | None) -> bool:
    """Return whether the job exists and belongs to this user. None means any user."""
    found = await connection.execute(select(EmailJob.id).where(is_job_of(job_id, user_id)))
    return found.one_or_none() is not None


async def list_attempts(
    connection: AsyncConnection, job_id: int, after: int, limit: int
) -> Sequence[PastAttempt]:
    """Return the first `limit` attempts after number `after`. Check `job_exists` before."""
    rows = await connection.execute(
        select(*_ATTEMPT)
        .where(Attempt.email_job_id == job_id, Attempt.attempt > after)
        .order_by(Attempt.attempt)
        .limit(limit)
    )
    return [_past(row) for row in rows]
