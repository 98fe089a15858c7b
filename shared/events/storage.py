"""The SQL that reads the changes of jobs. Triggers write them (migration 0021).

Every statement reads a bounded number of rows by an index, whatever the size of the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    SmallInteger,
    Text,
    any_,
    bindparam,
    column,
    func,
    select,
    text,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import Attempt, JobEvent, JobEventCount
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass

# The advisory lock that every transaction with events holds, shared. The triggers name it, too.
_WRITERS: Final = 7_402_311_917
# How much the clocks of two PostgreSQL servers, before and after a failover, may differ.
_CLOCK_TOLERANCE: Final = timedelta(seconds=1)
# How far the order of ids may differ from the order of times: as long as a transaction takes.
_DISORDER: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class EventPosition:
    """All events up to this id were committed, or never will be, at the time `at`."""

    event_id: int
    at: datetime


@dataclass(frozen=True, slots=True)
class JobEventRecord:
    """One change of a job. Without `job_id`: the acceptance of a batch."""

    event_id: int
    happened_at: datetime
    user_id: str
    sender_id: int
    batch_id: int
    job_id: int | None
    state: JobState
    attempt: int
    due_at: datetime | None
    job_count: int | None


@dataclass(frozen=True, slots=True)
class EventOutcome:
    """The outcome of an attempt, as far as the event itself does not have it."""

    outcome: AttemptOutcome
    reply_class: ReplyClass | None
    smtp_code: int | None
    enhanced_code: str | None
    message: str | None


@dataclass(frozen=True, slots=True)
class EventQuery:
    """Whose events to read, from where on."""

    user_id: str
    after: int


# This is text, because Core has no columns of a sequence.
_DRAWN: Final = text(
    "SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS id, clock_timestamp() AS now"
    " FROM job_events_id_seq"
)
# This is text, because it reads a view of PostgreSQL.
_HOLDERS: Final = text(
    "SELECT virtualtransaction FROM pg_locks WHERE locktype = 'advisory' AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND classid = :high AND objid = :low AND objsubid = 1"
).bindparams(high=_WRITERS >> 32, low=_WRITERS & 0xFFFFFFFF)


async def read_drawn(connection: AsyncConnection) -> EventPosition:
    """Return the last id that was drawn, and PostgreSQL's time. Its event may not be committed."""
    row = (await connection.execute(_DRAWN)).one()
    return EventPosition(row.id, row.now)


async def read_writers(connection: AsyncConnection) -> frozenset[str]:
    """Return the transactions in progress that have written events, or are about to.

    A transaction ends its lock after its rows are visible. So if one that had drawn an id is not
    among them, the next statement sees its events.
    """
    return frozenset((await connection.execute(_HOLDERS)).scalars())


_COLUMNS: Final = (
    JobEvent.id,
    JobEvent.happened_at,
    JobEvent.user_id,
    JobEvent.sender_id,
    JobEvent.batch_id,
    JobEvent.email_job_id,
    JobEvent.state,
    JobEvent.attempt,
    JobEvent.due_at,
    JobEvent.job_count,
)
_query = (
    func.unnest(
        bindparam("numbers", type_=ARRAY(Integer)),
        bindparam("users", type_=ARRAY(Text)),
        bindparam("afters", type_=ARRAY(BigInteger)),
    )
    .table_valued(
        column("number", Integer), column("user_id", Text), column("after", BigInteger), name="q"
    )
    .render_derived()
)


def between(user_id: Any, after: Any, last: Any) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that an event is of a user, and after one id and up to another.

    Order the result by `event_place`. Only the index that begins with the user serves both. With an
    equality of users, the planner may prefer the index of ids, and read the events of all users: it
    does if most events are of one of them.
    """
    return event_place > tuple_(user_id, after), event_place <= tuple_(user_id, last)


event_place: Final = tuple_(JobEvent.user_id, JobEvent.id)
_page = (
    select(*_COLUMNS)
    .where(
        *between(_query.c.user_id, _query.c.after, bindparam("horizon", type_=BigInteger)),
    )
    .order_by(*event_place)
    .limit(bindparam("most", type_=Integer))
    .lateral("page")
)
_READ: Final = select(_query.c.number, *_page.c).join(_page, true()).order_by("number", _page.c.id)


async def read_events(
    connection: AsyncConnection, queries: Sequence[EventQuery], horizon: int, most: int
) -> list[list[JobEventRecord]]:
    """Return the first events of each query up to the id `horizon`, at most `most` of each."""
    rows = await connection.execute(
        _READ,
        {
            "numbers": list(range(len(queries))),
            "users": [query.user_id for query in queries],
            "afters": [query.after for query in queries],
            "horizon": horizon,
            "most": most,
        },
    )
    found: list[list[JobEventRecord]] = [[] for _ in queries]
    for row in rows:
        found[row.number].append(
            JobEventRecord(
                event_id=row.id,
                happened_at=row.happened_at,
                user_id=row.user_id,
                sender_id=row.sender_id,
                batch_id=row.batch_id,
                job_id=row.email_job_id,
                state=JobState(row.state),
                attempt=row.attempt,
                due_at=row.due_at,
                job_count=row.job_count,
            )
        )
    return found


_REMOVED: Final = select(JobEventCount.user_id, JobEventCount.removed_to).where(
    JobEventCount.user_id == any_(bindparam("users", type_=ARRAY(Text))),
    JobEventCount.removed_to > 0,
)

_attempt_key = (
    func.unnest(
        bindparam("ids", type_=ARRAY(BigInteger)), bindparam("attempts", type_=ARRAY(SmallInteger))
    )
    .table_valued(column("id", BigInteger), column("attempt", SmallInteger), name="k")
    .render_derived()
)
_OUTCOMES: Final = select(
    Attempt.email_job_id,
    Attempt.attempt,
    Attempt.outcome,
    Attempt.reply_class,
    Attempt.smtp_code,
    Attempt.enhanced_code,
    Attempt.message,
).join(
    _attempt_key,
    (Attempt.email_job_id == _attempt_key.c.id) & (Attempt.attempt == _attempt_key.c.attempt),
)


async def read_outcomes(
    connection: AsyncConnection, events: Sequence[JobEventRecord]
) -> Mapping[tuple[int, int], EventOutcome]:
    """Return how the attempts of these events ended, by job and number of the attempt."""
    keys = {(event.job_id, event.attempt) for event in events if event.job_id and event.attempt}
    if not keys:
        return {}
    ids, attempts = zip(*sorted(keys), strict=True)
    rows = await connection.execute(_OUTCOMES, {"ids": list(ids), "attempts": list(attempts)})
    return {
        (row.email_job_id, row.attempt): EventOutcome(
            AttemptOutcome(row.outcome),
            None if row.reply_class is None else ReplyClass(row.reply_class),
            row.smtp_code,
            row.enhanced_code,
            row.message,
        )
        for row in rows
    }


async def removed_up_to(connection: AsyncConnection, user_ids: Collection[str]) -> dict[str, int]:
    """Return up to which id events of each user were removed. Users without any are left out.

    Read it after the events: then none was removed unnoticed between the two statements.
    """
    rows = await connection.execute(_REMOVED, {"users": sorted(set(user_ids))})
    return {row.user_id: row.removed_to for row in rows}


async def is_valid(
    connection: AsyncConnection, position: EventPosition, user_id: str, retention: timedelta
) -> bool:
    """Return whether all events of a user after `position` can still be read.

    They cannot if some were removed, or it is older than the retention. Nor can they if the
    database was restored, or if a replica took over that had not received the last events: ids are
    then drawn again. So the position belongs to a lost history if its id was not drawn yet, or if
    an event up to its id is newer than the position.
    """
    drawn = await read_drawn(connection)
    if position.event_id > drawn.event_id or position.at < drawn.at - retention:
        return False
    if position.event_id < (await removed_up_to(connection, (user_id,))).get(user_id, 0):
        return False
    newest = (
        select(JobEvent.happened_at)
        .where(JobEvent.id <= position.event_id)
        .order_by(JobEvent.id.desc())
        .limit(1)
    )
    happened_at: datetime | None = await connection.scalar(newest)
    return happened_at is None or happened_at <= position.at + _CLOCK_TOLERANCE


async def find_start(connection: AsyncConnection, start: datetime, user_id: str) -> EventPosition:
    """Return a position before all events from `start` on, and after most earlier ones.

    If events of the user were removed that are later than `start`, it is the position after them.
    """
    wanted = start - _DISORDER
    first = await connection.scalar(select(JobEvent.id).order_by(JobEvent.id).limit(1))
    last = await connection.scalar(select(JobEvent.id).order_by(JobEvent.id.desc()).limit(1))
    drawn = await read_drawn(connection)
    # The events up to `low` are earlier than wanted; those from `high` on are not.
    low, high = (first or 1) - 1, (last or 0) + 1
    while high - low > 1:
        middle = (low + high) // 2
        found = (
            await connection.execute(
                select(JobEvent.id, JobEvent.happened_at)
                .where(JobEvent.id >= middle)
                .order_by(JobEvent.id)
                .limit(1)
            )
        ).one_or_none()
        if found is None or found.happened_at >= wanted:
            high = middle
        else:
            low = found.id
    removed = await removed_up_to(connection, (user_id,))
    return EventPosition(max(low, removed.get(user_id, 0)), drawn.at)
