"""Recovers from failures: ends expired leases, loads abandoned heads, looks for lost senders."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.metrics import DispatcherMetrics, LostLease
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.heads.lives import CHECK_PAUSE
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.heads.markers import MARKER_AGE, mark_stale
from outbox_server.shared.loops import Loop
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import JobState

# A search for expired leases begins this long after the end of a lease, so that it finds that
# lease.
_SLACK = timedelta(milliseconds=20)
# After an outage of PostgreSQL, dispatchers get this time to record the sends that ended meanwhile.
# Only then are expired leases ended. An outage is detected by an error of any step (at least one
# query runs every 5 s), or by a recovery that takes longer than `_HANGS`. A shorter outage does no
# harm: a send stops 6 s (a tenth of the lease) before its lease ends (renewer.py), and recording it
# is tried every 0.2 s. One case remains: PostgreSQL hangs without an error from those 6 s before
# the end of a lease until less than `_HANGS` after it. Then the first statement that runs decides.
# At worst the mail is in doubt, as after the death of a dispatcher.
#
# A dispatcher that starts cannot know whether an outage has just ended. So it gives others the same
# time, but no more than a sixth of a lease.
GRACE = timedelta(seconds=10)
_HANGS = timedelta(seconds=2)
# How often one of the dispatchers does a part of the patrol (shared/heads/patrol.py).
PATROL_PAUSE = timedelta(seconds=1)
# How often a dispatcher whose Redis server is not in use checks whether it is now.
_SOON = timedelta(seconds=1)
_ERRORS = (*QUEUE_ERRORS, *DATABASE_ERRORS)
_log = structlog.get_logger(__name__)


class Recovery:
    """Runs the recovery steps in every dispatcher. Several may run at once (SKIP LOCKED)."""

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        loader: HeadLoader,
        metrics: DispatcherMetrics | None = None,
    ) -> None:
        self._metrics = metrics or DispatcherMetrics()
        self._lease = settings.lease
        self._next_state = (
            JobState.UNCERTAIN if settings.uncertain_policy == "hold" else JobState.SCHEDULED
        )
        self._engine = engine
        self._loader = loader
        # False from an outage of PostgreSQL until `GRACE` has been given.
        self._outage_handled = True
        # Whether the last search gave `GRACE`. If PostgreSQL is always slow, it is given only once.
        self._gave_grace = False
        # Until when others get time after the start, by `time.monotonic`.
        self._grace_until = -math.inf

    async def run(self) -> None:
        """Recover until cancelled."""
        self._grace_until = time.monotonic() + min(GRACE, self._lease / 6).total_seconds()
        async with asyncio.TaskGroup() as group:
            for name, step in (
                ("lease recovery", self.recover_leases),
                ("loading abandoned heads", self._load_abandoned),
                ("the patrol", self._patrol),
                ("confirming lives", self._confirm_lives),
            ):
                loop = Loop(name, partial(self._try, step), errors=_ERRORS)
                group.create_task(loop.run())

    async def _try(self, step: Callable[[], Awaitable[timedelta]]) -> timedelta:
        try:
            return await step()
        except QUEUE_ERRORS:  # first, because OSError is in both
            raise
        except DATABASE_ERRORS:
            self._outage_handled = False
            raise

    async def recover_leases(self) -> timedelta:
        """End attempts whose lease has expired. Return the time until the next one can expire.

        Without any lease this is the length of a lease, because a later lease ends later.
        """
        asked = time.monotonic()
        async with self._engine.connect() as connection:
            expired = await storage.recover_expired(connection, self._lease, self._next_state)
            senders = list(expired)
            hung = time.monotonic() - asked > _HANGS.total_seconds()
            self._outage_handled = self._outage_handled and (self._gave_grace or not hung)
            if senders:
                # The marker is for the case that Redis cannot be reached, or this process dies,
                # before the load below.
                await mark_stale(connection, senders)
            grace = timedelta(seconds=max(self._grace_until - asked, 0))
            if not self._outage_handled:
                grace = GRACE
            if senders and grace:
                # The statements have shown that PostgreSQL can write again. Now others record what
                # they sent.
                await connection.rollback()
                self._outage_handled = self._gave_grace = True
                return grace
            await connection.commit()
        self._gave_grace = False
        if senders:
            self._metrics.lost_leases(LostLease.EXPIRED, sum(expired.values()))
            _log.warning("leases_expired", senders=senders)
            await self._loader.load(senders, committed=True)
        async with self._engine.connect() as connection:
            left = await storage.next_expiry(connection)
        return self._lease if left is None else min(self._lease, max(left, timedelta(0)) + _SLACK)

    async def _confirm_lives(self) -> timedelta:
        """Compare the lives of all shards with PostgreSQL; begin a new one where that is allowed.

        Other dispatchers see by this that the life is in use. It also compares the clocks.
        """
        failed: Exception | None = None
        for queue in self._loader.queues:
            try:
                if not await self._loader.lives.confirm(queue):
                    await self._loader.rebuild(queue)
            except _ERRORS as error:
                # In a cluster, other shards are served.
                failed = error
        if failed is not None:
            raise failed
        return _SOON if self._loader.lives.any_superseded else CHECK_PAUSE

    async def _load_abandoned(self) -> timedelta:
        senders = await self._loader.load_abandoned()
        if senders:
            _log.info("abandoned_heads_loaded", senders=senders)
        return MARKER_AGE

    async def _patrol(self) -> timedelta:
        return await self._loader.patrol(PATROL_PAUSE)
