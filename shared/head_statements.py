"""What is read of senders, to be loaded into Redis (shared/heads.py)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    SQLColumnExpression,
    and_,
    bindparam,
    cast,
    extract,
    func,
    lateral,
    literal,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from shared.cancellations import waits_of
from shared.counts import in_state
from shared.models import Attempt, EmailJob, HeadMarker, Sender
from shared.queue.queue import HEAD_SIZE
from shared.states import JobState, SenderState


def _array(column: Any, *order: Any) -> Any:
    return func.array_agg(aggregate_order_by(column, *order))


def _age_ms(time: SQLColumnExpression[Any]) -> ColumnElement[Any]:
    return cast(func.floor(extract("epoch", func.clock_timestamp() - time) * 1000), BigInteger)


def _unix_ms(time: SQLColumnExpression[Any]) -> ColumnElement[Any]:
    """As shared.database.unix_ms, where that would be called for each job of many heads."""
    return cast(func.ceil(extract("epoch", time) * 1000), BigInteger)


def heads_statement(sender_ids: Sequence[int]) -> Select[Any]:
    """Return live settings, first waiting jobs and markers of senders."""
    waiting = (
        select(EmailJob.id, EmailJob.attempt, EmailJob.scheduled_at)
        .where(EmailJob.sender_id == Sender.id, waits_of(Sender.id))
        .order_by(EmailJob.scheduled_at, EmailJob.id)
        .limit(HEAD_SIZE + 1)
        .correlate(Sender)
        .subquery()
    )
    order = (waiting.c.scheduled_at, waiting.c.id)
    jobs = lateral(
        select(
            _array(waiting.c.id, *order).label("ids"),
            _array(waiting.c.attempt, *order).label("attempts"),
            _array(_unix_ms(waiting.c.scheduled_at), *order).label("dues"),
        )
    )
    markers = lateral(
        select(func.array_agg(HeadMarker.id).label("markers"))
        .where(HeadMarker.sender_id == Sender.id)
        .correlate(Sender)
    )
    return (
        select(
            Sender.id,
            Sender.hourly_limit,
            Sender.min_gap_ms,
            Sender.max_in_flight,
            Sender.revision,
            Sender.sending_hours,
            _unix_ms(func.statement_timestamp()).label("now"),
            Sender.smtp_host,
            Sender.smtp_port,
            Sender.smtp_security,
            Sender.smtp_username,
            and_(Sender.state == SenderState.ACTIVE, Sender.deleted_at.is_(None)).label("active"),
            jobs.c.ids,
            jobs.c.attempts,
            jobs.c.dues,
            markers.c.markers,
        )
        .select_from(Sender)
        .join(jobs, true())
        .join(markers, true())
        .where(Sender.id.in_(sender_ids))
    )


def history_statement(sender_ids: Sequence[int], reach: timedelta) -> Select[Any]:
    """Return ends within `reach`, and leases, of senders that Redis has forgotten."""
    ends = select(
        Attempt.sender_id,
        Attempt.email_job_id,
        Attempt.attempt,
        _age_ms(Attempt.ended_at).label("ms"),
        Attempt.counted,
        literal(False).label("leased"),
    ).where(
        Attempt.sender_id.in_(sender_ids),
        Attempt.ended_at > func.statement_timestamp() - reach,
    )
    leases = select(
        EmailJob.sender_id,
        EmailJob.id,
        EmailJob.attempt,
        -_age_ms(EmailJob.lease_until),
        literal(True),
        literal(True),
    ).where(EmailJob.sender_id.in_(sender_ids), in_state(JobState.SENDING))
    each = ends.union_all(leases).subquery()
    # Arrays: a row an end costs ten times as much on the way.
    return select(
        each.c.sender_id,
        each.c.leased,
        *(
            func.array_agg(each.c[name]).label(name)
            for name in ("email_job_id", "attempt", "ms", "counted")
        ),
    ).group_by(each.c.sender_id, each.c.leased)


def concerned_statement() -> Select[Any]:
    """Return senders by id, from the index of waiting jobs: one probe a sender, none a job."""

    def next_sender(after: Any) -> Any:
        return select(func.min(EmailJob.sender_id)).where(
            in_state(JobState.SCHEDULED), EmailJob.sender_id > after
        )

    waiting = next_sender(bindparam("after")).with_only_columns(
        func.min(EmailJob.sender_id).label("id")
    )
    walk = waiting.cte("walk", recursive=True)
    later = select(next_sender(walk.c.id).scalar_subquery()).where(walk.c.id.is_not(None))
    walk = walk.union_all(later)
    sending = select(EmailJob.sender_id).where(
        in_state(JobState.SENDING), EmailJob.sender_id > bindparam("after")
    )
    # The walk ends where the limit does, for nobody asks it for more.
    first = (
        select(walk.c.id)
        .where(walk.c.id % bindparam("shards") == bindparam("shard"))
        .limit(bindparam("chunk"))
        .union(sending.where(EmailJob.sender_id % bindparam("shards") == bindparam("shard")))
        .subquery()
    )
    return select(first.c.id).order_by(first.c.id).limit(bindparam("chunk"))
