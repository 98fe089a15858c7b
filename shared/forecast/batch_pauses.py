"""Takes the pauses of batches into account: their mail waits until the pause ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime

from sqlalchemy import case, null, select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import Batch
from outbox_server.shared.database.pauses import batch_is_paused
from outbox_server.shared.forecast.job_groups import in_order, joined
from outbox_server.shared.forecast.simulation import JobGroup


async def read_pauses(connection: AsyncConnection, sender_id: int) -> Mapping[int, datetime | None]:
    """Return when each paused batch of a sender resumes; None means that this is not known."""
    # How long it takes to write new due times is not known either.
    until = case((Batch.respreading, null()), else_=Batch.paused_until).label("until")
    statement = select(Batch.id, until).where(Batch.sender_id == sender_id, batch_is_paused())
    return {row.id: row.until for row in await connection.execute(statement)}


def after_pauses(
    groups: Iterable[tuple[int, JobGroup]], pauses: Mapping[int, int | None]
) -> list[JobGroup]:
    """Return waiting mail in the order in which it can be sent.

    Each group comes with the id of its batch. Mail of a batch without an end in `pauses` (us) is
    left out. Other mail of `pauses` can be sent from the end on, as if it were due then.
    """
    if not pauses:
        return list(joined(groups))
    free: list[tuple[int, JobGroup]] = []
    delayed: dict[tuple[int, int | None], JobGroup] = {}
    for batch, group in groups:
        if batch not in pauses:
            free.append((batch, group))
            continue
        end = pauses[batch]
        if end is None:
            continue
        early, later = _split(group, end)
        if early is not None:
            key = batch, early.expire_after
            known = delayed.get(key)
            if known is not None:
                early = replace(
                    known, count=known.count + early.count, mine=known.mine + early.mine
                )
            delayed[key] = early
        if later is not None:
            free.append((batch, later))
    return in_order([*delayed.values(), *joined(free)])


def _split(group: JobGroup, end: int) -> tuple[JobGroup | None, JobGroup | None]:
    """Return the mail that is due before a pause ends, as due at its end, and the rest."""
    if group.due >= end:
        return None, group
    count = group.count
    if group.step:
        count = min(count, -((group.due - end) // group.step))
    mine = group.mine * count // group.count
    expires = group.expire_after
    early = JobGroup(
        due=end,
        count=count,
        mine=mine,
        expire_after=None if expires is None else expires - (end - group.due),
    )
    if count == group.count:
        return early, None
    rest = replace(
        group,
        due=group.due + count * group.step,
        count=group.count - count,
        mine=group.mine - mine,
    )
    return early, rest
