"""Appends the changes of job counts to the table `CountDelta`.

`shared.database.counts` reads the counts. Jobs in SENDING are counted as SCHEDULED.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import CTE, FromClause, SmallInteger, cast, func, insert, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import CountDelta
from outbox_server.shared.states import JobState

_COLUMNS: Final = ("sender_id", "batch_id", "hour", "state", "n")


def counting_moves(
    groups: CTE, *, was: JobState, state: JobState | None = None, hour: Any = None
) -> CTE:
    """Return the part of a statement that counts jobs which it moved from `was` to another state.

    `groups` has sender_id, batch_id and the number of jobs `n`. `state` and `hour` are the same for
    all groups; if they are None, they are columns of `groups`.
    """
    into = groups.c.state if state is None else _number(state)
    at = groups.c.hour if hour is None else hour
    key = (groups.c.sender_id, groups.c.batch_id, at)
    removed = select(*key, _number(was), -groups.c.n)
    added = select(*key, into, groups.c.n)
    return insert(CountDelta).from_select(_COLUMNS, removed.union_all(added)).cte("deltas")


async def count_accepted(
    connection: AsyncConnection, sender_id: int, batch_id: int, jobs: int
) -> None:
    """Count the jobs of a new batch."""
    await connection.execute(
        insert(CountDelta).values(
            sender_id=sender_id,
            batch_id=batch_id,
            hour=func.date_trunc("hour", func.now()),
            state=int(JobState.SCHEDULED),
            n=jobs,
        )
    )


def counting_accepted(batches: FromClause) -> CTE:
    """Return the part of a statement that counts the jobs of new batches.

    `batches` has sender_id, batch_id and the number of jobs `n`.
    """
    hour, state = func.date_trunc("hour", func.now()), _number(JobState.SCHEDULED)
    key = (batches.c.sender_id, batches.c.batch_id)
    return (
        insert(CountDelta)
        .from_select(_COLUMNS, select(*key, hour, state, batches.c.n))
        .cte("deltas")
    )


def _number(state: JobState) -> Any:
    return cast(literal(int(state)), SmallInteger)
