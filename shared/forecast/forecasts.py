"""What a caller is told about the time of waiting mail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.forecast.backlog import (
    BacklogPosition,
    Rules,
    SenderPace,
    from_us,
    read_ahead,
    read_backlog,
    read_pace,
    to_us,
)
from outbox_server.shared.forecast.runs import in_order
from outbox_server.shared.forecast.simulation import Bound, Limiter, Run, SimulatedOutcome, simulate

# What takes longer than a moment must not hold up the loop.
_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True)
class Forecast:
    """When mail will be sent.

    `first`, `end` None: nothing will be sent, or no one can say; then `active` is False, or
    `within_sight` is.
    """

    # What the sender may do.
    limiter: Limiter
    # The time at which the data was read.
    read_at: datetime
    jobs: int = 0
    first: datetime | None = None
    end: datetime | None = None
    # What most of the time until the end goes by; None: the due time.
    bound: Bound | None = None
    # Other jobs of the sender that come before the last one.
    ahead: int = 0
    expiring: int = 0
    # Whether the sender sends at all.
    active: bool = True
    within_sight: bool = True
    # The sender's cooldown. Its next probe is assumed to be accepted.
    cooldown: CooldownRecord | None = None


async def forecast_batch(
    connection: AsyncConnection, sender_id: int, batch_id: int, rules: Rules
) -> Forecast:
    """Return the forecast of what waits of a batch.

    The connection must see one moment. Whose the batch is must be known already.
    """
    pace = await read_pace(connection, sender_id, rules)
    runs = await read_backlog(connection, sender_id, pace.waiting, batch_id)
    return await _forecast(pace, runs)


async def forecast_planned(
    connection: AsyncConnection,
    sender_id: int,
    plan: Callable[[datetime], Run],
    rules: Rules,
) -> Forecast:
    """Return the forecast of a batch that is only planned, behind what waits already.

    `plan` returns its mails as they are if it is accepted at the time that it is told.
    """
    pace = await read_pace(connection, sender_id, rules)
    # Behind all that is due at the same time, for its ids are new.
    planned = plan(from_us(pace.now))
    others = await read_backlog(connection, sender_id, pace.waiting, None)
    return await _forecast(pace, in_order([*others, replace(planned, mine=planned.count)]))


async def forecast_job(
    connection: AsyncConnection,
    sender_id: int,
    pace: SenderPace,
    *,
    place: BacklogPosition,
    ahead: int,
    expire_after: timedelta | None,
) -> Forecast:
    """Return the forecast of one job that waits, with `ahead` others before it."""
    others = await read_ahead(connection, sender_id, place, ahead)
    expiry = None if expire_after is None else expire_after // timedelta(microseconds=1)
    return await _forecast(pace, [*others, Run(to_us(place.due), mine=1, expire_after=expiry)])


async def _forecast(pace: SenderPace, runs: Sequence[Run]) -> Forecast:
    jobs = sum(run.mine for run in runs)
    read_at = from_us(pace.now)
    known = Forecast(pace.limiter, read_at, jobs, active=pace.active, cooldown=pace.cooldown)
    # Limit.PAUSE: nobody can say when a paused sender goes on.
    if not jobs or not pace.active:
        return known
    found = await _simulate(pace.limiter, runs, pace.now)
    try:
        first = None if found.first is None else from_us(found.first)
        end = None if found.end is None else from_us(found.end)
    except OverflowError:
        return replace(known, within_sight=False)
    return replace(
        known,
        first=first,
        end=end,
        bound=found.bound,
        ahead=max(found.sends - (jobs - found.expiring), 0),
        expiring=found.expiring,
        within_sight=found.within_sight,
    )


async def _simulate(limiter: Limiter, runs: Sequence[Run], now: int) -> SimulatedOutcome:
    if len(runs) <= _AT_ONCE:
        return simulate(limiter, runs, now)
    return await asyncio.to_thread(simulate, limiter, runs, now)
