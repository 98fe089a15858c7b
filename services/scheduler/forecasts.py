"""Forecasts the end of a batch, and names what delays it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.limits import Limits
from outbox_server.services.scheduler.storage.batches import BatchRecord
from outbox_server.shared.forecast.backlog import Rules
from outbox_server.shared.forecast.forecasts import forecast_batch

_PAUSED = "The sender is paused: nothing is sent before ResumeSender."


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
        limiter = found.limiter
        limits = Limits(limiter.limit, timedelta(microseconds=limiter.gap))
        notices = [notice for notice in (limits.notice(),) if notice and jobs > 1]
        if not found.active:
            notices.append(_PAUSED)
        if found.cooldown is not None:
            notices.append(found.cooldown.describe(found.read_at))
        return BatchForecast(found.end, notices)
