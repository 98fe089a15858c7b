"""Lists the events of the audit log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import gt, lt
from typing import Any, Final, TypeAlias

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import compared, search_by
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition
from outbox_server.shared.database.audit_events import CHANGE_COLUMNS, RecordedChange
from outbox_server.shared.database.models import AuditEvent
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.filters.fields import (
    Filter,
    earliest,
    latest,
    required_value,
)

# The time and the id of an event, by which the log is ordered.
ChangePlace: TypeAlias = tuple[datetime, int]

_KEYS: Final = (AuditEvent.happened_at, AuditEvent.id)
_LEAVES: Final[Mapping[str, Leaf]] = {
    "actor": column(AuditEvent.actor),
    "identity": column(AuditEvent.identity),
    "action": column(AuditEvent.action),
    "target": column(AuditEvent.target),
    "user_id": column(AuditEvent.user_id, nullable=True),
    "event_time": column(AuditEvent.happened_at),
}
# These have an index with the keys.
_INDEXED: Final = {"target": AuditEvent.target, "user_id": AuditEvent.user_id}


@dataclass(frozen=True, slots=True)
class ChangeFilter:
    """Which changes to list. None means any."""

    user_id: str | None = None
    target: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    tree: Filter | None = None


async def list_changes(
    connection: AsyncConnection,
    which: ChangeFilter,
    after: ChangePlace | None,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[RecordedChange], ChangePlace | None]:
    """Return the first `limit` changes after a place that match, in the order of time.

    If there are fewer, although more may follow, the place where to continue is returned too.
    """
    rows: Select[Any] = select(*CHANGE_COLUMNS)
    if after is not None:
        rows = rows.where(compared(_KEYS, after, lt if descending else gt))
    if which.target is not None:
        rows = rows.where(AuditEvent.target == which.target)
    # Rows that the filter excludes in any case are not read.
    for start in (which.start, earliest(which.tree, "event_time")):
        if start is not None:
            rows = rows.where(AuditEvent.happened_at >= start)
    if which.end is not None:
        rows = rows.where(AuditEvent.happened_at < which.end)
    last = latest(which.tree, "event_time")
    if last is not None:
        rows = rows.where(AuditEvent.happened_at <= last)
    for name, stored in _INDEXED.items():
        required, value = required_value(which.tree, name)
        if required:
            rows = rows.where(stored == value)
    matches = None if which.tree is None else condition(which.tree, _LEAVES)
    found = await search_by(
        connection,
        owned_by(rows, AuditEvent.user_id, which.user_id),
        _KEYS,
        matches,
        limit,
        descending=descending,
    )
    reached = None if found.reached is None else (found.reached[0], found.reached[1])
    return [RecordedChange(*tuple(row)) for row in found.rows], reached
