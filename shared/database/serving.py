"""Checks that PostgreSQL serves this release, by a statement that needs all that others need.

It names every column that this release uses and updates no row. So it fails on a read-only server,
without a table, column or privilege, and it costs no more than its plan.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Select, exists, false, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.models import Base, EmailJob


def _statement() -> Select[Any]:
    columns: list[Any] = [
        exists(select(*table.columns).where(false())) for table in Base.metadata.sorted_tables
    ]
    written = update(EmailJob).where(false()).values(state=EmailJob.state).returning(EmailJob.id)
    return select(*columns).add_cte(written.cte("written"))


_STATEMENT: Final = _statement()


async def check_serving(engine: AsyncEngine) -> None:
    """Check that PostgreSQL has what this release uses, and can write.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it does not, or cannot be reached.
    """
    async with engine.connect() as connection:
        await connection.execute(_STATEMENT)
