"""Folds count deltas into sums, in one statement."""

from __future__ import annotations

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
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.database.models import (
    BatchCount,
    CountDelta,
    SenderCount,
    SenderHourCount,
)
from outbox_server.shared.states import JobState

# The number of deltas that one transaction moves, in less than 0.1 s, so that no other fold waits
# long.
FOLD_LIMIT: Final = 10_000


async def fold_once(engine: AsyncEngine) -> int:
    """Fold up to FOLD_LIMIT deltas in a transaction of their own. Return how many were folded."""
    async with engine.begin() as connection:
        return await fold(connection)


async def fold(connection: AsyncConnection, limit: int = FOLD_LIMIT) -> int:
    """Move the oldest deltas, at most `limit`, into the three rollups. Return how many were moved.

    It is one statement: before the commit a reader sees the deltas, after it their sums, but never
    both or neither. This holds after a crash too. Deltas that another process is folding are
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
    # Hours count only jobs that ended, because open jobs do not belong to one hour.
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
    """Return the part of the statement that adds the sums of `moved` to a rollup.

    Two folds at once may lock the same rows of a rollup. To avoid deadlocks, both lock the rows in
    the order of the key, and the tables in the same order. PostgreSQL does not define the order of
    the parts of a WITH, so each part reads the result of the part before it (`after`).
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
