"""The statements that begin, read and end a hold."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import BigInteger, delete, func, literal, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.counts import in_state
from outbox_server.shared.database.models import EmailJob, HeldSend, HoldRelease, HoldRow
from outbox_server.shared.holds.conditions import sender_may_send
from outbox_server.shared.states import HoldReason, JobState


@dataclass(frozen=True, slots=True)
class HoldRecord:
    """A hold of the whole installation."""

    held_at: datetime
    reason: HoldReason
    # Why the hold began, in a sentence for operators.
    detail: str


async def begin_hold(connection: AsyncConnection, reason: HoldReason, detail: str) -> bool:
    """Hold the installation, within the caller's transaction. Return False if it is held already.

    Jobs that are SENDING now are remembered: if the lease of one expires, it waits and is held.
    """
    made = await connection.scalar(
        insert(HoldRow)
        .values(reason=reason, detail=detail)
        .on_conflict_do_nothing()
        .returning(HoldRow.singleton)
    )
    if made is None:
        return False
    # Restored data may have rows of an earlier hold.
    await connection.execute(delete(HoldRelease))
    await connection.execute(delete(HeldSend))
    sending = select(EmailJob.id).where(in_state(JobState.SENDING))
    await connection.execute(insert(HeldSend).from_select(("email_job_id",), sending))
    return True


async def read_hold(connection: AsyncConnection, *, lock: bool = False) -> HoldRecord | None:
    """Return the hold, locked on demand; None if the installation is not held."""
    statement = select(HoldRow.held_at, HoldRow.reason, HoldRow.detail)
    row = (
        await connection.execute(statement.with_for_update() if lock else statement)
    ).one_or_none()
    return None if row is None else HoldRecord(row.held_at, HoldReason(row.reason), row.detail)


async def end_hold(connection: AsyncConnection) -> None:
    """End the hold: all waiting mail may be sent."""
    for table in (HoldRelease, HeldSend, HoldRow):
        await connection.execute(delete(table))


async def is_batch_held(connection: AsyncConnection, sender_id: int, batch_id: int) -> bool:
    """Return whether a hold keeps all mail of a batch from being sent."""
    sender = literal(sender_id, BigInteger)
    return not await connection.scalar(select(sender_may_send(sender, batch_id)))


async def any_open_job(connection: AsyncConnection) -> bool:
    """Return whether any job waits or is SENDING, so that it could be sent again."""
    opened = or_(
        *(
            select(literal(1)).select_from(EmailJob).where(in_state(state)).exists()
            for state in (JobState.SCHEDULED, JobState.SENDING)
        )
    )
    return bool(await connection.scalar(select(func.coalesce(opened, literal(False)))))
