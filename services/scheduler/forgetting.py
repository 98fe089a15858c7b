"""Removes old requests, and old events of jobs and of the audit log, a few rows at a time.

Runs in every scheduler. Rows that another scheduler removes at the moment are skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage import changes as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.webhooks import remove_old_deliveries
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.events.storage import remove_old_events
from outbox_server.shared.loops import Loop

# For so long, a repeated request is recognised.
REQUESTS_KEPT: Final = timedelta(hours=24)
# Of one user. A user that changes more within a day loses the oldest requests sooner.
_MOST_REQUESTS: Final = 10_000
# Of one actor about the data of one user.
_MOST_EVENTS: Final = 100_000
# The number of rows that one transaction removes.
_CHUNK: Final = 1_000
_INTERVAL: Final = timedelta(minutes=10)
_RETRY: Final = timedelta(seconds=10)

_Removal = Callable[[AsyncConnection], Awaitable[int]]


class _OldEvents:
    """Removes old events of jobs from where it has come to in a run.

    From the start of the index each time, it would read all the rows that it has removed before,
    until a vacuum. Rows that it skips are left to the next run.
    """

    def __init__(self, retention: timedelta) -> None:
        self._retention = retention
        self._after = 0

    async def remove(self, connection: AsyncConnection) -> int:
        removed = await remove_old_events(connection, self._retention, _CHUNK, self._after)
        self._after = max(removed, default=0)
        return len(removed)


class Forgetter:
    """Removes what is older than a day, or than the retentions of both kinds of events."""

    def __init__(
        self,
        engine: AsyncEngine,
        audit_retention: timedelta | None,
        *,
        event_retention: timedelta = timedelta(days=7),
        most_requests: int = _MOST_REQUESTS,
        most_events: int = _MOST_EVENTS,
    ) -> None:
        """`audit_retention` None means for ever.

        `most_requests` are those of one user, `most_events` those of one actor about one user.
        """
        self._engine = engine
        self._removals: list[_Removal] = [
            partial(storage.remove_requests, older_than=REQUESTS_KEPT, limit=_CHUNK),
            partial(storage.remove_surplus_requests, most=most_requests, limit=_CHUNK),
            partial(storage.remove_surplus_events, most=most_events, limit=_CHUNK),
            partial(remove_old_deliveries, older_than=event_retention, limit=_CHUNK),
            _OldEvents(event_retention).remove,
        ]
        if audit_retention is not None:
            self._removals.append(
                partial(storage.remove_events, older_than=audit_retention, limit=_CHUNK)
            )
        self._loop = Loop("forgetting", self._step, errors=DATABASE_ERRORS, retry=_RETRY)

    async def run(self, stop: asyncio.Event) -> None:
        """Remove now and then, until `stop` is set."""
        await self._loop.run(stop)

    async def _step(self) -> timedelta:
        await self.forget()
        return _INTERVAL

    async def forget(self) -> None:
        """Remove everything that is too old or too much now."""
        for removal in self._removals:
            while await in_transaction(self._engine, removal) and not self._loop.stopping:
                pass
