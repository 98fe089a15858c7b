"""Stored SMTP passwords, encrypted again under the newest key: a chunk a transaction.

What a chunk has committed stays, and a password that is under the newest key already is left
alone: a rotation that was cut off is simply begun again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from shared.errors import FailedPrecondition
from shared.models import Sender
from shared.secrets import SecretBox

# Some 50 ms of work, for which an UpdateSender of one of these senders may have to wait.
CHUNK: Final = 500
_STORED: Final = Sender.smtp_password.is_not(None)


@dataclass(frozen=True, slots=True)
class RotatedChunk:
    """What became of some passwords, by the ids of their senders."""

    looked_at: int
    rotated: int
    # No key decrypts them.
    unreadable: Sequence[int]
    # The last sender; None: there was none left.
    last_id: int | None


async def count_passwords(connection: AsyncConnection) -> int:
    """Return how many passwords are stored."""
    found: int = (
        await connection.execute(select(func.count()).select_from(Sender).where(_STORED))
    ).scalar_one()
    return found


async def rotate_chunk(
    connection: AsyncConnection, secrets: SecretBox, after_id: int, limit: int = CHUNK
) -> RotatedChunk:
    """Rotate the first `limit` passwords of senders after `after_id`.

    The sender's revision stays: the password is the same, and nobody has to read it again.
    """
    rows: Sequence[Any] = (
        await connection.execute(
            select(Sender.id, Sender.smtp_password)
            .where(Sender.id > after_id, _STORED)
            .order_by(Sender.id)
            .limit(limit)
            .with_for_update(key_share=True)
        )
    ).all()
    changes, unreadable = [], []
    for sender_id, token in rows:
        try:
            renewed = secrets.rotate(token)
        except FailedPrecondition:
            unreadable.append(sender_id)
            continue
        if renewed is not None:
            changes.append({"rotated_id": sender_id, "token": renewed})
    if changes:
        await connection.execute(
            update(Sender)
            .where(Sender.id == bindparam("rotated_id"))
            .values(smtp_password=bindparam("token")),
            changes,
        )
    return RotatedChunk(len(rows), len(changes), unreadable, rows[-1].id if rows else None)
