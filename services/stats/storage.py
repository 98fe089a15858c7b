"""All SQL of the stats service: folding the count deltas, and reading what the answers hold."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Select,
    bindparam,
    cast,
    delete,
    func,
    literal,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared.cancellations import waits_of
from shared.counts import JobCounts, sender_counts, user_counts
from shared.database import transaction
from shared.models import (
    Attempt,
    Batch,
    BatchCount,
    CountDelta,
    EmailJob,
    Sender,
    SenderCount,
    SenderHourCount,
)
from shared.ownership import owned_by
from shared.states import CONNECTION_TROUBLE, JobState

# Deltas moved by one transaction: under 0.1 s, so that another fold never waits for long.
FOLD_LIMIT: Final = 10_000

_HOUR: Final = timedelta(hours=1)
_HOURS_SHOWN: Final = 24


@dataclass(frozen=True, slots=True)
class HourCounts:
    """What ended in the hour that begins at `start` (UTC)."""

    start: datetime
    sent: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class SenderStats:
    """What GetSenderStats answers, all of the moment `read_at`."""

    sender_id: int
    counts: JobCounts
    # 24 of them, the current hour last.
    hours: Sequence[HourCounts]
    # The first waiting job by (due, id), and when it is due; None: nothing waits.
    next_job_id: int | None
    next_due: datetime | None
    # Sends in the trailing window.
    window_used: int
    hourly_limit: int
    # No part of what is compared: whoever watches would see nothing but changes.
    read_at: datetime = field(compare=False)


@dataclass(frozen=True, slots=True)
class UserSender:
    """One sender of a user, with its counts."""

    sender_id: int
    email: str
    counts: JobCounts


@dataclass(frozen=True, slots=True)
class UserStats:
    """What GetUserStats answers, all of the moment `read_at`."""

    counts: JobCounts
    senders: Sequence[UserSender]
    # Whether senders follow after the last of `senders`.
    more: bool
    read_at: datetime


async def ping(engine: AsyncEngine) -> None:
    """Ask PostgreSQL for something that only a migrated database has.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it is gone, or has no schema.
    """
    async with engine.connect() as connection:
        await connection.execute(select(Sender.id).limit(1))


async def fold_once(engine: AsyncEngine) -> int:
    """Fold up to FOLD_LIMIT deltas in a transaction of its own; return how many there were."""
    async with transaction(engine) as connection:
        return await fold(connection)


async def fold(connection: AsyncConnection, limit: int = FOLD_LIMIT) -> int:
    """Move the oldest deltas, at most `limit`, into the three rollups; return how many there were.

    One statement: before the commit a reader sees the deltas, after it their sums, never both or
    neither, and a crash leaves the one or the other. Deltas that another process is folding are
    skipped, so that nothing is folded twice.
    """
    moved: int = (await connection.execute(_FOLD, {"limit": limit})).scalar_one()
    return moved


def _fold_statement() -> Select[Any]:
    picked = (
        select(CountDelta.id)
        .order_by(CountDelta.id)
        .limit(bindparam("limit"))
        .with_for_update(skip_locked=True)
        .cte("picked")
    )
    moved = (
        delete(CountDelta)
        .where(CountDelta.id == picked.c.id)
        .returning(
            CountDelta.sender_id,
            CountDelta.batch_id,
            CountDelta.hour,
            CountDelta.state,
            CountDelta.n,
        )
        .cte("moved")
    )
    by_sender = _add_to(SenderCount, ("sender_id", "state"), moved, name="by_sender")
    by_batch = _add_to(BatchCount, ("batch_id", "state"), moved, name="by_batch", after=by_sender)
    # Open jobs come in one hour and go in another: only ends have an hour that says something.
    ends = moved.c.state != int(JobState.SCHEDULED)
    by_hour = _add_to(
        SenderHourCount,
        ("sender_id", "hour", "state"),
        moved,
        name="by_hour",
        where=ends,
        after=by_batch,
    )
    return select(func.count()).select_from(moved).add_cte(by_hour)


def _add_to(
    rollup: type[SenderCount | BatchCount | SenderHourCount],
    key: tuple[str, ...],
    moved: CTE,
    *,
    name: str,
    where: ColumnElement[bool] | None = None,
    after: CTE | None = None,
) -> CTE:
    """Return the part that adds the sums of `moved` to a rollup.

    Two folds at once may want the same rows of a rollup. Both take them in the order of the key,
    and the tables in the same order, or each could wait for the other. PostgreSQL runs the parts
    of a WITH in no promised order, so a part asks the one before (`after`) for its end.
    """
    columns = [moved.c[column] for column in key]
    total = cast(func.sum(moved.c.n), BigInteger)
    sums = select(*columns, total.label("n")).group_by(*columns).having(total != 0)
    if where is not None:
        sums = sums.where(where)
    if after is not None:
        finished = select(func.count()).select_from(after).scalar_subquery()
        sums = sums.where(finished >= 0)
    new = insert(rollup).from_select([*key, "n"], sums.order_by(*columns))
    return (
        new.on_conflict_do_update(index_elements=list(key), set_={"n": rollup.n + new.excluded.n})
        .returning(literal(1).label("one"))
        .cte(name)
    )


_FOLD: Final = _fold_statement()


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One read-only transaction, all of whose statements see the same moment."""
    async with engine.connect() as connection:
        yield await connection.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )


async def read_sender(
    connection: AsyncConnection, sender_id: int, user_id: str | None, window: timedelta
) -> SenderStats | None:
    """Return the stats of one sender; None: there is none, or `user_id` is set and not its owner.

    The connection must be a `snapshot`. `window` is the length of the trailing window.
    """
    statement = owned_by(
        _sender_statement(window).where(Sender.id == sender_id, Sender.deleted_at.is_(None)),
        Sender.user_id,
        user_id,
    )
    found = (await connection.execute(statement)).one_or_none()
    if found is None:
        return None
    counts = await sender_counts(connection, [sender_id])
    return SenderStats(
        sender_id=sender_id,
        counts=counts[sender_id],
        hours=await _read_hours(connection, sender_id, found.read_at),
        next_job_id=found.next_job_id,
        next_due=found.next_due,
        window_used=found.window_used,
        hourly_limit=found.hourly_limit,
        read_at=found.read_at,
    )


@dataclass(frozen=True, slots=True)
class WatchedSender:
    """The stats of a sender that is watched; None: it was deleted."""

    stats: SenderStats | None


async def read_watched(
    engine: AsyncEngine, window: timedelta, sender_ids: Iterable[int]
) -> dict[int, WatchedSender]:
    """Return what is watched, all of one moment; whose it is must be known already."""
    async with snapshot(engine) as connection:
        return {
            sender_id: WatchedSender(await read_sender(connection, sender_id, None, window))
            for sender_id in sender_ids
        }


async def sender_exists(connection: AsyncConnection, sender_id: int, user_id: str | None) -> bool:
    """Return whether there is such a sender, and for this user if one is named."""
    statement = select(Sender.id).where(Sender.id == sender_id, Sender.deleted_at.is_(None))
    return await connection.scalar(owned_by(statement, Sender.user_id, user_id)) is not None


async def sender_of_batch(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> int | None:
    """Return the sender of a batch; None: there is no such batch, or not for this user."""
    statement = select(Batch.sender_id).where(Batch.id == batch_id)
    return await connection.scalar(owned_by(statement, Batch.user_id, user_id))


@dataclass(frozen=True, slots=True)
class Trouble:
    """An attempt that came to nothing for want of its endpoint."""

    ended_at: datetime
    message: str


async def last_trouble(connection: AsyncConnection, sender_id: int) -> Trouble | None:
    """Return what the sender's last attempt met; None: it was no trouble of the endpoint."""
    statement = (
        select(Attempt.ended_at, Attempt.outcome, Attempt.message)
        .where(Attempt.sender_id == sender_id)
        .order_by(Attempt.ended_at.desc())
        .limit(1)
    )
    last = (await connection.execute(statement)).one_or_none()
    if last is None or last.outcome not in CONNECTION_TROUBLE:
        return None
    return Trouble(last.ended_at, last.message or "no reply")


def _sender_statement(window: timedelta) -> Select[Any]:
    first = (
        select(EmailJob.id, EmailJob.scheduled_at)
        .where(EmailJob.sender_id == Sender.id, waits_of(Sender.id))
        .order_by(EmailJob.scheduled_at, EmailJob.id)
        .limit(1)
        .lateral("first")
    )
    window_used = (
        select(func.count())
        .select_from(Attempt)
        .where(
            Attempt.sender_id == Sender.id,
            Attempt.counted,
            # Not clock_timestamp(): an index is not searched for what changes on the way.
            Attempt.ended_at > func.statement_timestamp() - window,
        )
        .correlate(Sender)
        .scalar_subquery()
    )
    return select(
        Sender.hourly_limit,
        func.statement_timestamp().label("read_at"),
        first.c.id.label("next_job_id"),
        first.c.scheduled_at.label("next_due"),
        window_used.label("window_used"),
    ).outerjoin_from(Sender, first, true())


async def _read_hours(
    connection: AsyncConnection, sender_id: int, now: datetime
) -> Sequence[HourCounts]:
    """Return the 24 hours that end with the one of `now`, the oldest first."""
    current = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    first = current - (_HOURS_SHOWN - 1) * _HOUR
    rows = await connection.execute(_HOURS, {"sender_id": sender_id, "first": first})
    found = {(hour.astimezone(UTC), state): n for hour, state, n in rows}
    starts = [first + number * _HOUR for number in range(_HOURS_SHOWN)]
    return [
        HourCounts(
            start,
            sent=found.get((start, JobState.SENT), 0),
            failed=found.get((start, JobState.FAILED), 0),
        )
        for start in starts
    ]


def _hours_statement() -> Select[Any]:
    ends = (int(JobState.SENT), int(JobState.FAILED))
    parts = union_all(
        *(
            select(table.hour, table.state, table.n).where(
                table.sender_id == bindparam("sender_id"),
                table.hour >= bindparam("first"),
                table.state.in_(ends),
            )
            for table in (SenderHourCount, CountDelta)
        )
    ).subquery("part")
    return select(parts.c.hour, parts.c.state, cast(func.sum(parts.c.n), BigInteger)).group_by(
        parts.c.hour, parts.c.state
    )


_HOURS: Final = _hours_statement()


async def read_user(
    connection: AsyncConnection, user_id: str, after_sender_id: int, limit: int
) -> UserStats:
    """Return the stats of one user, and of its first `limit` senders after `after_sender_id`.

    Deleted senders are among them, so that the parts add up to the whole. The connection must be
    a `snapshot`.
    """
    statement = owned_by(
        select(Sender.id, Sender.email)
        .where(Sender.id > after_sender_id)
        .order_by(Sender.id)
        .limit(limit + 1),
        Sender.user_id,
        user_id,
    )
    read_at: datetime = (await connection.execute(select(func.statement_timestamp()))).scalar_one()
    page = (await connection.execute(statement)).all()
    shown = page[:limit]
    counts = await sender_counts(connection, [row.id for row in shown])
    return UserStats(
        counts=await user_counts(connection, user_id),
        senders=[UserSender(row.id, row.email, counts[row.id]) for row in shown],
        more=len(page) > limit,
        read_at=read_at,
    )
