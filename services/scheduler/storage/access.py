"""Repeats a transaction after a deadlock or a serialization failure, and reads the time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, TypeVar

import psycopg
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

T = TypeVar("T")

_TRIES: Final = 5
_PAUSE_S: Final = 0.02
_CONFLICTS: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)


async def in_transaction(engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """Run `work` in a transaction of its own, and repeat it a few times after a conflict."""
    for tries_left in reversed(range(_TRIES)):
        try:
            async with engine.begin() as connection:
                return await work(connection)
        except DBAPIError as error:
            if not tries_left or not isinstance(error.orig, _CONFLICTS):
                raise
        # The pause is random: two transactions that collided would collide again after equal
        # pauses.
        await asyncio.sleep(_PAUSE_S * random.random())  # noqa: S311 - no secret
    raise AssertionError("unreachable")


async def read_time(connection: AsyncConnection) -> datetime:
    """Return PostgreSQL's time."""
    now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    return now
