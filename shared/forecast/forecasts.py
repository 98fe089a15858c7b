"""Forecasts of the send times of batches and jobs, as callers get them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.counts import batch_counts
from outbox_server.shared.forecast.backlog import BacklogPosition, read_ahead, read_backlog
from outbox_server.shared.forecast.batch_pauses import after_pauses
from outbox_server.shared.forecast.job_groups import in_order
from outbox_server.shared.forecast.microseconds import from_us, to_us
from outbox_server.shared.forecast.pace import Rules, SenderPace, read_pace
from outbox_server.shared.forecast.simulation import (
    Bound,
    JobGroup,
    Limiter,
    SimulatedOutcome,
    simulate,
)
from outbox_server.shared.forecast.user_shares import share_of
from outbox_server.shared.holds.storage import is_batch_held

# The largest simulation in the event loop: its number of groups, and its work, which takes about
# 2 ms. Larger simulations run in a thread.
_MOST_GROUPS_IN_LOOP: Final = 100
_MOST_WORK_IN_LOOP: Final = 400
HELD_NOTICE: Final = (
    "The installation is held, as after a restore of its database: nothing is sent before an "
    "operator releases it."
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """When mail will be sent.

    If `first` and `end` are None, nothing will be sent, or the time is unknown. If the time is
    unknown, `active` or `within_sight` is False, or `held` or `batch_paused` is True.
    """

    # The limits of the sender.
    limiter: Limiter
    # The time at which the data was read.
    read_at: datetime
    jobs: int = 0
    first: datetime | None = None
    end: datetime | None = None
    # The limit that causes most of the wait. None means only the due time.
    bound: Bound | None = None
    # The senders of the user with due mail, which take turns if the user has limits.
    sharing: int = 1
    # Number of other jobs of the sender that come before the last one.
    ahead: int = 0
    expiring: int = 0
    # Whether the sender is active.
    active: bool = True
    # Whether a hold keeps the mail from being sent. `first` and `end` are None then.
    held: bool = False
    # Whether the batch, or the batch of the job, is paused until a call resumes it.
    batch_paused: bool = False
    within_sight: bool = True
    # Whether `end` is an estimate, because computing it takes too long.
    estimated: bool = False
    # The sender's cooldown. Its next probe is assumed to be accepted.
    cooldown: CooldownRecord | None = None


async def forecast_batch(
    connection: AsyncConnection, sender_id: int, batch_id: int, rules: Rules
) -> Forecast:
    """Return the forecast of the waiting jobs of a batch.

    The connection must use one snapshot. The caller has checked the owner of the batch.
    """
    pace = await read_pace(connection, sender_id, rules)
    # If new mail is not held, no batch is held.
    held = pace.held and await is_batch_held(connection, sender_id, batch_id)
    pace = replace(pace, held=held)
    if batch_id in pace.pauses and pace.pauses[batch_id] is None:
        counts = await batch_counts(connection, [batch_id])
        return replace(
            await _forecast(pace, ()), jobs=counts[batch_id].scheduled, batch_paused=True
        )
    groups = await read_backlog(connection, sender_id, pace, batch_id)
    return await _forecast(pace, groups)


async def forecast_read(pace: SenderPace, groups: Sequence[JobGroup]) -> Forecast:
    """Return the forecast of the jobs that the groups have of a batch."""
    return await _forecast(pace, groups)


async def forecast_planned(
    connection: AsyncConnection,
    sender_id: int,
    plan: Callable[[datetime], Sequence[JobGroup]],
    rules: Rules,
) -> Forecast:
    """Return the forecast of a batch that is only planned, behind the mail that waits already.

    `plan` returns the mails of the batch if it is accepted at the given time.
    """
    pace = await read_pace(connection, sender_id, rules)
    # It comes after all mail with the same due time, because its ids will be the newest.
    planned = [replace(group, mine=group.count) for group in plan(from_us(pace.now))]
    others = await read_backlog(connection, sender_id, pace, None)
    groups = [*others, *planned]
    if len(groups) <= _MOST_GROUPS_IN_LOOP:
        return await _forecast(pace, in_order(groups))
    return await _forecast(pace, await asyncio.to_thread(in_order, groups))


async def forecast_job(
    connection: AsyncConnection,
    sender_id: int,
    pace: SenderPace,
    *,
    place: BacklogPosition,
    ahead: int,
    expire_after: timedelta | None,
    batch_id: int = 0,
) -> Forecast:
    """Return the forecast of one waiting job of a batch, which is not held.

    `ahead` other jobs are before it.
    """
    pace = replace(pace, held=False)
    others = await read_ahead(connection, sender_id, pace, place, ahead)
    expiry = None if expire_after is None else expire_after // timedelta(microseconds=1)
    job = JobGroup(to_us(place.due), mine=1, expire_after=expiry)
    if not pace.pauses:
        return await _forecast(pace, [*others, job])
    end = pace.pauses.get(batch_id, 0)
    if end is None:
        return replace(await _forecast(pace, ()), jobs=1, batch_paused=True)
    return await _forecast(pace, in_order([*others, *after_pauses([(batch_id, job)], pace.pauses)]))


async def _forecast(pace: SenderPace, groups: Sequence[JobGroup]) -> Forecast:
    jobs = sum(group.mine for group in groups)
    read_at = from_us(pace.now)
    known = Forecast(
        pace.limiter,
        read_at,
        jobs,
        active=pace.active,
        held=pace.held,
        cooldown=pace.cooldown,
    )
    # Limit.PAUSE: if the pause has no end, it is unknown when the sender resumes. It is also
    # unknown when held mail will be released.
    if not jobs or not pace.active or pace.held:
        return known
    # Limit.USER_WINDOW, Limit.USER_GAP
    shared = share_of(pace.limiter, pace.user)
    found = await _simulate(shared.limiter, groups, pace.now)
    try:
        first = None if found.first is None else from_us(found.first)
        end = None if found.end is None else from_us(found.end)
    except OverflowError:
        return replace(known, within_sight=False)
    return replace(
        known,
        first=first,
        end=end,
        bound=found.bound and shared.bounds.get(found.bound, found.bound),
        sharing=1 if pace.user is None else pace.user.senders,
        ahead=max(found.sends - (jobs - found.expiring), 0),
        expiring=found.expiring,
        within_sight=found.within_sight,
        estimated=found.estimated,
    )


async def _simulate(limiter: Limiter, groups: Sequence[JobGroup], now: int) -> SimulatedOutcome:
    if len(groups) <= _MOST_GROUPS_IN_LOOP:
        found = simulate(limiter, groups, now, _MOST_WORK_IN_LOOP)
        if not found.estimated:
            return found
    return await asyncio.to_thread(simulate, limiter, groups, now)
