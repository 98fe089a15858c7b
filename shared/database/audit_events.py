"""The log of changes: who, when, what. An event is written in the transaction of its change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import Text, cast, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.bounds import MAX_AUDITED_TEXT
from outbox_server.shared.database.models import AuditEvent
from outbox_server.shared.database.ownership import owned_by


@dataclass(frozen=True, slots=True)
class RecordedChange:
    """One change: who did what to which target, when, and the values before and after."""

    actor: str
    action: str
    target: str = ""
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    # The fields below are set by PostgreSQL, or for calls only.
    happened_at: datetime | None = None
    event_id: int = 0
    identity: str = ""
    reason: str = ""
    user_id: str | None = None


# In the order of the fields of RecordedChange.
CHANGE_COLUMNS: Final = (
    AuditEvent.actor,
    AuditEvent.action,
    AuditEvent.target,
    AuditEvent.before,
    AuditEvent.after,
    AuditEvent.happened_at,
    AuditEvent.id,
    AuditEvent.identity,
    AuditEvent.reason,
    AuditEvent.user_id,
)


def shortened_text(text: str | None) -> str | None:
    """Return a text, or its first whole words: an erasure cannot find an address that is cut."""
    if text is None or len(text) <= MAX_AUDITED_TEXT:
        return text
    words, *_ = text[: MAX_AUDITED_TEXT + 1].rsplit(None, 1)
    return f"{words if len(words) <= MAX_AUDITED_TEXT else ''}... ({len(text):,} characters)"


def change_values(change: RecordedChange, address_key: str | None = None) -> dict[str, Any]:
    """Return the row of a change. `address_key` is the key of the recipient that it is about."""
    return {
        "actor": change.actor,
        "identity": change.identity,
        "reason": change.reason,
        "action": change.action,
        "target": change.target,
        "user_id": change.user_id,
        "address_key": address_key,
        "before": None if change.before is None else dict(change.before),
        "after": None if change.after is None else dict(change.after),
    }


async def record_change(connection: AsyncConnection, change: RecordedChange) -> None:
    """Append a change, within the transaction that makes it."""
    await record_changes(connection, [(change, None)])


async def record_changes(
    connection: AsyncConnection, changes: Sequence[tuple[RecordedChange, str | None]]
) -> None:
    """Append changes, each with the key of the recipient that it is about, if there is one."""
    await connection.execute(insert(AuditEvent), [change_values(*each) for each in changes])


async def read_changes(
    connection: AsyncConnection, action: str, limit: int
) -> Sequence[RecordedChange]:
    """Return the last changes of one kind, the newest first."""
    rows = await connection.execute(
        select(*CHANGE_COLUMNS)
        .where(AuditEvent.action == action)
        .order_by(AuditEvent.id.desc())
        .limit(limit)
    )
    return [RecordedChange(*row) for row in rows]


async def erase_changes(connection: AsyncConnection, user_id: str, key: str) -> None:
    """Remove the texts about one recipient from a user's events. The events themselves stay.

    `key` is the recipient's `address_key`. It is also found as a part of a URL (`anna%40b.org`).
    """
    texts = func.concat_ws(
        " ",
        AuditEvent.identity,
        AuditEvent.reason,
        AuditEvent.target,
        cast(AuditEvent.before, Text),
        cast(AuditEvent.after, Text),
    )
    lower = func.lower(texts)
    spellings = {key, *(quote(key, safe=safe).lower() for safe in ("", "+"))}
    named = or_(*(func.strpos(lower, each) > 0 for each in sorted(spellings)))
    erased = (
        update(AuditEvent)
        .where((AuditEvent.address_key == key) | named)
        .values(target="", address_key=None, before=None, after=None, identity="", reason="")
    )
    await connection.execute(owned_by(erased, AuditEvent.user_id, user_id))
