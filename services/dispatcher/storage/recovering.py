"""Ends attempts whose leases have expired, as after the death of a dispatcher."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    SmallInteger,
    bindparam,
    case,
    cast,
    extract,
    func,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher.storage.fragments import counting_ends, log_attempts
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.lookups import is_looked_up
from outbox_server.shared.database.models import Attempt, EmailJob
from outbox_server.shared.states import AttemptOutcome, JobState

_RECOVERED_AT_ONCE = 1_000
# A job is given up after its lease has expired this many times without any SMTP reply. Otherwise a
# mail that ends or blocks its dispatcher would do so for ever.
MOST_EXPIRED_LEASES: Final = 3
_LOST: Final = "the dispatcher recorded no outcome before its lease expired"
# The beginning of the message of an attempt after which a job was given up.
_REPEATEDLY: Final = "LEASE_EXPIRED_REPEATEDLY"


def _is_last(expired: CTE) -> ColumnElement[bool]:
    """Return whether this is the last lease of an expired job that may expire.

    The leases that count expired since the last SMTP reply, or since a caller retried the job after
    it was given up.
    """
    last_reply = (
        select(func.coalesce(func.max(Attempt.attempt), 0))
        .where(
            Attempt.email_job_id == expired.c.id,
            or_(Attempt.smtp_code.is_not(None), Attempt.message.startswith(_REPEATEDLY)),
        )
        .correlate(expired)
        .scalar_subquery()
    )
    before = (
        select(func.count())
        .select_from(Attempt)
        .where(
            Attempt.email_job_id == expired.c.id,
            Attempt.outcome == int(AttemptOutcome.LEASE_EXPIRED),
            Attempt.attempt > last_reply,
        )
        .correlate(expired)
        .scalar_subquery()
    )
    return before >= MOST_EXPIRED_LEASES - 1


async def recover_expired(
    connection: AsyncConnection, lease: timedelta, next_state: JobState
) -> dict[int, int]:
    """End the attempts whose lease has expired. Return their number by sender.

    Nobody knows whether such a mail was sent, so it counts in the window, as of the latest possible
    time. `next_state` is SCHEDULED (the job waits again, at its old place) or UNCERTAIN. Instead of
    SCHEDULED, a job whose lease has expired too often is FAILED.
    """
    expired = (
        select(EmailJob.id, EmailJob.attempt, EmailJob.lease_until)
        .where(in_state(JobState.SENDING), EmailJob.lease_until < func.statement_timestamp())
        .order_by(EmailJob.lease_until)
        .limit(_RECOVERED_AT_ONCE)
        .with_for_update(skip_locked=True)
        .cte("expired")
    )
    waits = next_state is JobState.SCHEDULED
    state = case((_is_last(expired), int(JobState.FAILED)), else_=int(next_state))
    moved = (
        update(EmailJob)
        .values(
            state=state if waits else next_state,
            lease_until=null(),
            finished_at=case((_is_last(expired), expired.c.lease_until), else_=null())
            if waits
            else expired.c.lease_until,
        )
        .where(is_looked_up(EmailJob.id, expired.c.id))
        .returning(
            EmailJob.id,
            EmailJob.attempt,
            EmailJob.sender_id,
            EmailJob.batch_id,
            EmailJob.state,
            EmailJob.finished_at,
            expired.c.lease_until,
        )
        .cte("moved")
    )
    logged = log_attempts(
        moved,
        email_job_id=moved.c.id,
        attempt=moved.c.attempt,
        sender_id=moved.c.sender_id,
        # The time of the claim or of the last renewal, because earlier times are not stored. So the
        # start may be too late, and the gap before it may look too long in an audit. The end, from
        # which the next gap runs, is the latest possible one.
        started_at=moved.c.lease_until - bindparam("lease", type_=INTERVAL),
        ended_at=moved.c.lease_until,
        outcome=cast(literal(int(AttemptOutcome.LEASE_EXPIRED)), SmallInteger),
        counted=literal(True),
        message=case(
            (
                moved.c.state == int(JobState.FAILED),
                f"{_REPEATEDLY}: {_LOST}, {MOST_EXPIRED_LEASES} times without an SMTP reply",
            ),
            else_=_LOST,
        ),
    )
    statement = (
        select(moved.c.sender_id, func.count().label("n"))
        .group_by(moved.c.sender_id)
        .add_cte(logged, counting_ends(moved))
    )
    rows = await connection.execute(statement, {"lease": lease})
    return {row.sender_id: row.n for row in rows}


async def next_expiry(connection: AsyncConnection) -> timedelta | None:
    """Return the time until the next lease expires, or None if there is no lease."""
    left = extract("epoch", func.min(EmailJob.lease_until) - func.clock_timestamp())
    seconds = await connection.scalar(select(left).where(in_state(JobState.SENDING)))
    return None if seconds is None else timedelta(seconds=float(seconds))
