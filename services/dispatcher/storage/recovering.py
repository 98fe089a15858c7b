"""Ends attempts whose leases have expired, as after the death of a dispatcher."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import (
    SmallInteger,
    bindparam,
    cast,
    extract,
    func,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher.storage.fragments import counting_ends, log_attempts
from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import EmailJob
from outbox_server.shared.states import AttemptOutcome, JobState

_RECOVERED_AT_ONCE = 1_000


async def recover_expired(
    connection: AsyncConnection, lease: timedelta, next_state: JobState
) -> dict[int, int]:
    """End the attempts whose lease has expired. Return their number by sender.

    Nobody knows whether such a mail was sent, so it counts in the window, as of the latest possible
    time. `next_state` is SCHEDULED (the job waits again, at its old place) or UNCERTAIN.
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
    logged = log_attempts(
        moved.join(expired, expired.c.id == moved.c.id),
        email_job_id=moved.c.id,
        attempt=moved.c.attempt,
        sender_id=moved.c.sender_id,
        # The time of the claim or of the last renewal, because earlier times are not stored. So the
        # start may be too late, and the gap before it may look too long in an audit. The end, from
        # which the next gap runs, is the latest possible one.
        started_at=expired.c.lease_until - bindparam("lease", type_=INTERVAL),
        ended_at=expired.c.lease_until,
        outcome=cast(literal(int(AttemptOutcome.LEASE_EXPIRED)), SmallInteger),
        counted=literal(True),
        message=literal("the dispatcher recorded no outcome before its lease expired"),
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
