"""Removes rows that are older than OUTBOX_RETENTION, a few at a time.

The stats service runs it along with the fold of the counts: no caller and no mail waits for that
process. `outbox purge` runs the same pass once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.loops import Loop
from outbox_server.shared.retention import storage

T = TypeVar("T")

# The number of jobs that one transaction removes, with their attempts.
CHUNK: Final = 1_000
# The pause between two passes. Nobody waits for a removal.
INTERVAL: Final = timedelta(minutes=10)
# After each transaction, a pause as long as the transaction took, and at least this. So a removal
# uses at most half of one connection's time, and less when PostgreSQL is busy.
_SHORTEST_PAUSE_S: Final = 0.02
_RETRY: Final = timedelta(seconds=10)

_log = structlog.get_logger("outbox.retention")


@dataclass(frozen=True, slots=True)
class PurgedRows:
    """How many rows were removed, by table."""

    jobs: int = 0
    attempts: int = 0
    batches: int = 0
    rejections: int = 0


class RemovalBusy(Exception):
    """Another process is removing rows."""


class Purger:
    """Removes finished jobs, their attempts and their batches that are older than a time."""

    def __init__(
        self,
        engine: AsyncEngine,
        older_than: timedelta,
        *,
        chunk: int = CHUNK,
        report: Callable[[PurgedRows], None] = lambda _: None,
    ) -> None:
        """`engine` must be `lookups_only`. `report` is called after each transaction."""
        self._engine = engine
        self._older_than = older_than
        self._chunk = chunk
        self._report = report
        self._removed = PurgedRows()
        self._loop = Loop("purging", self._step, errors=DATABASE_ERRORS, retry=_RETRY)

    async def run(self, stop: asyncio.Event) -> None:
        """Make a pass at regular intervals, until `stop` is set."""
        await self._loop.run(stop)

    async def _step(self) -> timedelta:
        try:
            removed = await self.purge_once()
        except RemovalBusy:
            # Another process is already removing rows.
            return INTERVAL
        if removed != PurgedRows():
            _log.info(
                "purged",
                jobs=removed.jobs,
                attempts=removed.attempts,
                batches=removed.batches,
                rejections=removed.rejections,
            )
        return INTERVAL

    async def purge_once(self) -> PurgedRows:
        """Remove all rows that are old now, in small transactions. Return their numbers.

        Raises:
            RemovalBusy: another process is removing rows.
        """
        self._removed = PurgedRows()
        start = storage.BEGINNING
        while not self._loop.stopping:
            jobs = await self._in_turn(
                lambda connection, start=start: storage.remove_jobs(  # type: ignore[misc]
                    connection, self._older_than, start, self._chunk
                )
            )
            self._count(jobs=jobs.jobs, attempts=jobs.attempts)
            if jobs.next_from is None:
                break
            start = jobs.next_from
        after = 0
        while not self._loop.stopping:
            batches = await self._in_turn(
                lambda connection, after=after: storage.remove_batches(  # type: ignore[misc]
                    connection, self._older_than, after, self._chunk
                )
            )
            self._count(batches=batches.batches, rejections=batches.rejections)
            if batches.next_after is None:
                break
            after = batches.next_after
        return self._removed

    async def _in_turn(self, remove: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        began = time.monotonic()
        async with self._engine.begin() as connection:
            if not await storage.enter(connection):
                raise RemovalBusy
            removed = await remove(connection)
        await asyncio.sleep(max(time.monotonic() - began, _SHORTEST_PAUSE_S))
        return removed

    def _count(
        self, jobs: int = 0, attempts: int = 0, batches: int = 0, rejections: int = 0
    ) -> None:
        before = self._removed
        self._removed = replace(
            before,
            jobs=before.jobs + jobs,
            attempts=before.attempts + attempts,
            batches=before.batches + batches,
            rejections=before.rejections + rejections,
        )
        self._report(self._removed)
