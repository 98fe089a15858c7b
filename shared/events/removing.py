"""The SQL that counts the changes of jobs by user, and removes old and surplus ones.

One process at a time does either: it locks the one row of `job_event_counting`. Each step is one
transaction that counts or removes a bounded number of events, and stores what it did. So a process
that dies between two steps leaves exact counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Select,
    case,
    delete,
    func,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import INTERVAL, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import (
    JobEvent,
    JobEventCount,
    JobEventCounting,
    UserRow,
)
from outbox_server.shared.events.storage import event_place

# An event is kept this much longer than it may be asked for, because it may have been committed
# later than it was recorded.
_GRACE: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class RemovedEvents:
    """What one step has removed."""

    count: int
    # The last id; 0 if there is none.
    last: int


@dataclass(frozen=True, slots=True)
class SurplusEvents:
    """A user with more events than its quota."""

    user_id: str
    quota: int


async def lock_counting(connection: AsyncConnection) -> int | None:
    """Return the id up to which events are counted; None if another process is at work."""
    await connection.execute(insert(JobEventCounting).values(id=1).on_conflict_do_nothing())
    counted: int | None = await connection.scalar(
        select(JobEventCounting.counted_to).with_for_update(skip_locked=True)
    )
    return counted


async def count_events(connection: AsyncConnection, horizon: int, limit: int) -> bool:
    """Count the next events up to the id `horizon`, at most `limit`. Return whether more follow.

    All events up to it must be committed.
    """
    counted = await lock_counting(connection)
    if counted is None or counted >= horizon:
        return False
    part = (
        select(JobEvent.id, JobEvent.user_id)
        .where(JobEvent.id > counted, JobEvent.id <= horizon)
        .order_by(JobEvent.id)
        .limit(limit)
        .cte("part")
    )
    added = _adding(
        select(part.c.user_id, func.count(), literal(0, BigInteger)).group_by(part.c.user_id)
    )
    found = (
        await connection.execute(
            select(func.count(), func.max(part.c.id)).select_from(part).add_cte(added)
        )
    ).one()
    more = bool(found[0] == limit)
    await connection.execute(
        update(JobEventCounting).values(counted_to=found[1] if more else horizon)
    )
    return more


def _adding(changes: Select[Any]) -> Any:
    """Return the CTE that adds to the counts. `changes` has a user, a number, and a last id."""
    added = insert(JobEventCount).from_select(
        ["user_id", "n", "removed_to"], changes.order_by(changes.selected_columns[0])
    )
    return added.on_conflict_do_update(
        index_elements=[JobEventCount.user_id],
        set_={
            "n": JobEventCount.n + added.excluded.n,
            "removed_to": func.greatest(JobEventCount.removed_to, added.excluded.removed_to),
        },
    ).cte("added")


async def remove_old_events(
    connection: AsyncConnection, older_than: timedelta, limit: int, after: int = 0
) -> RemovedEvents:
    """Remove the oldest events after an id, at most `limit`."""
    counted = await lock_counting(connection)
    if counted is None:
        return RemovedEvents(0, after)
    oldest = select(JobEvent.id).where(JobEvent.id > after).order_by(JobEvent.id).limit(limit)
    gone = (
        delete(JobEvent)
        .where(
            # The release before this one removes events without the lock.
            JobEvent.id.in_(oldest.with_for_update(skip_locked=True)),
            JobEvent.happened_at
            < func.statement_timestamp() - literal(older_than + _GRACE, INTERVAL),
        )
        .returning(JobEvent.id, JobEvent.user_id)
        .cte("gone")
    )
    by_user = (
        select(
            gone.c.user_id,
            func.count(case((gone.c.id <= counted, 1))).label("n"),
            func.max(gone.c.id).label("last"),
        )
        .group_by(gone.c.user_id)
        .cte("by_user")
    )
    changed = (
        update(JobEventCount)
        .where(JobEventCount.user_id == by_user.c.user_id)
        .values(
            n=func.greatest(JobEventCount.n - by_user.c.n, 0),
            removed_to=func.greatest(JobEventCount.removed_to, by_user.c.last),
        )
        .returning(JobEventCount.user_id)
        .cte("changed")
    )
    # Users without a count yet.
    new = _adding(
        select(by_user.c.user_id, literal(0, BigInteger), by_user.c.last).where(
            by_user.c.user_id.not_in(select(changed.c.user_id))
        )
    )
    found = (
        await connection.execute(
            select(func.count(), func.max(gone.c.id)).select_from(gone).add_cte(changed, new)
        )
    ).one()
    return RemovedEvents(found[0], found[1] or 0)


async def find_surplus(
    connection: AsyncConnection, default: int, limit: int
) -> list[SurplusEvents]:
    """Return users with more counted events than their quota, which is `default` if not set."""
    quota = func.coalesce(UserRow.stored_events, literal(default, BigInteger))
    rows = await connection.execute(
        select(JobEventCount.user_id, quota.label("quota"))
        .join(UserRow, UserRow.user_id == JobEventCount.user_id, isouter=True)
        .where(JobEventCount.n > quota)
        .order_by(JobEventCount.user_id)
        .limit(limit)
    )
    return [SurplusEvents(row.user_id, row.quota) for row in rows]


async def remove_surplus_events(
    connection: AsyncConnection, user_id: str, quota: int, limit: int
) -> int:
    """Remove the oldest events of a user above its quota, at most `limit`. Return how many."""
    counted = await lock_counting(connection)
    if counted is None:
        return 0
    present = (
        await connection.execute(
            select(JobEventCount.n, JobEventCount.removed_to).where(
                JobEventCount.user_id == user_id
            )
        )
    ).one()
    # Another process may have removed them since the caller found the user.
    wanted = min(present.n - quota, limit)
    if wanted <= 0:
        return 0
    oldest = (
        select(JobEvent.id)
        # The search does not begin at the start of the index, which still has removed rows.
        .where(
            event_place > tuple_(literal(user_id), literal(present.removed_to, BigInteger)),
            event_place <= tuple_(literal(user_id), literal(counted, BigInteger)),
        )
        .order_by(*event_place)
        .limit(wanted)
    )
    gone = delete(JobEvent).where(JobEvent.id.in_(oldest)).returning(JobEvent.id).cte("gone")
    found = (
        await connection.execute(select(func.count(), func.max(gone.c.id)).select_from(gone))
    ).one()
    # Fewer were found than wanted: the others were removed without being counted.
    left = present.n - wanted if found[0] == wanted else 0
    await connection.execute(
        update(JobEventCount)
        .where(JobEventCount.user_id == user_id)
        .values(n=left, removed_to=func.greatest(JobEventCount.removed_to, found[1]))
    )
    return int(found[0])
