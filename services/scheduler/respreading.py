"""Writes the new due times of batches that UpdateBatch has changed.

Runs in every scheduler. Only one of them works on a batch at a time. If it dies, another continues.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.storage import respreading as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.batch_changes import forget_ended_pauses
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.loops import Loop

# The pause while batches are left, such as the batches of another scheduler.
_BUSY: Final = timedelta(seconds=1)
# The pause otherwise: a scheduler that died may have left a batch. A call in this process wakes the
# loop.
_IDLE: Final = timedelta(seconds=5)
# How long a call waits for the new times.
_CALL_LIMIT_S: Final = 1.0
_PAUSES_AT_ONCE: Final = 1_000


class Respreader:
    """Writes new due times, in small transactions."""

    def __init__(self, engine: AsyncEngine, loader: HeadLoader) -> None:
        self._engine = engine
        self._loader = loader
        self._loop = Loop("respreading", self._work_once, errors=DATABASE_ERRORS, retry=_BUSY)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set. An error of PostgreSQL is logged, and the work repeated."""
        await self._loop.run(stop)

    async def _work_once(self) -> timedelta:
        for batch_id in await in_transaction(self._engine, storage.unfinished):
            await self._respread(batch_id)
        await in_transaction(self._engine, partial(forget_ended_pauses, limit=_PAUSES_AT_ONCE))
        return _BUSY if await in_transaction(self._engine, storage.unfinished) else _IDLE

    async def respread_in_call(self, batch_id: int) -> None:
        """Write the new times of one batch for about a second. The loop does the rest."""
        await self._respread(batch_id, until=time.monotonic() + _CALL_LIMIT_S)
        self._loop.wake()

    async def _respread(self, batch_id: int, until: float | None = None) -> None:
        part = partial(storage.respread_part, batch_id=batch_id)
        while not self._loop.stopping and (until is None or time.monotonic() < until):
            ended = await in_transaction(self._engine, part)
            if ended is not None:
                if ended:
                    await load_soon(self._loader, [ended])
                return
