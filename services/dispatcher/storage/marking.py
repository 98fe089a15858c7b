"""Marks claimed jobs SENDING, and reads what their mails are built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg
from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Select,
    SmallInteger,
    and_,
    bindparam,
    case,
    column,
    func,
    literal,
    not_,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher.storage.fragments import array, counting_ends
from outbox_server.shared.database.frequent import FrequentStatement
from outbox_server.shared.database.key_space import PARAMETER as KEY_SPACE
from outbox_server.shared.database.key_space import is_locked_key_space
from outbox_server.shared.database.models import (
    Batch,
    EmailJob,
    Heartbeat,
    Sender,
    ShardLife,
    Suppression,
)
from outbox_server.shared.database.pauses import batch_is_paused, sender_is_active
from outbox_server.shared.database.recipient_keys import covers_job
from outbox_server.shared.heads.statements import unix_ms_of
from outbox_server.shared.holds.conditions import may_be_sent
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.states import BatchState, JobState, SenderState


@dataclass(frozen=True, slots=True)
class MarkedJob:
    """A job that is SENDING, leased by this dispatcher until `lease_until`."""

    job: JobRef
    sender_id: int
    batch_id: int
    failures: int
    recipient: str
    variables: str | None
    lease_until: datetime
    sender_revision: int
    # The time since the server first deferred the mail. None means that it never did.
    deferred_for: timedelta | None = None
    batch_revision: int = 1

    @property
    def revisions(self) -> tuple[int, int]:
        """The revisions of the sender and of the batch, by which a cached batch is outdated."""
        return self.sender_revision, self.batch_revision


@dataclass(frozen=True, slots=True)
class Unmarked:
    """Why `mark_sending` left out claims.

    `valid`: the life in which they were made is the valid one. `postgres_ms` is PostgreSQL's time.
    `due` has the claims that wait to be sent, with their due times (Unix ms); the end of a pause
    counts as a due time. `unknown` has those that Redis should not have: PostgreSQL has no such
    job, it belongs to another sender, or it waits with another attempt. All others must not be sent
    now.
    """

    valid: bool
    postgres_ms: int
    due: dict[int, int]
    unknown: frozenset[int]


_claim = (
    func.unnest(
        array("claimed", BigInteger),
        array("claimed_attempts", SmallInteger),
        array("senders", BigInteger),
    )
    .table_valued(
        column("id", BigInteger),
        column("attempt", SmallInteger),
        column("sender", BigInteger),
        name="claim",
    )
    .render_derived()
)

# The life in which the claims were made, if it is valid (shared/heads/lives.py).
_valid_life = select(ShardLife.shard).where(
    ShardLife.shard == bindparam("shard", type_=BigInteger), ShardLife.life == bindparam("life")
)

# `+ 0`: if all jobs that the statistics know are finished, the planner expects no waiting job. It
# would read all that a new batch has since added, by the index of heads, once for each claim.
_WAITS = EmailJob.state + 0 == int(JobState.SCHEDULED)

# A scalar subquery, not a join: without statistics, on a table that was just filled, the planner
# would begin with the senders and read all of their waiting jobs.
_active_revision = (
    select(Sender.revision)
    .where(
        Sender.id == EmailJob.sender_id,
        sender_is_active(),
        Sender.deleted_at.is_(None),
    )
    .correlate(EmailJob)
    .scalar_subquery()
)


# When the pause of the sender ends by itself, if it has one.
_sender_paused_until = (
    select(Sender.paused_until)
    .where(
        Sender.id == EmailJob.sender_id,
        Sender.state == SenderState.PAUSED,
        Sender.deleted_at.is_(None),
    )
    .correlate(EmailJob)
    .scalar_subquery()
)

_DATA_ARE_NEW = func.coalesce(select(Heartbeat.number).scalar_subquery(), 0) >= bindparam(
    "seen", type_=BigInteger
)


def marking(first: CTE | None = None) -> CTE:
    """Return the part of a statement that marks claimed jobs, and ends those not to be sent.

    `first` is done before it: it may wait for a lock, and must not hold those of this part then.

    Jobs of cancelled and of paused batches are left out. A later cancellation or pause waits for
    FOR SHARE of this statement (see shared/database/cancellations.py and pauses.py).

    It marks at most `room` claims, and one more for each job of `first`, in any order.

    It does not wait for locks: jobs and batches that another transaction has locked are left out,
    because the other jobs of the group would wait for them. `explain_unmarked` finds them. There
    are two exceptions. While a dispatcher begins the next life, or the stored settings change, the
    statement waits, and then marks nothing. Until it is committed, no next life becomes valid and
    no change of the settings is made.

    PostgreSQL decides which sender owns the job and, by its clock, whether it is due. It marks no
    job that is held (`shared.holds`), and no job at all if its data are older than what this
    process has seen.
    """
    number: ColumnElement[int] = literal(0)
    begins: ColumnElement[bool] = true()
    if first is not None:
        number = select(func.count()).select_from(first).scalar_subquery()
        # Refer to `first`, so that this part is executed after it.
        begins = number >= 0
    life = _valid_life.where(begins).with_for_update(read=True, key_share=True).cte("life")
    wanted = select(EmailJob.batch_id).join(_claim, _claim.c.id == EmailJob.id)
    batches = (
        select(Batch.id, Batch.user_id, Batch.revision)
        .where(
            Batch.id.in_(wanted),
            Batch.state == BatchState.ACTIVE,
            not_(batch_is_paused()),
            begins,
        )
        .with_for_update(read=True, skip_locked=True)
        .cte("sendable")
    )
    suppressed = (
        select(Suppression.address)
        .where(covers_job(batches.c.user_id))
        .correlate(batches, EmailJob)
        .exists()
    )
    # The decision is valid as long as the job waits. The update below checks again that it does.
    decided = (
        select(
            EmailJob.id,
            _claim.c.attempt,
            batches.c.revision.label("batch_revision"),
            case(
                (suppressed, int(JobState.SUPPRESSED)),
                (EmailJob.expires_at <= func.statement_timestamp(), int(JobState.EXPIRED)),
                else_=int(JobState.SENDING),
            ).label("state"),
        )
        .join(_claim, _claim.c.id == EmailJob.id)
        .join(batches, batches.c.id == EmailJob.batch_id)
        .join(life, true())
        .where(
            _WAITS,
            EmailJob.attempt == _claim.c.attempt - 1,
            EmailJob.sender_id == _claim.c.sender,
            EmailJob.scheduled_at <= func.clock_timestamp(),
            _active_revision.is_not(None),
            is_locked_key_space(),
            _DATA_ARE_NEW,
            may_be_sent(),
        )
        .limit(func.greatest(bindparam("room", type_=BigInteger) + number, 0))
        .with_for_update(of=EmailJob, key_share=True, skip_locked=True)
        .cte("decided")
    )
    sends = decided.c.state == JobState.SENDING
    leased = func.clock_timestamp() + bindparam("lease", type_=INTERVAL)
    return (
        update(EmailJob)
        .values(
            state=decided.c.state,
            # A job that is not sent does not use an attempt.
            attempt=case((sends, decided.c.attempt), else_=EmailJob.attempt),
            lease_until=case((sends, leased), else_=null()),
            finished_at=case((sends, null()), else_=func.statement_timestamp()),
        )
        .where(
            EmailJob.id == decided.c.id,
            _WAITS,
            EmailJob.attempt == decided.c.attempt - 1,
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
            (func.clock_timestamp() - EmailJob.deferred_since).label("deferred_for"),
            _active_revision.label("revision"),
            decided.c.batch_revision,
        )
        .cte("marked")
    )


def marked_columns(marked: CTE) -> Select[Any]:
    """Return what `marked_job` reads of the jobs that `marking` has marked SENDING."""
    return select(
        marked.c.id,
        marked.c.attempt,
        marked.c.sender_id,
        marked.c.batch_id,
        marked.c.failures,
        marked.c.recipient,
        marked.c.variables,
        marked.c.lease_until,
        marked.c.deferred_for,
        marked.c.revision,
        marked.c.batch_revision,
    ).where(marked.c.state == JobState.SENDING)


def _mark_statement() -> Any:
    marked = marking()
    return marked_columns(marked).add_cte(counting_ends(marked))


MARK: Final = FrequentStatement(_mark_statement())


def _claims(claims: Sequence[Claim], shard: int) -> dict[str, Any]:
    """Return the parameters of both statements. All claims are of one life of the shard."""
    return {
        "claimed": [claim.job.job_id for claim in claims],
        "claimed_attempts": [claim.job.attempt for claim in claims],
        "senders": [claim.sender_id for claim in claims],
        "shard": shard,
        "life": claims[0].life if claims else "",
    }


@dataclass(frozen=True, slots=True)
class Marking:
    """Claims to be marked, all made in one life of a shard of a key space.

    `seen` is the number of the newest heartbeat that the process has seen. At most `room` of the
    claims are marked, and one more for each outcome that the same statement records. None means
    all of them.
    """

    claims: Sequence[Claim]
    lease: timedelta
    shard: int
    key_space: str = ""
    seen: int = 0
    room: int | None = None

    def values(self) -> dict[str, Any]:
        """Return the parameters of the statement."""
        return _claims(self.claims, self.shard) | {
            "lease": self.lease,
            KEY_SPACE: self.key_space,
            "seen": self.seen,
            "room": len(self.claims) if self.room is None else self.room,
        }


async def mark_sending(
    connection: psycopg.AsyncConnection[Any], marking: Marking
) -> list[MarkedJob]:
    """Mark jobs SENDING, and load them.

    A job that is missing from the result must not be sent now: it or its batch was cancelled, an
    earlier claim sent it, its sender or its batch was paused, it is now SUPPRESSED or EXPIRED, it
    is held, the key space is an earlier one, or one of the reasons of `Unmarked`.
    """
    return [marked_job(row) for row in await MARK.run(connection, marking.values())]


def marked_job(row: tuple[Any, ...]) -> MarkedJob:
    """Return the job of a row of `marked_columns`."""
    (
        job_id,
        attempt,
        sender_id,
        batch_id,
        failures,
        recipient,
        variables,
        lease_until,
        deferred_for,
        revision,
        batch_revision,
    ) = row
    return MarkedJob(
        job=JobRef(job_id, attempt),
        sender_id=sender_id,
        batch_id=batch_id,
        failures=failures,
        recipient=recipient,
        variables=variables,
        lease_until=lease_until,
        sender_revision=revision,
        batch_revision=batch_revision,
        deferred_for=deferred_for,
    )


def _explain_statement() -> Any:
    # A pause until a time is like a later due time: Redis may have claimed the job too early.
    until = func.greatest(EmailJob.scheduled_at, Batch.paused_until, _sender_paused_until)
    waits = and_(
        _WAITS,
        Batch.state == BatchState.ACTIVE,
        or_(
            not_(batch_is_paused()), and_(Batch.paused_until.is_not(None), not_(Batch.respreading))
        ),
        or_(_active_revision.is_not(None), _sender_paused_until.is_not(None)),
        may_be_sent(),
    )
    is_job = EmailJob.sender_id == _claim.c.sender
    is_attempt = EmailJob.attempt == _claim.c.attempt - 1
    waiting = case((and_(waits, is_job, is_attempt), unix_ms_of(until)))
    # Rows are read without a lock, so a change that is not committed yet is not seen.
    return (
        select(
            _claim.c.id,
            waiting.label("due_ms"),
            or_(
                EmailJob.id.is_(None),
                not_(is_job),
                and_(EmailJob.state == JobState.SCHEDULED, not_(is_attempt)),
            ).label("unknown"),
            _valid_life.exists().label("valid"),
            unix_ms_of(func.clock_timestamp()).label("now_ms"),
        )
        .select_from(_claim)
        .outerjoin(EmailJob, EmailJob.id == _claim.c.id)
        .outerjoin(Batch, Batch.id == EmailJob.batch_id)
    )


_EXPLAIN = _explain_statement()


async def explain_unmarked(
    connection: AsyncConnection, claims: Sequence[Claim], *, shard: int
) -> Unmarked:
    """Return why `mark_sending` left out these claims, at least one.

    Those that wait can be claimed again: they are locked, not due yet, their life is not valid, or
    the data are older than what the process has seen. A job whose cancellation was in progress is
    refused then.
    """
    rows = (await connection.execute(_EXPLAIN, _claims(claims, shard))).all()
    return Unmarked(
        valid=rows[0].valid,
        postgres_ms=rows[0].now_ms,
        due={row.id: row.due_ms for row in rows if row.due_ms is not None},
        unknown=frozenset(row.id for row in rows if row.unknown),
    )
