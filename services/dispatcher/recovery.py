"""Finds what somebody left behind or lost: leases that ran out, heads not loaded, lost keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.heads.markers import MARKER_AGE, mark_stale
from outbox_server.shared.loops import Loop
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import JobState

# A lease's end is looked for a moment later, so that one look finds it.
_SLACK = timedelta(milliseconds=20)
# After PostgreSQL was away, dispatchers record what ended meanwhile before anybody else ends it.
# That it was is noticed by an error of any step, and each dispatcher asks every 5 s at least; or by
# a look for leases that takes longer than `_HANGS`. A shorter outage need not be noticed: a send
# ends 6 s, a tenth of it, before its lease (dispatcher.py); its record is tried every 0.2 s.
# What is left is a PostgreSQL that hangs, without an error, from those 6 s before a lease's end
# until less than `_HANGS` after it: the first to be served has the job then, and at worst its mail
# is in doubt, as that of a killed dispatcher is.
GRACE = timedelta(seconds=10)
_HANGS = timedelta(seconds=2)
# How often the senders for which something waits are compared with what Redis knows, by one of the
# dispatchers: 20 us of PostgreSQL and 10 us of Redis a sender.
SWEEP = timedelta(seconds=4)
_ERRORS = (*QUEUE_ERRORS, *DATABASE_ERRORS)
_log = structlog.get_logger(__name__)


class Recovery:
    """Runs in every dispatcher; several at once do no harm (SKIP LOCKED)."""

    def __init__(self, settings: Settings, engine: AsyncEngine, loader: HeadLoader) -> None:
        self._lease = settings.lease
        self._next_state = (
            JobState.UNCERTAIN if settings.uncertain_policy == "hold" else JobState.SCHEDULED
        )
        self._engine = engine
        self._loader = loader
        # Since PostgreSQL was away it has answered, and `GRACE` is over.
        self._calm = True
        # The last look gave grace. A PostgreSQL that is always slow is not waited for again.
        self._gave_grace = False

    async def run(self) -> None:
        """Recover until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name, step in (
                ("lease recovery", self.recover_leases),
                ("loading abandoned heads", self._load_abandoned),
                ("restoring lost keys", self._restore_lost),
            ):
                loop = Loop(name, partial(self._try, step), errors=_ERRORS)
                group.create_task(loop.run())

    async def _try(self, step: Callable[[], Awaitable[timedelta]]) -> timedelta:
        try:
            return await step()
        except QUEUE_ERRORS:  # first, because OSError is in both
            raise
        except DATABASE_ERRORS:
            self._calm = False
            raise

    async def recover_leases(self) -> timedelta:
        """End attempts whose lease ran out; returns when the next one can run out.

        With no lease in sight that is a whole lease from now: one that is taken later lasts longer.
        """
        asked = time.monotonic()
        async with self._engine.connect() as connection:
            senders = await storage.recover_expired(connection, self._lease, self._next_state)
            hung = time.monotonic() - asked > _HANGS.total_seconds()
            self._calm = self._calm and (self._gave_grace or not hung)
            if senders:
                # Redis may be away, or we may die, before the load that follows.
                await mark_stale(connection, senders)
            if senders and not self._calm:
                # It could be written: PostgreSQL is back, and its disk is not full.
                await connection.rollback()
                self._calm = self._gave_grace = True
                return GRACE
            await connection.commit()
        self._gave_grace = False
        if senders:
            _log.warning("leases_expired", senders=senders)
            await self._loader.load(senders, committed=True)
        async with self._engine.connect() as connection:
            left = await storage.next_expiry(connection)
        return self._lease if left is None else min(self._lease, max(left, timedelta(0)) + _SLACK)

    async def _load_abandoned(self) -> timedelta:
        senders = await self._loader.load_abandoned()
        if senders:
            _log.info("abandoned_heads_loaded", senders=senders)
        return MARKER_AGE

    async def _restore_lost(self) -> timedelta:
        """Load the senders that Redis lost, in whole or in part, without noticing it."""
        for queue in self._loader.queues:
            await self._loader.rebuild(queue, pause=SWEEP)
        return SWEEP
