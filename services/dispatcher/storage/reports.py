"""The table of dispatchers: each writes a report about itself every few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import DispatcherRow, EndpointReportRow

# How often a dispatcher reports, and how old the last report of a running one may be.
REPORT_EVERY: Final = timedelta(seconds=5)
LIVE_FOR: Final = timedelta(seconds=20)
# The names of dispatchers that ended are kept for the attempts that they made.
_KEPT_FOR: Final = timedelta(days=400)
_MOST_LISTED: Final = 1_000


@dataclass(frozen=True, slots=True)
class DispatcherReport:
    """What a dispatcher says about itself. `oldest_lease` is how long ago it began."""

    dispatcher_id: str
    concurrency: int
    draining: bool = False
    in_flight: int = 0
    # None means that nothing is in flight.
    oldest_lease: timedelta | None = None
    sent_per_second: float = 0.0
    attempts_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class LiveDispatcher:
    """A dispatcher with a recent report."""

    report: DispatcherReport
    started_at: datetime
    seen_at: datetime
    oldest_lease_at: datetime | None


async def write_report(
    connection: AsyncConnection, number: int | None, report: DispatcherReport
) -> int:
    """Write a report, and return the number of the dispatcher; None means the first report."""
    values: dict[str, Any] = {
        "seen_at": func.now(),
        "draining": report.draining,
        "in_flight": report.in_flight,
        "oldest_lease_at": None
        if report.oldest_lease is None
        else func.now() - report.oldest_lease,
        "sent_per_second": report.sent_per_second,
        "attempts_per_second": report.attempts_per_second,
    }
    if number is not None:
        changed = await connection.execute(
            update(DispatcherRow)
            .where(DispatcherRow.id == number, DispatcherRow.dispatcher_id == report.dispatcher_id)
            .values(values)
        )
        if changed.rowcount:
            return number
    # It is the first report, or PostgreSQL was restored to a time before it.
    await connection.execute(
        delete(DispatcherRow).where(DispatcherRow.seen_at < func.now() - _KEPT_FOR)
    )
    running = select(DispatcherRow.id).where(DispatcherRow.seen_at > func.now() - LIVE_FOR)
    await connection.execute(
        delete(EndpointReportRow).where(EndpointReportRow.dispatcher.not_in(running))
    )
    new = await connection.scalar(
        insert(DispatcherRow)
        .values(dispatcher_id=report.dispatcher_id, concurrency=report.concurrency, **values)
        .returning(DispatcherRow.id)
    )
    return int(new or 0)


async def write_end(connection: AsyncConnection, number: int) -> None:
    """Record that a dispatcher has ended."""
    await connection.execute(
        delete(EndpointReportRow).where(EndpointReportRow.dispatcher == number)
    )
    await connection.execute(
        update(DispatcherRow)
        .where(DispatcherRow.id == number)
        .values(stopped_at=func.now(), in_flight=0, oldest_lease_at=None)
    )


async def live_dispatchers(connection: AsyncConnection) -> Sequence[LiveDispatcher]:
    """Return the dispatchers that run, the oldest first."""
    rows = await connection.execute(
        select(
            DispatcherRow.dispatcher_id,
            DispatcherRow.concurrency,
            DispatcherRow.draining,
            DispatcherRow.in_flight,
            DispatcherRow.sent_per_second,
            DispatcherRow.attempts_per_second,
            DispatcherRow.started_at,
            DispatcherRow.seen_at,
            DispatcherRow.oldest_lease_at,
        )
        .where(DispatcherRow.seen_at > func.now() - LIVE_FOR, DispatcherRow.stopped_at.is_(None))
        .order_by(DispatcherRow.started_at, DispatcherRow.id)
        .limit(_MOST_LISTED)
    )
    return [
        LiveDispatcher(
            DispatcherReport(
                row.dispatcher_id,
                row.concurrency,
                draining=row.draining,
                in_flight=row.in_flight,
                sent_per_second=row.sent_per_second,
                attempts_per_second=row.attempts_per_second,
            ),
            row.started_at,
            row.seen_at,
            row.oldest_lease_at,
        )
        for row in rows
    ]
