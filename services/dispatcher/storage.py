"""All SQL of the dispatcher: set-based statements over the jobs of one group (group commit).

The guard of every statement is the job's state together with its attempt number, the fencing token:
what a newer attempt has touched cannot be changed by an older one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    Integer,
    SmallInteger,
    Text,
    bindparam,
    case,
    cast,
    column,
    extract,
    func,
    insert,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from shared.counts import in_state
from shared.database import unix_ms
from shared.message_ids import message_id_address
from shared.models import Attempt, Batch, CountDelta, EmailJob, Sender, Suppression
from shared.queue.keys import JobRef
from shared.states import AttemptOutcome, BatchState, JobState, SenderState, SmtpSecurity

_RECOVERED_AT_ONCE = 1_000
# 24 days: what the column holds.
_MOST_MS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class MarkedJob:
    """A job that is SENDING, in our hands until `lease_until`."""

    job: JobRef
    sender_id: int
    batch_id: int
    failures: int
    recipient: str
    variables: str | None
    lease_until: datetime
    sender_revision: int


@dataclass(frozen=True, slots=True)
class BatchContent:
    """What the mails of a batch share, and where they go."""

    batch_id: int
    subject: str | None
    body: str | None
    html: str | None
    variable_names: tuple[str, ...]
    sender_revision: int
    email: str
    message_id_address: str
    display_name: str
    smtp_host: str | None
    smtp_port: int | None
    smtp_security: SmtpSecurity | None
    smtp_username: str | None
    smtp_password: bytes | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """The outcome of one attempt, to be kept for ever, and the job's next state."""

    job: JobRef
    sender_id: int
    state: JobState
    failures: int
    outcome: AttemptOutcome
    counted: bool
    # `time.monotonic` of start and end: PostgreSQL's clock is the only one that is written.
    started: float
    ended: float
    retry_after: timedelta | None = None
    # Of the start, since the earliest instant at which the limits allowed it.
    late: timedelta | None = None
    smtp_code: int | None = None
    enhanced_code: str | None = None
    message: str | None = None


def _array(name: str, type_: Any) -> Any:
    return bindparam(name, type_=ARRAY(type_))


def _whole_ms(span: timedelta) -> int:
    return min(max(span // timedelta(milliseconds=1), 0), _MOST_MS)


def _milliseconds(value: ColumnElement[Any]) -> ColumnElement[Any]:
    return value * cast("1 millisecond", INTERVAL)


_claim = (
    func.unnest(_array("ids", BigInteger), _array("attempts", SmallInteger))
    .table_valued(column("id", BigInteger), column("attempt", SmallInteger), name="claim")
    .render_derived()
)

# A scalar subquery and no join: on a table that was filled a moment ago the planner would begin
# with the senders and pass over all of their waiting jobs.
_active_revision = (
    select(Sender.revision)
    .where(
        Sender.id == EmailJob.sender_id,
        Sender.state == SenderState.ACTIVE,
        Sender.deleted_at.is_(None),
    )
    .correlate(EmailJob)
    .scalar_subquery()
)


def _count_moves(moved: CTE) -> CTE:
    """Append what a statement's final states change in the counts, one row a group.

    `moved` has sender_id, batch_id, state and finished_at.
    """
    hour = func.date_trunc("hour", moved.c.finished_at)
    groups = (
        select(
            moved.c.sender_id,
            moved.c.batch_id,
            hour.label("hour"),
            moved.c.state,
            func.count().label("n"),
        )
        .where(moved.c.state > JobState.SENDING)
        .group_by(moved.c.sender_id, moved.c.batch_id, hour, moved.c.state)
        .cte("groups")
    )
    added = select(groups.c.sender_id, groups.c.batch_id, groups.c.hour, groups.c.state, groups.c.n)
    removed = select(
        groups.c.sender_id,
        groups.c.batch_id,
        groups.c.hour,
        cast(literal(int(JobState.SCHEDULED)), SmallInteger),
        -groups.c.n,
    )
    names = ["sender_id", "batch_id", "hour", "state", "n"]
    return insert(CountDelta).from_select(names, added.union_all(removed)).cte("counted")


def _mark_statement() -> Any:
    """Mark claimed jobs, unless their batch is cancelled; end those that must not be sent any more.

    FOR SHARE: a cancellation under way is waited for, and the state is looked at again; one that
    comes later waits for us (see shared/cancellations.py).
    """
    wanted = select(EmailJob.batch_id).join(_claim, _claim.c.id == EmailJob.id)
    batches = (
        select(Batch.id, Batch.user_id)
        .where(Batch.id.in_(wanted), Batch.state == BatchState.ACTIVE)
        .with_for_update(read=True)
        .cte("sendable")
    )
    suppressed = (
        select(Suppression.address)
        .where(
            Suppression.user_id == batches.c.user_id,
            Suppression.address == func.lower(EmailJob.recipient),
        )
        .correlate(batches, EmailJob)
        .exists()
    )
    # Neither can change while the job waits but by its attempt, which is looked at again below.
    judged = (
        select(
            EmailJob.id,
            _claim.c.attempt,
            case(
                (suppressed, int(JobState.SUPPRESSED)),
                (EmailJob.expires_at <= func.statement_timestamp(), int(JobState.EXPIRED)),
                else_=int(JobState.SENDING),
            ).label("state"),
        )
        .join(_claim, _claim.c.id == EmailJob.id)
        .join(batches, batches.c.id == EmailJob.batch_id)
        .where(
            EmailJob.state == JobState.SCHEDULED,
            EmailJob.attempt == _claim.c.attempt - 1,
            _active_revision.is_not(None),
        )
        .cte("judged")
    )
    sends = judged.c.state == JobState.SENDING
    leased = func.clock_timestamp() + bindparam("lease", type_=INTERVAL)
    moved = (
        update(EmailJob)
        .values(
            state=judged.c.state,
            # What is not sent has no attempt.
            attempt=case((sends, judged.c.attempt), else_=EmailJob.attempt),
            lease_until=case((sends, leased), else_=null()),
            finished_at=case((sends, null()), else_=func.statement_timestamp()),
        )
        .where(
            EmailJob.id == judged.c.id,
            EmailJob.state == JobState.SCHEDULED,
            EmailJob.attempt == judged.c.attempt - 1,
        )
        .returning(
            EmailJob.id,
            EmailJob.attempt,
            EmailJob.sender_id,
            EmailJob.batch_id,
            EmailJob.failures,
            EmailJob.recipient,
            EmailJob.variables,
            EmailJob.lease_until,
            EmailJob.state,
            EmailJob.finished_at,
            _active_revision.label("revision"),
        )
        .cte("moved")
    )
    return select(moved).where(moved.c.state == JobState.SENDING).add_cte(_count_moves(moved))


_MARK = _mark_statement()


async def mark_sending(
    connection: AsyncConnection, jobs: Sequence[JobRef], lease: timedelta
) -> list[MarkedJob]:
    """Mark claimed jobs SENDING and load them; a job that is missing from the answer is not ours.

    It or its batch was cancelled, it was sent by an earlier claim, its sender was paused; or it
    must not be sent any more, and is SUPPRESSED or EXPIRED now.
    """
    rows = await connection.execute(
        _MARK,
        {
            "ids": [job.job_id for job in jobs],
            "attempts": [job.attempt for job in jobs],
            "lease": lease,
        },
    )
    return [
        MarkedJob(
            job=JobRef(row.id, row.attempt),
            sender_id=row.sender_id,
            batch_id=row.batch_id,
            failures=row.failures,
            recipient=row.recipient,
            variables=row.variables,
            lease_until=row.lease_until,
            sender_revision=row.revision,
        )
        for row in rows
    ]


async def read_batches(
    connection: AsyncConnection, batch_ids: Sequence[int]
) -> dict[int, BatchContent]:
    """Return what the mails of each batch share, with the sender as it is now."""
    rows = await connection.execute(
        select(
            Batch.id,
            Batch.subject,
            Batch.body,
            Batch.html,
            Batch.variable_names,
            Sender.revision,
            Sender.email,
            message_id_address().label("message_id_address"),
            Sender.display_name,
            Sender.smtp_host,
            Sender.smtp_port,
            Sender.smtp_security,
            Sender.smtp_username,
            Sender.smtp_password,
        )
        .join(Sender, Sender.id == Batch.sender_id)
        .where(Batch.id.in_(batch_ids))
    )
    return {
        row.id: BatchContent(
            batch_id=row.id,
            subject=row.subject,
            body=row.body,
            html=row.html,
            variable_names=tuple(row.variable_names),
            sender_revision=row.revision,
            email=row.email,
            message_id_address=row.message_id_address,
            display_name=row.display_name,
            smtp_host=row.smtp_host,
            smtp_port=row.smtp_port,
            smtp_security=None if row.smtp_security is None else SmtpSecurity(row.smtp_security),
            smtp_username=row.smtp_username,
            smtp_password=row.smtp_password,
        )
        for row in rows
    }


_outcome = (
    func.unnest(
        _array("ids", BigInteger),
        _array("attempts", SmallInteger),
        _array("states", SmallInteger),
        _array("failures", SmallInteger),
        _array("outcomes", SmallInteger),
        _array("counted", Boolean),
        _array("started_ms", BigInteger),
        _array("ended_ms", BigInteger),
        _array("retry_ms", BigInteger),
        _array("late_ms", Integer),
        _array("codes", SmallInteger),
        _array("enhanced", Text),
        _array("messages", Text),
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
        name="outcome",
    )
    .render_derived()
)


def _settle_statement() -> Any:
    # Ended when the statement began, less what has gone by since: never before the true end.
    ended = func.statement_timestamp() - _milliseconds(_outcome.c.ended_ms)
    moved = (
        update(EmailJob)
        .values(
            state=_outcome.c.state,
            failures=_outcome.c.failures,
            lease_until=null(),
            finished_at=case((_outcome.c.state != JobState.SCHEDULED, ended), else_=null()),
            scheduled_at=case(
                (
                    _outcome.c.state == JobState.SCHEDULED,
                    ended + _milliseconds(func.coalesce(_outcome.c.retry_ms, 0)),
                ),
                else_=EmailJob.scheduled_at,
            ),
        )
        .where(
            EmailJob.id == _outcome.c.id,
            EmailJob.attempt == _outcome.c.attempt,
            EmailJob.state == JobState.SENDING,
        )
        .returning(
            EmailJob.id,
            EmailJob.sender_id,
            EmailJob.batch_id,
            EmailJob.state,
            EmailJob.scheduled_at,
            EmailJob.finished_at,
        )
        .cte("moved")
    )
    logged = (
        insert(Attempt)
        .from_select(
            [
                "email_job_id",
                "attempt",
                "sender_id",
                "started_at",
                "ended_at",
                "outcome",
                "counted",
                "late_ms",
                "smtp_code",
                "enhanced_code",
                "message",
            ],
            select(
                _outcome.c.id,
                _outcome.c.attempt,
                moved.c.sender_id,
                func.statement_timestamp() - _milliseconds(_outcome.c.started_ms),
                ended,
                _outcome.c.outcome,
                _outcome.c.counted,
                _outcome.c.late_ms,
                _outcome.c.code,
                _outcome.c.enhanced,
                _outcome.c.message,
            )
            .select_from(_outcome)
            .join(moved, moved.c.id == _outcome.c.id),
        )
        .cte("logged")
    )
    return select(moved.c.id, moved.c.state, moved.c.scheduled_at).add_cte(
        logged, _count_moves(moved)
    )


_SETTLE = _settle_statement()


async def settle(
    connection: AsyncConnection, records: Sequence[AttemptRecord], now: float
) -> dict[int, int]:
    """Record outcomes; returns the due time (Unix ms) of each job that it moved, by id.

    `now` is `time.monotonic`. A job that is missing was not ours any more: its lease had run out
    and somebody else has it, or an earlier try of this statement has recorded it.
    """
    rows = await connection.execute(
        _SETTLE,
        {
            "ids": [r.job.job_id for r in records],
            "attempts": [r.job.attempt for r in records],
            "states": [int(r.state) for r in records],
            "failures": [r.failures for r in records],
            "outcomes": [int(r.outcome) for r in records],
            "counted": [r.counted for r in records],
            # Rounded so that a start is never late and an end never early.
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
        },
    )
    return {row.id: unix_ms(row.scheduled_at) for row in rows}


_held = (
    func.unnest(
        _array("ids", BigInteger),
        _array("attempts", SmallInteger),
        _array("leases", EmailJob.lease_until.type),
    )
    .table_valued(
        column("id", BigInteger),
        column("attempt", SmallInteger),
        column("lease_until", EmailJob.lease_until.type),
        name="held",
    )
    .render_derived()
)

_GIVE_BACK = (
    update(EmailJob)
    .values(state=JobState.SCHEDULED, attempt=EmailJob.attempt - 1, lease_until=null())
    .where(
        EmailJob.id == _held.c.id,
        EmailJob.state == JobState.SENDING,
        EmailJob.attempt == _held.c.attempt,
        # The attempt's number is used again, so it is no fence here: the lease's end is.
        EmailJob.lease_until == _held.c.lease_until,
    )
    .returning(EmailJob.id, EmailJob.scheduled_at)
)


async def give_back(connection: AsyncConnection, jobs: Sequence[MarkedJob]) -> dict[int, int]:
    """Undo `mark_sending` of jobs whose body was not begun: no attempt is used up.

    Returns the due time (Unix ms) of each job that it moved, by id.
    """
    rows = await connection.execute(
        _GIVE_BACK,
        {
            "ids": [job.job.job_id for job in jobs],
            "attempts": [job.job.attempt for job in jobs],
            "leases": [job.lease_until for job in jobs],
        },
    )
    return {row.id: unix_ms(row.scheduled_at) for row in rows}


async def recover_expired(
    connection: AsyncConnection, lease: timedelta, next_state: JobState
) -> list[int]:
    """End the attempts whose lease ran out. Returns the senders concerned.

    Nobody knows whether such a mail was sent, so it takes a slot at the latest possible instant.
    `next_state`: SCHEDULED (it waits again, at its old place) or UNCERTAIN.
    """
    expired = (
        select(EmailJob.id, EmailJob.attempt, EmailJob.lease_until)
        .where(in_state(JobState.SENDING), EmailJob.lease_until < func.statement_timestamp())
        .order_by(EmailJob.lease_until)
        .limit(_RECOVERED_AT_ONCE)
        .with_for_update(skip_locked=True)
        .cte("expired")
    )
    final = next_state is not JobState.SCHEDULED
    moved = (
        update(EmailJob)
        .values(
            state=next_state,
            lease_until=null(),
            finished_at=expired.c.lease_until if final else null(),
        )
        .where(EmailJob.id == expired.c.id)
        .returning(
            EmailJob.id,
            EmailJob.attempt,
            EmailJob.sender_id,
            EmailJob.batch_id,
            EmailJob.state,
            EmailJob.finished_at,
        )
        .cte("moved")
    )
    logged = (
        insert(Attempt)
        .from_select(
            [
                "email_job_id",
                "attempt",
                "sender_id",
                "started_at",
                "ended_at",
                "outcome",
                "counted",
                "message",
            ],
            select(
                moved.c.id,
                moved.c.attempt,
                moved.c.sender_id,
                expired.c.lease_until - bindparam("lease", type_=INTERVAL),
                expired.c.lease_until,
                cast(literal(int(AttemptOutcome.LEASE_EXPIRED)), SmallInteger),
                literal(True),
                literal("the dispatcher recorded no outcome before its lease ran out"),
            )
            .select_from(moved)
            .join(expired, expired.c.id == moved.c.id),
        )
        .cte("logged")
    )
    statement = select(moved.c.sender_id).distinct().add_cte(logged, _count_moves(moved))
    rows = await connection.execute(statement, {"lease": lease})
    return list(rows.scalars())


async def next_expiry(connection: AsyncConnection) -> timedelta | None:
    """Return how long until the first lease runs out; None if nobody holds one."""
    left = extract("epoch", func.min(EmailJob.lease_until) - func.clock_timestamp())
    seconds = await connection.scalar(select(left).where(in_state(JobState.SENDING)))
    return None if seconds is None else timedelta(seconds=float(seconds))
