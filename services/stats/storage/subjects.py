"""Reads the sender of a forecast or a series, and its last endpoint failure."""

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
    """Return whether the sender exists and belongs to this user. None means any user."""
    statement = select(Sender.id).where(Sender.id == sender_id, Sender.deleted_at.is_(None))
    return await connection.scalar(owned_by(statement, Sender.user_id, user_id)) is not None


async def sender_of_batch(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> int | None:
    """Return the sender of a batch, or None if it does not exist or belongs to another user."""
    statement = select(Batch.sender_id).where(Batch.id == batch_id)
    return await connection.scalar(owned_by(statement, Batch.user_id, user_id))


@dataclass(frozen=True, slots=True)
class EndpointFailure:
    """An attempt that failed because of the endpoint or the connection to it."""

    ended_at: datetime
    message: str


async def last_failure(connection: AsyncConnection, sender_id: int) -> EndpointFailure | None:
    """Return the sender's last attempt if it failed because of the endpoint, otherwise None."""
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
