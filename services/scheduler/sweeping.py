"""Updates the job rows of cancelled batches (shared/database/cancellations.py).

Runs in every scheduler. Nothing waits for it: all readers see the jobs as CANCELLED at once.
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

# The pause while rows are left: another scheduler sweeps them, or their jobs are in flight.
_BUSY: Final = timedelta(seconds=1)
# The pause otherwise: a scheduler that died may have left a batch. A cancellation in this process
# wakes the sweeper.
_IDLE: Final = timedelta(seconds=5)


class Sweeper:
    """Moves the rows of cancelled batches to CANCELLED, in small transactions."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._loop = Loop("sweeping", self._sweep_once, errors=DATABASE_ERRORS, retry=_BUSY)

    def wake(self) -> None:
        """Sweep at once."""
        self._loop.wake()

    async def run(self, stop: asyncio.Event) -> None:
        """Sweep until `stop` is set. An error of PostgreSQL is logged, and the sweep repeated."""
        await self._loop.run(stop)

    async def _sweep_once(self) -> timedelta:
        return _BUSY if await self.sweep_all() else _IDLE

    async def sweep_all(self) -> bool:
        """Move all rows that can be moved. Return whether any are left."""
        for batch_id in await in_transaction(self._engine, cancelling.unswept):
            await self.sweep(batch_id)
        return bool(await in_transaction(self._engine, cancelling.unswept))

    async def sweep(self, batch_id: int) -> None:
        """Move all rows of one batch that can be moved."""
        step = partial(cancelling.sweep, batch_id=batch_id)
        while await in_transaction(self._engine, step) and not self._loop.stopping:
            pass
