"""What a caller is told about the time of a batch: its forecast end, and what keeps it waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from services.scheduler.limits import Limits, forecast_end
from services.scheduler.storage.batches import BatchRecord
from services.scheduler.storage.senders import read_pace
from shared.states import SenderState

_PAUSED = "The sender is paused: nothing is sent before ResumeSender."


@dataclass(frozen=True, slots=True)
class Forecast:
    """When the last mail of a batch will be sent, and sentences for people."""

    end: datetime | None = None
    notices: Sequence[str] = ()


class Forecaster:
    """Forecasts from what PostgreSQL knows; `floor` is OUTBOX_MIN_GAP, `window` the trailing one.

    The other waiting jobs of the sender are taken to come first.
    """

    def __init__(self, floor: timedelta, window: timedelta) -> None:
        self._floor = floor
        self._window = window

    async def forecast(self, connection: AsyncConnection, batch: BatchRecord) -> Forecast:
        """Return what is to be said about a batch now; nothing if nothing of it waits."""
        jobs = batch.counts.scheduled
        if not jobs:
            return Forecast()
        pace = await read_pace(connection, batch.sender_id, self._window)
        limits = Limits.of(pace.hourly_limit, pace.min_gap_ms, self._floor, self._window)
        notices = [notice for notice in (limits.notice(),) if notice and jobs > 1]
        if pace.deleted or pace.state is not SenderState.ACTIVE:
            return Forecast(notices=[*notices, _PAUSED])
        end = forecast_end(
            limits,
            now=pace.now,
            start=batch.start_at,
            last_due=batch.last_due_at or batch.start_at,
            jobs=jobs,
            ahead=max(pace.open_jobs - batch.counts.open, 0),
            used=pace.used,
        )
        return Forecast(end, notices)
