"""The tables of e-mail jobs and attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    Select,
    Subquery,
    any_,
    cast,
    lateral,
    literal,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition
from outbox_server.services.scheduler.storage.job_filters import JobFilter, JobPosition
from outbox_server.services.scheduler.storage.walking import walk_jobs
from outbox_server.shared.callers import in_parts
from outbox_server.shared.database.cancellations import finished_now, state_now
from outbox_server.shared.database.message_ids import message_id_address
from outbox_server.shared.database.models import Attempt, Batch, DispatcherRow, EmailJob, Sender
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.filters.fields import Filter
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
    # None means not known.
    dispatcher_id: str | None = None
    endpoint: str | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job, with data of its batch, its sender and its last recorded attempt."""

    job_id: int
    batch_id: int
    sender_id: int
    user_id: str
    # The sender's first address, which is part of the Message-ID.
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
    # When its batch was accepted.
    created_at: datetime
    # The caller's own id; None means none. The labels are its own and those of its batch.
    external_id: str | None
    labels: Mapping[str, str]
    # Whether SendTestEmail made it.
    test: bool


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
    EmailJob.external_id,
    EmailJob.labels,
)
# What a job has from its batch.
_OF_BATCH: Final = (
    Batch.user_id,
    Batch.created_at,
    Batch.test,
    Batch.labels.label("batch_labels"),
)


_DISPATCHER_ID: Final = (
    select(DispatcherRow.dispatcher_id)
    .where(DispatcherRow.id == Attempt.dispatcher)
    .correlate(Attempt)
    .scalar_subquery()
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
    Attempt.endpoint,
    _DISPATCHER_ID.label("dispatcher_id"),
)
# Compared as the largest type, because a filter may have any number.
_ATTEMPT_LEAVES: Final[Mapping[str, Leaf]] = {
    "attempt_number": column(cast(Attempt.attempt, BigInteger)),
    "outcome": column(Attempt.outcome),
    "reply_class": column(Attempt.reply_class, nullable=True),
    "smtp_code": column(cast(Attempt.smtp_code, BigInteger), nullable=True),
    "enhanced_code": column(Attempt.enhanced_code, nullable=True),
    "dispatcher_id": column(_DISPATCHER_ID, nullable=True),
    "endpoint": column(Attempt.endpoint, nullable=True),
    "start_time": column(Attempt.started_at),
    "end_time": column(Attempt.ended_at),
}


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
        created_at=row.created_at,
        external_id=row.external_id,
        labels={**(row.batch_labels or {}), **(row.labels or {})},
        test=row.test,
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
        dispatcher_id=values["dispatcher_id"],
        endpoint=values["endpoint"],
    )


async def read_job(
    connection: AsyncConnection, job_id: int, user_id: str | None
) -> JobRecord | None:
    """Return a job, or None if it does not exist or belongs to another user."""
    job = owned_by(
        select(*_JOB, *_OF_BATCH)
        .join(Batch, Batch.id == EmailJob.batch_id)
        .where(EmailJob.id == job_id),
        Batch.user_id,
        user_id,
    ).subquery("job")
    row = (await connection.execute(_described(job))).one_or_none()
    return None if row is None else _record(row)


async def read_jobs(connection: AsyncConnection, job_ids: Sequence[int]) -> dict[int, JobRecord]:
    """Return some jobs by their ids, of any user."""
    page = (
        select(*_JOB, *_OF_BATCH)
        .join(Batch, Batch.id == EmailJob.batch_id)
        .where(EmailJob.id == any_(literal(job_ids, ARRAY(BigInteger))))
        .subquery("page")
    )
    rows = (await connection.execute(_described(page))).all()
    return {record.job_id: record for record in await in_parts(rows, _record)}


async def read_batches_of(
    connection: AsyncConnection, job_ids: Sequence[int]
) -> dict[int, tuple[int, str]]:
    """Return the batch and the user of some jobs, by their ids."""
    these = EmailJob.id == any_(literal(job_ids, ARRAY(BigInteger)))
    found = select(EmailJob.id, Batch.id.label("batch_id"), Batch.user_id).join(
        Batch, Batch.id == EmailJob.batch_id
    )
    rows = await connection.execute(found.where(these))
    return {row.id: (row.batch_id, row.user_id) for row in rows}


async def find_only_job(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> JobRecord | None:
    """Return the job of a batch that has one, or None if it has none."""
    found = await connection.scalar(
        select(EmailJob.id).where(EmailJob.batch_id == batch_id).order_by(EmailJob.id).limit(1)
    )
    return None if found is None else await read_job(connection, found, user_id)


async def list_jobs(
    connection: AsyncConnection, which: JobFilter, after: JobPosition, limit: int
) -> tuple[Sequence[tuple[JobPosition, JobRecord]], JobPosition | None]:
    """Return the first `limit` matching jobs after a position, each with its own.

    If there are fewer, although more may follow, the position where to continue is returned too.
    The connection must be a snapshot.
    """
    walked = await walk_jobs(connection, which, after, limit)
    if not walked.found:
        return [], walked.reached
    records = await read_jobs(connection, [job_id for _, job_id in walked.found])
    return [(place, records[place[1]]) for place in walked.found], walked.reached


def is_job_of(job_id: int, user_id: str | None) -> ColumnElement[bool]:
    """Return the condition for one job of this user."""
    batch = owned_by(select(Batch.id).where(Batch.id == EmailJob.batch_id), Batch.user_id, user_id)
    return (EmailJob.id == job_id) & batch.correlate(EmailJob).exists()


def is_batch_of(job: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition for the batch of one job."""
    return Batch.id == select(EmailJob.batch_id).where(job).scalar_subquery()


async def job_exists(connection: AsyncConnection, job_id: int, user_id: str | None) -> bool:
    """Return whether the job exists and belongs to this user. None means any user."""
    found = await connection.execute(select(EmailJob.id).where(is_job_of(job_id, user_id)))
    return found.one_or_none() is not None


async def list_attempts(
    connection: AsyncConnection,
    job_id: int,
    tree: Filter | None,
    after: int,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[PastAttempt], int | None]:
    """Return the first `limit` attempts after number `after` (0: all) that match.

    If there are fewer, although more may follow, the number where to continue is returned too.
    Check `job_exists` before.
    """
    rows: Select[Any] = select(*_ATTEMPT).where(Attempt.email_job_id == job_id)
    if after:
        rows = rows.where(Attempt.attempt < after if descending else Attempt.attempt > after)
    matches = None if tree is None else condition(tree, _ATTEMPT_LEAVES)
    found = await search(connection, rows, Attempt.attempt, matches, limit, descending=descending)
    return [_past(row) for row in found.rows], found.reached
