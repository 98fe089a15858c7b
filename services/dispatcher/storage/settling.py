"""Records the outcomes of attempts, and gives back jobs whose body was not begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import psycopg
from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    FromClause,
    Integer,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    column,
    func,
    null,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher.storage.fragments import (
    array,
    counting_ends,
    log_attempts,
    milliseconds,
)
from outbox_server.services.dispatcher.storage.marking import MarkedJob
from outbox_server.shared.database.engine import unix_ms
from outbox_server.shared.database.frequent import FrequentStatement
from outbox_server.shared.database.models import EmailJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass

# The limit of the column, 24 days.
_MOST_MS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """The outcome of one attempt, to be kept for ever, and the job's next state."""

    job: JobRef
    sender_id: int
    state: JobState
    failures: int
    outcome: AttemptOutcome
    counted: bool
    # Values of `time.monotonic`. They are converted, so that all stored times are PostgreSQL's.
    started: float
    ended: float
    retry_after: timedelta | None = None
    # The time from when the limits allowed the attempt until it started.
    late: timedelta | None = None
    smtp_code: int | None = None
    enhanced_code: str | None = None
    message: str | None = None
    reply_class: ReplyClass | None = None
    # The server deferred the mail.
    deferred: bool = False
    # host:port, or `relay`. None means that the mail was not built.
    endpoint: str | None = None


def _whole_ms(span: timedelta) -> int:
    return min(max(span // timedelta(milliseconds=1), 0), _MOST_MS)


_outcome = (
    func.unnest(
        array("ids", BigInteger),
        array("attempts", SmallInteger),
        array("states", SmallInteger),
        array("failures", SmallInteger),
        array("outcomes", SmallInteger),
        array("counted", Boolean),
        array("started_ms", BigInteger),
        array("ended_ms", BigInteger),
        array("retry_ms", BigInteger),
        array("late_ms", Integer),
        array("codes", SmallInteger),
        array("enhanced", Text),
        array("messages", Text),
        array("classes", SmallInteger),
        array("deferred", Boolean),
        array("endpoints", Text),
    )
    .table_valued(
        column("id", BigInteger),
        column("attempt", SmallInteger),
        column("state", SmallInteger),
        column("failures", SmallInteger),
        column("outcome", SmallInteger),
        column("counted", Boolean),
        column("started_ms", BigInteger),
        column("ended_ms", BigInteger),
        column("retry_ms", BigInteger),
        column("late_ms", Integer),
        column("code", SmallInteger),
        column("enhanced", Text),
        column("message", Text),
        column("reply_class", SmallInteger),
        column("deferred", Boolean),
        column("endpoint", Text),
        name="outcome",
    )
    .render_derived()
)


def _unlocked() -> CTE:
    """Return the outcomes of jobs that nobody else has locked."""
    return (
        select(*_outcome.c)
        .join(EmailJob, _is_of(_outcome))
        .with_for_update(of=EmailJob, key_share=True, skip_locked=True)
        .cte("unlocked")
    )


def _is_of(outcome: FromClause) -> ColumnElement[bool]:
    return and_(
        EmailJob.id == outcome.c.id,
        EmailJob.attempt == outcome.c.attempt,
        # `+ 0`: the plan is kept, and must not read all jobs that are SENDING.
        EmailJob.state + 0 == int(JobState.SENDING),
    )


def ending(*, waits: bool = True) -> tuple[CTE, CTE]:
    """Return the parts of a statement that end attempts, and that log them.

    `waits` False: jobs that somebody else has locked are left out.
    """
    outcome: FromClause = _outcome if waits else _unlocked()
    # The start of the statement minus the time since the end. Never before the true end.
    ended_at = func.statement_timestamp() - milliseconds(outcome.c.ended_ms)
    ended = (
        update(EmailJob)
        .values(
            state=outcome.c.state,
            failures=outcome.c.failures,
            lease_until=null(),
            finished_at=case((outcome.c.state != JobState.SCHEDULED, ended_at), else_=null()),
            scheduled_at=case(
                (
                    outcome.c.state == JobState.SCHEDULED,
                    ended_at + milliseconds(func.coalesce(outcome.c.retry_ms, 0)),
                ),
                else_=EmailJob.scheduled_at,
            ),
            deferred_since=case(
                (outcome.c.deferred, func.coalesce(EmailJob.deferred_since, ended_at)),
                else_=EmailJob.deferred_since,
            ),
        )
        .where(_is_of(outcome))
        .returning(
            EmailJob.id,
            EmailJob.attempt,
            EmailJob.sender_id,
            EmailJob.batch_id,
            EmailJob.state,
            EmailJob.scheduled_at,
            EmailJob.finished_at,
            (func.statement_timestamp() - milliseconds(outcome.c.started_ms)).label("started_at"),
            ended_at.label("ended_at"),
            outcome.c.outcome,
            outcome.c.counted,
            outcome.c.late_ms,
            outcome.c.code,
            outcome.c.enhanced,
            outcome.c.message,
            outcome.c.reply_class,
            outcome.c.endpoint,
        )
        .cte("ended")
    )
    logged = log_attempts(
        ended,
        email_job_id=ended.c.id,
        attempt=ended.c.attempt,
        sender_id=ended.c.sender_id,
        started_at=ended.c.started_at,
        ended_at=ended.c.ended_at,
        outcome=ended.c.outcome,
        counted=ended.c.counted,
        late_ms=ended.c.late_ms,
        smtp_code=ended.c.code,
        enhanced_code=ended.c.enhanced,
        message=ended.c.message,
        reply_class=ended.c.reply_class,
        dispatcher=bindparam("dispatcher", type_=Integer),
        endpoint=ended.c.endpoint,
    )
    return ended, logged


def _settle_statement() -> Any:
    ended, logged = ending()
    return select(ended.c.id, ended.c.scheduled_at).add_cte(logged, counting_ends(ended))


SETTLE: Final = FrequentStatement(_settle_statement())


async def settle(
    connection: psycopg.AsyncConnection[Any],
    records: Sequence[AttemptRecord],
    now: float,
    *,
    dispatcher: int | None = None,
) -> dict[int, int]:
    """Record outcomes. Return the due time (Unix ms) of each job that was moved, by id.

    `now` is a value of `time.monotonic`, `dispatcher` the number of this process. If a job is
    missing from the result, its lease had expired and the attempt was ended, or an earlier try of
    this statement has recorded it.
    """
    rows = await SETTLE.run(connection, outcome_values(records, now, dispatcher))
    return {job_id: unix_ms(scheduled_at) for job_id, scheduled_at in rows}


def outcome_values(
    records: Sequence[AttemptRecord], now: float, dispatcher: int | None
) -> dict[str, Any]:
    """Return the parameters of `ending`. `now` is a value of `time.monotonic`."""
    records = sorted(records, key=lambda record: record.job)
    return {
        "ids": [r.job.job_id for r in records],
        "attempts": [r.job.attempt for r in records],
        "states": [int(r.state) for r in records],
        "failures": [r.failures for r in records],
        "outcomes": [int(r.outcome) for r in records],
        "counted": [r.counted for r in records],
        # Rounded so that no start is too late and no end too early.
        "started_ms": [-int((r.started - now) * 1000 // 1) for r in records],
        "ended_ms": [int((now - r.ended) * 1000) for r in records],
        "retry_ms": [
            None if r.retry_after is None else r.retry_after // timedelta(milliseconds=1)
            for r in records
        ],
        "late_ms": [None if r.late is None else _whole_ms(r.late) for r in records],
        "codes": [r.smtp_code for r in records],
        "enhanced": [r.enhanced_code for r in records],
        "messages": [r.message for r in records],
        "classes": [None if r.reply_class is None else int(r.reply_class) for r in records],
        "deferred": [r.deferred for r in records],
        "endpoints": [r.endpoint for r in records],
        "dispatcher": dispatcher,
    }


_leased = (
    func.unnest(
        array("ids", BigInteger),
        array("attempts", SmallInteger),
        array("leases", EmailJob.lease_until.type),
    )
    .table_valued(
        column("id", BigInteger),
        column("attempt", SmallInteger),
        column("lease_until", EmailJob.lease_until.type),
        name="leased",
    )
    .render_derived()
)

_GIVE_BACK = (
    update(EmailJob)
    .values(state=JobState.SCHEDULED, attempt=EmailJob.attempt - 1, lease_until=null())
    .where(
        EmailJob.id == _leased.c.id,
        EmailJob.state == JobState.SENDING,
        EmailJob.attempt == _leased.c.attempt,
        # The attempt number is used again, so here the end of the lease is the fencing token.
        EmailJob.lease_until == _leased.c.lease_until,
    )
    .returning(EmailJob.id, EmailJob.scheduled_at)
)


async def give_back(connection: AsyncConnection, jobs: Sequence[MarkedJob]) -> dict[int, int]:
    """Undo `mark_sending` for jobs whose body was not begun. No attempt is used up.

    Return the due time (Unix ms) of each job that was moved, by id.
    """
    jobs = sorted(jobs, key=lambda job: job.job)
    rows = await connection.execute(
        _GIVE_BACK,
        {
            "ids": [job.job.job_id for job in jobs],
            "attempts": [job.job.attempt for job in jobs],
            "leases": [job.lease_until for job in jobs],
        },
    )
    return {row.id: unix_ms(row.scheduled_at) for row in rows}
