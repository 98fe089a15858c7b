"""Removes old requests, and old events of jobs and of the audit log, a few rows at a time.

It also removes the oldest events of jobs of a user that has more than its quota. Runs in every
scheduler. Rows that another scheduler is removing are skipped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage import changes as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.webhook_deliveries import remove_old_deliveries
from outbox_server.shared import bounds
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.events import removing
from outbox_server.shared.events.horizon import Horizon
from outbox_server.shared.loops import Loop

# How long a repeated request is recognised.
REQUESTS_KEPT: Final = timedelta(hours=24)
# The maximum number of requests that are kept of one user. A user that makes more changes within a
# day loses the oldest requests sooner.
_MOST_REQUESTS: Final = 10_000
# The maximum number of events that are kept of one actor about the data of one user: this many
# accepted batches, and as many other changes.
_MOST_EVENTS: Final = 100_000
# The number of rows that one transaction removes.
_CHUNK: Final = 1_000
# The same for surplus events. It is larger because each removal first counts all events.
_SURPLUS_CHUNK: Final = 10_000
_INTERVAL: Final = timedelta(minutes=10)
# How many events of jobs one transaction counts or removes, and of how many users.
_EVENT_CHUNK: Final = 8_000
_USERS_AT_ONCE: Final = 4
# The time between two counts. A user may exceed its quota of events by what it writes in this time.
_OFTEN: Final = timedelta(seconds=10)
_RETRY: Final = timedelta(seconds=10)

_Removal = Callable[[AsyncConnection], Awaitable[int]]


class _JobEvents:
    """Counts the events of jobs, and removes old and surplus ones."""

    def __init__(self, engine: AsyncEngine, retention: timedelta, most: int) -> None:
        self._engine = engine
        self._retention = retention
        self._most = most
        self._horizon = Horizon()
        # How far a run has removed old events. If each step began at the start of the index, it
        # would read all entries of removed rows again, until a vacuum.
        self._after = 0

    async def remove_old(self, connection: AsyncConnection) -> int:
        removed = await removing.remove_old_events(connection, self._retention, _CHUNK, self._after)
        self._after = removed.last
        return removed.count

    async def count(self, connection: AsyncConnection) -> bool:
        await self._horizon.advance(connection)
        last = self._horizon.position
        if last is None:
            # Transactions in progress may still commit events. The next run counts those.
            return False
        return await removing.count_events(connection, last.event_id, _EVENT_CHUNK)

    async def remove_surplus(self, connection: AsyncConnection) -> int:
        """Remove some of the surplus of some users, the same number of each."""
        found = await removing.find_surplus(connection, self._most, _USERS_AT_ONCE)
        removed = 0
        for one in found:
            removed += await removing.remove_surplus_events(
                connection, one.user_id, one.quota, _EVENT_CHUNK // len(found)
            )
        return removed


class Forgetter:
    """Removes what is older than a day, or than the retentions of both kinds of events."""

    def __init__(
        self,
        engine: AsyncEngine,
        audit_retention: timedelta | None,
        *,
        event_retention: timedelta = timedelta(days=7),
        most_job_events: int = bounds.MAX_QUOTA,
        most_requests: int = _MOST_REQUESTS,
        most_events: int = _MOST_EVENTS,
    ) -> None:
        """`audit_retention`: None keeps the audit log for ever.

        `most_job_events` is the default quota of a user. `most_requests` are those of one user,
        `most_events` those of one actor about one user.
        """
        self._engine = engine
        job_events = _JobEvents(engine, event_retention, most_job_events)
        self._often: list[_Removal] = [job_events.count, job_events.remove_surplus]
        # When to remove the rest again, by the loop's clock.
        self._next_at = 0.0
        self._removals: list[_Removal] = [
            partial(storage.remove_requests, older_than=REQUESTS_KEPT, limit=_CHUNK),
            partial(storage.remove_surplus_requests, most=most_requests, limit=_CHUNK),
            partial(storage.remove_surplus_events, most=most_events, limit=_SURPLUS_CHUNK),
            partial(remove_old_deliveries, older_than=event_retention, limit=_CHUNK),
            job_events.remove_old,
        ]
        if audit_retention is not None:
            self._removals.append(
                partial(storage.remove_events, older_than=audit_retention, limit=_CHUNK)
            )
        self._loop = Loop("forgetting", self._step, errors=DATABASE_ERRORS, retry=_RETRY)

    async def run(self, stop: asyncio.Event) -> None:
        """Remove rows at regular intervals, until `stop` is set."""
        await self._loop.run(stop)

    async def _step(self) -> timedelta:
        await self._repeat(self._often)
        if time.monotonic() >= self._next_at:
            await self._repeat(self._removals)
            self._next_at = time.monotonic() + _INTERVAL.total_seconds()
        return _OFTEN

    async def forget(self) -> None:
        """Remove everything that is too old or too much now."""
        await self._repeat([*self._often, *self._removals])

    async def _repeat(self, removals: Sequence[_Removal]) -> None:
        for removal in removals:
            while not self._loop.stopping:
                begun = time.monotonic()
                if not await in_transaction(self._engine, removal):
                    break
                # With this pause, a removal uses at most half of one connection's time.
                await asyncio.sleep(time.monotonic() - begun)
