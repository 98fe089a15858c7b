"""The table of suppressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, Text, delete, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.cancelling import EndedJobs, end_waiting
from outbox_server.services.scheduler.storage.email_jobs import is_to
from outbox_server.shared.database.erased_keys import erased_key
from outbox_server.shared.database.models import Batch, EmailJob, Suppression
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.states import JobState

# The first half of the keys of the advisory locks on a user's suppressions. Any number would do.
_LOCK_SPACE: Final = 0x5355


@dataclass(frozen=True, slots=True)
class SuppressionRecord:
    """A stored suppression."""

    user_id: str
    address: str
    reason: str
    created_at: datetime


SUPPRESSION_COLUMNS: Final = (
    Suppression.user_id,
    Suppression.address,
    Suppression.reason,
    Suppression.created_at,
)


async def lock_suppressions(
    connection: AsyncConnection, user_id: str, *, shared: bool = False
) -> None:
    """Lock the user's suppressions against new ones, until the end of the transaction.

    A new suppression takes an exclusive lock, and then ends the waiting jobs that it can see. An
    intake takes a shared lock right before its commit, and then searches for suppressions that it
    has missed. So one of the two sees the other.
    """
    lock = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
    await connection.execute(select(lock(_LOCK_SPACE, func.hashtext(owner_of(user_id)))))


def _names(user_id: str, address: str) -> ColumnElement[bool]:
    """Return the condition that a suppression has this case-folded address, or its hash."""
    return Suppression.address.in_([literal(address, Text), erased_key(user_id, address)])


async def insert_suppression(
    connection: AsyncConnection, user_id: str, address: str, reason: str
) -> tuple[SuppressionRecord, EndedJobs]:
    """Suppress a case-folded address, and end the waiting jobs to it.

    If the address is suppressed already, that suppression is kept, also if it has only the hash of
    the address because the person was erased.
    """
    await lock_suppressions(connection, user_id)
    stored = await connection.scalar(
        owned_by(
            select(Suppression.address).where(_names(user_id, address)),
            Suppression.user_id,
            user_id,
        )
    )
    await connection.execute(
        insert(Suppression)
        .values(
            user_id=user_id,
            address=stored or address,
            reason=reason,
            # Not now(): the transaction may have begun long before it got the lock.
            created_at=func.clock_timestamp(),
        )
        .on_conflict_do_nothing()
    )
    row = (
        await connection.execute(
            owned_by(
                select(*SUPPRESSION_COLUMNS).where(Suppression.address == (stored or address)),
                Suppression.user_id,
                user_id,
            )
        )
    ).one()
    owned = owned_by(select(Batch.id).where(Batch.id == EmailJob.batch_id), Batch.user_id, user_id)
    moved = await end_waiting(
        connection, is_to(address) & owned.correlate(EmailJob).exists(), JobState.SUPPRESSED
    )
    return SuppressionRecord(*row), moved


async def delete_suppression(connection: AsyncConnection, user_id: str, address: str) -> bool:
    """Delete a suppression. Return False if there was none.

    It takes the lock too: otherwise it could run between the two statements of
    `insert_suppression`.
    """
    await lock_suppressions(connection, user_id)
    statement = owned_by(
        delete(Suppression).where(_names(user_id, address)), Suppression.user_id, user_id
    )
    return (await connection.execute(statement)).rowcount > 0


async def list_suppressions(
    connection: AsyncConnection, user_id: str, after: str, limit: int
) -> Sequence[SuppressionRecord]:
    """Return the user's first `limit` suppressions after the address `after`."""
    statement = owned_by(
        select(*SUPPRESSION_COLUMNS)
        .where(Suppression.address > after)
        .order_by(Suppression.address)
        .limit(limit),
        Suppression.user_id,
        user_id,
    )
    return [SuppressionRecord(*row) for row in await connection.execute(statement)]
