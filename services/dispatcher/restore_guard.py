"""Keeps mail from being sent again after a restore: writes heartbeats, and begins holds.

Nothing is claimed before the first heartbeat. From then on, each mark compares the newest number
that this process has seen (`services.dispatcher.storage.marking`), so that nothing is sent from
older data until the next heartbeat has decided about them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.metrics import DispatcherMetrics
from outbox_server.services.dispatcher.restores import BEAT, find_restore
from outbox_server.services.dispatcher.storage import ServerIdentity, StoredBeat
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.database.message_ids import installation_id
from outbox_server.shared.holds.storage import HoldRecord, any_open_job, begin_hold, read_hold
from outbox_server.shared.loops import Loop
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.heartbeats import HeartbeatMemory, KnownBeat

_log = structlog.get_logger(__name__)


class RestoreGuard:
    """Compares PostgreSQL with what this process and Redis have seen of it, every two seconds."""

    def __init__(
        self,
        engine: AsyncEngine,
        memory_of: Callable[[str], HeartbeatMemory],
        hold_after: timedelta,
        metrics: DispatcherMetrics | None = None,
        on_step_back: Callable[[], None] = lambda: None,
    ) -> None:
        """`memory_of` returns the memory of an installation, by its id.

        `on_step_back` is called when PostgreSQL has lost commits and the mail is not held.
        """
        self._on_step_back = on_step_back
        self._engine = engine
        self._memory_of = memory_of
        self._memory: HeartbeatMemory | None = None
        self._hold_after = hold_after
        self._metrics = metrics or DispatcherMetrics()
        self._known: KnownBeat | None = None
        self._readable: frozenset[str] | None = None
        self._decided = asyncio.Event()
        # The hold; None if the installation is not held.
        self.hold: HoldRecord | None = None

    @property
    def seen(self) -> int:
        """The number of the newest heartbeat that this process has seen."""
        return 0 if self._known is None else self._known.number

    @property
    def held_since(self) -> datetime | None:
        """Since when the installation is held; None if it is not."""
        return None if self.hold is None else self.hold.held_at

    async def run(self) -> None:
        """Write heartbeats until cancelled."""
        await Loop("heartbeat", self.beat, errors=(*QUEUE_ERRORS, *DATABASE_ERRORS)).run()

    async def then(
        self, work: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event
    ) -> None:
        """Run `work` once the first heartbeat was written, or `stop` is set."""
        waits = [asyncio.ensure_future(each.wait()) for each in (self._decided, stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        await work()

    async def beat(self) -> timedelta:
        """Decide whether to hold the installation, write a heartbeat, and return the pause."""
        if self._memory is None:
            async with self._engine.begin() as connection:
                self._memory = self._memory_of(await installation_id(connection))
        remembered = await self._memory.read()
        known = max(filter(None, (remembered, self._known)), default=None)
        async with self._engine.begin() as connection:
            if self._readable is None:
                self._readable = await storage.readable_functions(connection)
            stored = await storage.read_heartbeat(connection)
            server = await storage.read_identity(connection, self._readable)
            found = find_restore(stored, server, known, self._hold_after)
            if found is not None and await any_open_job(connection):
                await begin_hold(connection, *found)
            stepped_back = False
            if stored is not None and known is not None and known.number > stored.number:
                stepped_back = True
                lost = (known.at - stored.at).total_seconds()
                _log.warning("postgresql_stepped_back", seconds=lost, held=found is not None)
            beat = _following(stored, server, known)
            if stored is None or beat.number != stored.number:
                await storage.write_heartbeat(connection, beat.number, server)
            hold = await read_hold(connection)
        self._known = beat
        self._show(hold)
        if stepped_back and hold is None:
            self._on_step_back()
        self._decided.set()
        # Redis may be full. Then this process is the only one that remembers.
        await self._memory.write(beat)
        return BEAT

    def _show(self, hold: HoldRecord | None) -> None:
        if hold is not None and hold != self.hold:
            _log.warning("held", since=hold.held_at, reason=hold.reason.name, detail=hold.detail)
        if hold is None and self.hold is not None:
            _log.info("hold_ended", since=self.hold.held_at)
        self.hold = hold
        self._metrics.held.set(hold is not None)


def _following(
    stored: StoredBeat | None, server: ServerIdentity, known: KnownBeat | None
) -> KnownBeat:
    """Return the next heartbeat, or the stored one if it is new and nothing has changed."""
    newest = max(0 if stored is None else stored.number, 0 if known is None else known.number)
    if (
        stored is not None
        and stored.original
        and stored.number == newest
        and (stored.system_identifier, stored.timeline)
        == (server.system_identifier, server.timeline)
        and timedelta(0) <= server.now - stored.at < BEAT
    ):
        return KnownBeat(stored.number, stored.at)
    return KnownBeat(newest + 1, server.now)
