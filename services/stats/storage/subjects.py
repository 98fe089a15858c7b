"""Whom a forecast or a series is about, and what is known of the endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import (
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import (
    Attempt,
    Batch,
    Sender,
)
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.states import CONNECTION_TROUBLE


async def sender_exists(connection: AsyncConnection, sender_id: int, user_id: str | None) -> bool:
    """Return whether there is such a sender, and for this user if one is named."""
    statement = select(Sender.id).where(Sender.id == sender_id, Sender.deleted_at.is_(None))
    return await connection.scalar(owned_by(statement, Sender.user_id, user_id)) is not None


async def sender_of_batch(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> int | None:
    """Return the sender of a batch; None: there is no such batch, or not for this user."""
    statement = select(Batch.sender_id).where(Batch.id == batch_id)
    return await connection.scalar(owned_by(statement, Batch.user_id, user_id))


@dataclass(frozen=True, slots=True)
class EndpointFailure:
    """An attempt that came to nothing for want of its endpoint."""

    ended_at: datetime
    message: str


async def last_failure(connection: AsyncConnection, sender_id: int) -> EndpointFailure | None:
    """Return what the sender's last attempt met; None: it was no trouble of the endpoint."""
    statement = (
        select(Attempt.ended_at, Attempt.outcome, Attempt.message)
        .where(Attempt.sender_id == sender_id)
        .order_by(Attempt.ended_at.desc())
        .limit(1)
    )
    last = (await connection.execute(statement)).one_or_none()
    if last is None or last.outcome not in CONNECTION_TROUBLE:
        return None
    return EndpointFailure(last.ended_at, last.message or "no reply")
