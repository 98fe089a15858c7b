"""Stores cooldowns: of senders whose account a mail server refuses.

PostgreSQL stores since when, why and how often an account was refused, so a cooldown survives the
loss of Redis. Redis holds the sender's mail back until the next probe (`shared.queue`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Integer,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import INTERVAL, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import Attempt, Cooldown, Sender
from outbox_server.shared.states import AttemptOutcome, ReplyClass

# The maximum number of attempts that are read to find refusals in a row. Most may be of other
# classes.
_MAX_ATTEMPTS_READ = 1_000
_SOON = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class AccountRefusal:
    """A refusal of a sender's account. The attempt began `started` ago and ended `ended` ago."""

    sender_id: int
    started: timedelta
    ended: timedelta
    message: str
    smtp_code: int | None = None
    enhanced_code: str | None = None
    # A daily quota is used up: the server accepts nothing until the oldest send is a day old.
    daily: bool = False


async def cool_down(
    connection: AsyncConnection,
    refusal: AccountRefusal,
    *,
    backoff: Sequence[timedelta],
    day: timedelta,
) -> timedelta | None:
    """Begin the cooldown of a sender, or take its next step; return the time to the next probe.

    `backoff` has the waits before the first, second, ... probe; the last one repeats. `day` is
    OUTBOX_QUOTA_DAY. Only an attempt that began when a probe was due takes a step. Attempts that
    were in flight when the account was refused say nothing new.

    None means that the sender has no cooldown: it was deleted, or is being changed or deleted at
    this moment. The change is not waited for, since it may wait for rows that the caller has
    locked. If the sender is still there, the next refusal begins a cooldown.
    """
    now = func.statement_timestamp()
    ended = now - refusal.ended
    first = {
        "sender_id": Sender.id,
        "since": ended,
        "next_probe_at": _probe_at(ended, literal(1), refusal, backoff, day),
        "refusals": literal(1, Integer),
        "smtp_code": literal(refusal.smtp_code, SmallInteger),
        "enhanced_code": literal(refusal.enhanced_code, Text),
        "message": literal(refusal.message, Text),
    }
    # The lock keeps a deletion from missing a cooldown that is not committed yet.
    there: Any = (
        select(*(value.label(name) for name, value in first.items()))
        .select_from(Sender)
        .where(Sender.id == refusal.sender_id, Sender.deleted_at.is_(None))
        .with_for_update(read=True, skip_locked=True)
    )
    count = Cooldown.refusals + 1
    again = {
        "next_probe_at": _probe_at(ended, count, refusal, backoff, day),
        "refusals": count,
        "smtp_code": refusal.smtp_code,
        "enhanced_code": refusal.enhanced_code,
        "message": refusal.message,
    }
    await connection.execute(
        insert(Cooldown)
        .from_select(list(first), there)
        .on_conflict_do_update(
            index_elements=[Cooldown.sender_id],
            set_=again,
            where=Cooldown.next_probe_at <= now - refusal.started,
        )
    )
    left: timedelta | None = await connection.scalar(
        select(Cooldown.next_probe_at - func.clock_timestamp()).where(
            Cooldown.sender_id == refusal.sender_id
        )
    )
    return None if left is None else max(left, _SOON)


def _probe_at(
    ended: ColumnElement[Any],
    count: ColumnElement[Any],
    refusal: AccountRefusal,
    backoff: Sequence[timedelta],
    day: timedelta,
) -> ColumnElement[Any]:
    """Return when the probe after refusal number `count` may begin."""
    waits = [(count == place, cast(wait, INTERVAL)) for place, wait in enumerate(backoff, start=1)]
    by_backoff = ended + case(*waits, else_=cast(backoff[-1], INTERVAL))
    if not refusal.daily:
        return by_backoff
    oldest = (
        select(Attempt.ended_at)
        .where(
            Attempt.sender_id == refusal.sender_id,
            Attempt.ended_at > func.statement_timestamp() - day,
            Attempt.outcome == AttemptOutcome.SENT,
        )
        # Not min(): with it, the planner may read all sends of the day.
        .order_by(Attempt.ended_at)
        .limit(1)
        .scalar_subquery()
    )
    # GREATEST ignores NULL: without a send in the day, the backoff alone decides.
    return func.greatest(by_backoff, oldest + day)


async def end_cooldowns(connection: AsyncConnection, sender_ids: Sequence[int]) -> list[int]:
    """End the cooldowns of these senders; return the senders that had one."""
    ended = await connection.execute(
        delete(Cooldown).where(Cooldown.sender_id.in_(sender_ids)).returning(Cooldown.sender_id)
    )
    return list(ended.scalars())


async def refused_in_a_row(connection: AsyncConnection, sender_id: int, limit: int) -> bool:
    """Return whether a sender's last `limit` mails were refused by replies that no rule knows.

    Attempts of other classes are ignored, except accepted ones, which end the row.
    """
    latest = (
        select(Attempt.outcome, Attempt.reply_class, Attempt.ended_at)
        .where(Attempt.sender_id == sender_id)
        .order_by(Attempt.ended_at.desc())
        .limit(_MAX_ATTEMPTS_READ)
        .subquery()
    )
    row = (
        select((latest.c.reply_class == ReplyClass.REFUSED).label("refused"))
        .where(
            or_(
                latest.c.reply_class == ReplyClass.REFUSED,
                latest.c.outcome == AttemptOutcome.SENT,
            )
        )
        .order_by(latest.c.ended_at.desc())
        .limit(bindparam("n", limit))
        .subquery()
    )
    found = await connection.scalar(
        select(
            and_(
                func.count() == limit,
                func.coalesce(func.bool_and(row.c.refused), literal(False, Boolean)),
            )
        )
    )
    return bool(found)
