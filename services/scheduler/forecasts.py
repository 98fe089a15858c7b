"""Forecasts the end of a batch, and names what delays it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.limits import Limits
from outbox_server.services.scheduler.storage.batches import BatchRecord
from outbox_server.shared.callers import current_claimant
from outbox_server.shared.coalesced import Coalesced
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.database.frequent import KeptConnections
from outbox_server.shared.forecast.forecasts import (
    HELD_NOTICE,
    Forecast,
    forecast_batch,
    forecast_planned,
    forecast_read,
)
from outbox_server.shared.forecast.microseconds import from_us
from outbox_server.shared.forecast.pace import Rules
from outbox_server.shared.forecast.quick import QuickBacklog, read_quick
from outbox_server.shared.forecast.simulation import JobGroup

# A batch is accepted without a forecast if the database is slow.
_READ_LIMIT: Final = timedelta(seconds=3)
_log = structlog.get_logger("outbox.intake")
_PAUSED: Final = "The sender is paused: nothing is sent before ResumeSender."
_BATCH_PAUSED: Final = "The batch is paused: nothing of it is sent before ResumeBatch."


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """When the last mail of a batch will be sent, and sentences for people."""

    end: datetime | None = None
    notices: Sequence[str] = ()


class Forecaster:
    """Forecasts from the data in PostgreSQL."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    async def forecast(self, connection: AsyncConnection, batch: BatchRecord) -> BatchForecast:
        """Return the forecast of a batch; it is empty if none of its jobs waits."""
        jobs = batch.counts.scheduled
        if not jobs:
            return BatchForecast()
        found = await forecast_batch(connection, batch.sender_id, batch.batch_id, self._rules)
        return _described(found, jobs)

    async def forecast_planned(
        self, connection: AsyncConnection, sender_id: int, planned: Sequence[JobGroup]
    ) -> BatchForecast:
        """Return the forecast of mails that are not stored. The connection is one snapshot."""
        jobs = sum(group.count for group in planned)
        if not jobs:
            return BatchForecast()
        found = await forecast_planned(connection, sender_id, lambda _: planned, self._rules)
        return _described(found, jobs)


class QuickForecaster:
    """Forecasts small batches, for many calls together, if that is quick."""

    def __init__(self, engine: AsyncEngine, rules: Rules) -> None:
        """`engine` runs each statement as its own transaction (`single_statements`)."""
        # Two rounds may run at the same time.
        self._kept = KeptConnections(engine, kept=2)
        self._rules = rules
        self._backlogs = Coalesced(self._read)

    def begin(self, batch: BatchRecord) -> asyncio.Future[QuickBacklog | None]:
        """Begin to read what the forecast of a new batch needs. Do not cancel the future."""
        return self._backlogs.begin(batch.sender_id, current_claimant())

    async def end(
        self, batch: BatchRecord, reading: asyncio.Future[QuickBacklog | None]
    ) -> BatchForecast:
        """Return the forecast of a new batch, without an end if that takes long to compute."""
        found = await asyncio.shield(reading)
        if found is None or not batch.counts.scheduled:
            return BatchForecast()
        groups = found.groups_with(batch.batch_id)
        return _described(await forecast_read(found.pace, groups), batch.counts.scheduled)

    async def close(self) -> None:
        """Wait for the reads in progress."""
        await self._backlogs.close()
        await self._kept.aclose()

    async def _read(self, sender_ids: Sequence[int]) -> Mapping[int, QuickBacklog]:
        try:
            async with (
                asyncio.timeout(_READ_LIMIT.total_seconds()),
                self._kept.connection() as driver,
            ):
                return await read_quick(driver, sender_ids, self._rules)
        except DATABASE_ERRORS as error:
            _log.warning("no_quick_forecast", error=type(error).__name__)
            return {}


def _described(found: Forecast, jobs: int) -> BatchForecast:
    """Return the forecast of a batch with `jobs` waiting jobs, and the notices for people."""
    limiter = found.limiter
    limits = Limits(limiter.limit, timedelta(microseconds=limiter.gap))
    notices = [notice for notice in (limits.notice(),) if notice and jobs > 1]
    if found.held:
        notices.append(HELD_NOTICE)
    if not found.active:
        notices.append(_PAUSED)
    elif found.limiter.not_before is not None:
        end = from_us(found.limiter.not_before)
        notices.append(f"The sender is paused until {end:%Y-%m-%d %H:%M:%S} UTC.")
    if found.batch_paused:
        notices.append(_BATCH_PAUSED)
    if found.cooldown is not None:
        notices.append(found.cooldown.describe(found.read_at))
    return BatchForecast(found.end, notices)
