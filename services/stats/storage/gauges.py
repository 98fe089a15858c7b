"""Reads the numbers of the metrics: the unfolded deltas, and the senders that cool down."""

from __future__ import annotations

from typing import Final

from sqlalchemy import func, literal, select
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.models import Cooldown, CountDelta

# The maximum number of deltas that are counted. If nothing folds them, their number grows without
# bound.
_MOST_COUNTED: Final = 100_000


async def read_gauges(engine: AsyncEngine) -> tuple[int, int]:
    """Return the number of unfolded deltas, at most 100,000, and of senders that cool down."""
    some = select(literal(1).label("one")).select_from(CountDelta).limit(_MOST_COUNTED).subquery()
    deltas = select(func.count()).select_from(some).scalar_subquery()
    cooling = select(func.count()).select_from(Cooldown).scalar_subquery()
    async with engine.connect() as connection:
        row = (await connection.execute(select(deltas, cooling))).one()
    return row[0], row[1]
