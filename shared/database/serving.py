"""Checks that PostgreSQL serves this release, by a statement that needs all that others need.

It names every column that this release uses, and changes no row of the tables that each mail
changes. So it fails on a read-only server, without a table, column or privilege, and it costs no
more than its plan.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Select, delete, exists, false, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.models import (
    Attempt,
    Base,
    CountDelta,
    EmailJob,
    HeadMarker,
    Heartbeat,
    ShardLife,
)


def _insert(model: type[Base]) -> Any:
    columns = [each for each in model.__table__.columns if each.identity is None]
    names = [each.name for each in columns]
    none = select(*columns).where(false())
    return insert(model).from_select(names, none, include_defaults=False)


def _statement() -> Select[Any]:
    columns: list[Any] = [
        exists(select(*table.columns).where(false())) for table in Base.metadata.sorted_tables
    ]
    changes = (
        *(_insert(each) for each in (Attempt, CountDelta, HeadMarker, Heartbeat, ShardLife)),
        update(EmailJob).where(false()).values(state=EmailJob.state),
        update(ShardLife).where(false()).values(life=ShardLife.life),
        update(Heartbeat).where(false()).values(beat_at=Heartbeat.beat_at),
        delete(HeadMarker).where(false()),
    )
    ctes = [each.returning(literal(1)).cte(f"change_{n}") for n, each in enumerate(changes)]
    return select(*columns).add_cte(*ctes)


_STATEMENT: Final = _statement()


async def check_serving(engine: AsyncEngine) -> None:
    """Check that PostgreSQL has what this release uses, and can write.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it does not, or cannot be reached.
    """
    async with engine.connect() as connection:
        await connection.execute(_STATEMENT)
