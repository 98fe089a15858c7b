"""An engine that loses the answer to a commit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


class LostAnswers:
    """An engine whose first commit succeeds, but the connection with its answer is lost."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.lost = 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        async with self._engine.begin() as connection:
            yield connection
        if not self.lost:
            self.lost += 1
            raise OperationalError("COMMIT", None, Exception("the connection is lost"))
