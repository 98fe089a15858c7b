"""What the other statements run in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import (
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared.models import (
    Sender,
)


async def ping(engine: AsyncEngine) -> None:
    """Ask PostgreSQL for something that only a migrated database has.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it is gone, or has no schema.
    """
    async with engine.connect() as connection:
        await connection.execute(select(Sender.id).limit(1))


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One read-only transaction, all of whose statements see the same moment."""
    async with engine.connect() as connection:
        yield await connection.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
