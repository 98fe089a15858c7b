"""Folding: count deltas become sums, in one statement."""

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

# Deltas moved by one transaction: under 0.1 s, so that another fold never waits for long.
FOLD_LIMIT: Final = 10_000


async def fold_once(engine: AsyncEngine) -> int:
    """Fold up to FOLD_LIMIT deltas in a transaction of its own; return how many there were."""
    async with engine.begin() as connection:
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
