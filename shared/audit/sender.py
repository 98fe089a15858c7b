"""Audits one sender: replays its recorded sends against its limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.agreed.storage import read_limits_change
from outbox_server.shared.audit import storage
from outbox_server.shared.audit.replay import Replay
from outbox_server.shared.audit.storage import Interval
from outbox_server.shared.gap import effective_gap

_SECOND: Final = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class SenderFindings:
    """The recorded sends of one sender, and the limits that they are compared with."""

    # None if there were fewer than two sends.
    least_gap: timedelta | None
    most_in_window: int
    # Number of jobs that were sent, and of sends that were not the first of their job.
    sent: int
    duplicates: int
    # Number of accepted jobs without a row.
    lost: int
    effective_min_gap: timedelta
    hourly_limit: int


async def audit_sender(
    connection: AsyncConnection,
    sender_id: int,
    user_id: str | None,
    interval: Interval,
    *,
    floor: timedelta,
    window: timedelta,
    lease: timedelta,
) -> SenderFindings | None:
    """Audit the sends of a sender in an interval; None if this user has no such sender.

    `floor` is OUTBOX_MIN_GAP, `window` is OUTBOX_RATE_WINDOW, and `lease` is OUTBOX_LEASE. Sends
    that may have been claimed before the last change of a window or a gap are only counted.
    """
    sender = await storage.read_limits(connection, sender_id, user_id)
    if sender is None:
        return None
    checked, changed = interval, await read_limits_change(connection)
    if changed is not None and (interval.start is None or interval.start < changed + lease):
        # Earlier sends had other limits.
        checked = replace(interval, start=changed + lease)
    gap = effective_gap(sender.min_gap_ms, floor)
    replay = Replay(
        window / _SECOND,
        sender.hourly_limit,
        None if checked.start is None else checked.start.timestamp(),
    )
    sends = storage.stream_sends_of(connection, sender_id, checked, max(window, gap))
    async for start, end in sends:
        replay.add(start.timestamp(), end.timestamp())
    sent, duplicates = await storage.count_sends(connection, sender_id, interval)
    return SenderFindings(
        least_gap=None if replay.least_gap is None else timedelta(seconds=replay.least_gap),
        most_in_window=replay.most_in_window,
        sent=sent,
        duplicates=duplicates,
        lost=await storage.count_missing(connection, sender_id),
        effective_min_gap=gap,
        hourly_limit=sender.hourly_limit,
    )
