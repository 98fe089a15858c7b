"""Pauses, resumes and changes batches. Each is a change of one row, however many jobs wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.batches import stored_headers
from outbox_server.services.scheduler.storage.changes import next_revision
from outbox_server.shared.database.models import Batch
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.database.pauses import (
    MOST_PAUSED_BATCHES,
    batch_is_paused,
    pause_lasts,
)
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.states import BatchState

TEXTS: Final = ("subject", "body", "html")


@dataclass(frozen=True, slots=True)
class LockedBatch:
    """The stored state of a batch whose row is locked.

    `paused` says whether PauseBatch keeps its mail back now; `paused_until` may be in the past.
    """

    batch_id: int
    user_id: str
    sender_id: int
    state: BatchState
    paused: bool
    paused_at: datetime | None
    paused_until: datetime | None
    respreading: bool
    revision: int
    start_at: datetime
    spacing_ms: int
    # The templates by field, those of the headers included.
    templates: Mapping[str, Any]
    # PostgreSQL's time.
    now: datetime


async def lock_batch(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> LockedBatch | None:
    """Lock a batch; return None if it does not exist or belongs to another user.

    The lock waits for the marks under way, which lock the batch FOR SHARE. Later marks see the
    change that follows.
    """
    columns = (
        *(Batch.id, Batch.user_id, Batch.sender_id, Batch.state, Batch.paused_at),
        *(Batch.paused_until, Batch.respreading, Batch.revision, Batch.start_at),
        *(Batch.spacing_ms, Batch.subject, Batch.body, Batch.html, Batch.headers),
    )
    statement = owned_by(
        select(*columns, pause_lasts().label("paused"), func.clock_timestamp().label("now"))
        .where(Batch.id == batch_id)
        .with_for_update(key_share=True),
        Batch.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    return LockedBatch(
        batch_id=row.id,
        user_id=row.user_id,
        sender_id=row.sender_id,
        state=BatchState(row.state),
        paused=row.paused,
        paused_at=row.paused_at,
        paused_until=row.paused_until,
        respreading=row.respreading,
        revision=row.revision,
        start_at=row.start_at,
        spacing_ms=row.spacing_ms,
        templates={name: getattr(row, name) for name in TEXTS}
        | {"headers": stored_headers(row.headers)},
        now=row.now,
    )


async def change_batch(
    connection: AsyncConnection, batch: LockedBatch, values: Mapping[str, Any]
) -> None:
    """Change a locked batch, and mark the head of its sender to be loaded."""
    await connection.execute(
        update(Batch)
        .where(Batch.id == batch.batch_id)
        .values(revision=next_revision(Batch.revision), **values)
    )
    await mark_stale(connection, [batch.sender_id])


async def pause_batch(
    connection: AsyncConnection, batch: LockedBatch, until: datetime | None
) -> bool:
    """Pause a locked batch until a time; None means until a call ends it.

    Return whether that changed anything.

    Raises:
        FailedPrecondition: TOO_MANY_PAUSED_BATCHES.
    """
    if batch.paused and batch.paused_until == until:
        return False
    if not batch.paused:
        # Several calls at once may exceed the limit a little. That is enough to bound the work of
        # loads.
        others = select(func.count()).where(Batch.sender_id == batch.sender_id, batch_is_paused())
        if (await connection.scalar(others) or 0) >= MOST_PAUSED_BATCHES:
            raise FailedPrecondition(
                f"the sender has {MOST_PAUSED_BATCHES} paused batches, the maximum; "
                "resume or cancel some of them, or pause the sender",
                reason="TOO_MANY_PAUSED_BATCHES",
                metadata={"limit": str(MOST_PAUSED_BATCHES)},
            )
    since = batch.paused_at if batch.paused else func.now()
    await change_batch(connection, batch, {"paused_at": since, "paused_until": until})
    return True


async def resume_batch(connection: AsyncConnection, batch: LockedBatch) -> bool:
    """End the pause of a locked batch. Return whether it was paused."""
    if not batch.paused:
        return False
    await change_batch(connection, batch, {"paused_at": None, "paused_until": None})
    return True


async def forget_ended_pauses(connection: AsyncConnection, limit: int) -> int:
    """Remove pauses that have ended from the rows of their batches. Return how many were removed.

    Callers see no change. It keeps the index of paused batches small.
    """
    ended = (
        select(Batch.id)
        .where(
            Batch.paused_at.is_not(None),
            Batch.paused_until <= func.now(),
            Batch.respreading.is_(False),
        )
        .limit(limit)
        .with_for_update(key_share=True, skip_locked=True)
    )
    statement = update(Batch).where(Batch.id.in_(ended)).values(paused_at=None, paused_until=None)
    return (await connection.execute(statement)).rowcount
