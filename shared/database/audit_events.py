"""The log of what operators changed. An event is written in the transaction of its change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import AuditEvent


@dataclass(frozen=True, slots=True)
class RecordedChange:
    """One change: who did what to which target, when, and the values before and after."""

    actor: str
    action: str
    target: str = ""
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    # Set by PostgreSQL.
    happened_at: datetime | None = None


async def record_change(connection: AsyncConnection, change: RecordedChange) -> None:
    """Append a change, within the transaction that makes it."""
    await connection.execute(
        insert(AuditEvent).values(
            actor=change.actor,
            action=change.action,
            target=change.target,
            before=None if change.before is None else dict(change.before),
            after=None if change.after is None else dict(change.after),
        )
    )


async def read_changes(
    connection: AsyncConnection, action: str, limit: int
) -> Sequence[RecordedChange]:
    """Return the last changes of one kind, the newest first."""
    rows = await connection.execute(
        select(
            AuditEvent.actor,
            AuditEvent.action,
            AuditEvent.target,
            AuditEvent.before,
            AuditEvent.after,
            AuditEvent.happened_at,
        )
        .where(AuditEvent.action == action)
        .order_by(AuditEvent.id.desc())
        .limit(limit)
    )
    return [RecordedChange(*row) for row in rows]
