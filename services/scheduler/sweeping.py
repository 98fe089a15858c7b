"""Lets the rows of cancelled batches follow their cancellation (shared/database/cancellations.py).

Runs in every scheduler. Nothing waits for it: what is cancelled is CANCELLED for everybody.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.storage import cancelling
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.loops import Loop

# While rows are left: those of others, and of what is in flight.
_BUSY: Final = timedelta(seconds=1)
# Otherwise: one may be left by a scheduler that died. A cancellation of our own wakes us.
_IDLE: Final = timedelta(seconds=5)


class Sweeper:
    """Moves rows in small transactions, until it is stopped."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._loop = Loop("sweeping", self._sweep_once, errors=DATABASE_ERRORS, retry=_BUSY)

    def wake(self) -> None:
        """Look at once, for there is something to do."""
        self._loop.wake()

    async def run(self, stop: asyncio.Event) -> None:
        """Sweep until `stop`; an error of PostgreSQL is logged and waited out."""
        await self._loop.run(stop)

    async def _sweep_once(self) -> timedelta:
        return _BUSY if await self.sweep_all() else _IDLE

    async def sweep_all(self) -> bool:
        """Move what can be moved; return whether anything is left."""
        for batch_id in await in_transaction(self._engine, cancelling.unswept):
            await self.sweep(batch_id)
        return bool(await in_transaction(self._engine, cancelling.unswept))

    async def sweep(self, batch_id: int) -> None:
        """Move what can be moved of one batch."""
        step = partial(cancelling.sweep, batch_id=batch_id)
        while await in_transaction(self._engine, step) and not self._loop.stopping:
            pass
