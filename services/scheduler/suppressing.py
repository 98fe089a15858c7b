"""Ends the waiting jobs to suppressed addresses after the first part (storage/suppressing.py)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.suppressing import EndedPart, end_part
from outbox_server.shared.heads.loader import HeadLoader, load_soon

# Records how many jobs a part has ended, in its transaction.
Record: TypeAlias = Callable[[AsyncConnection, int], Awaitable[None]]


async def end_rest(
    engine: AsyncEngine, loader: HeadLoader, first: EndedPart, record: Record | None = None
) -> int:
    """End the jobs that the first part has left. Return how many were ended.

    If the process dies meanwhile, a dispatcher ends each of the others when it is due.
    """
    jobs, senders, waiting = 0, set(first.ended.sender_ids), first.rest

    async def step(connection: AsyncConnection) -> EndedPart:
        part = await end_part(connection, waiting)
        if part.ended.jobs and record is not None:
            await record(connection, part.ended.jobs)
        return part

    while waiting.left:
        part = await in_transaction(engine, step)
        jobs, waiting = jobs + part.ended.jobs, part.rest
        senders.update(part.ended.sender_ids)
    if senders:
        await load_soon(loader, sorted(senders))
    return jobs
