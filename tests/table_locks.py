"""Locks a table for a while, as an operator's session does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg


@asynccontextmanager
async def locked(
    database_url: str, table: str, mode: str = "ACCESS EXCLUSIVE"
) -> AsyncIterator[None]:
    """Hold a lock on a table until the end of the block.

    The wait for it is asynchronous: a server of this process may have to end a transaction first.
    """
    async with await psycopg.AsyncConnection.connect(database_url) as holder:
        await holder.execute(f"LOCK TABLE {table} IN {mode} MODE".encode())
        yield
