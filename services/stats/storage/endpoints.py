"""Reads the recent counts of the running dispatchers at SMTP endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import DispatcherRow, EndpointReportRow
from outbox_server.shared.database.ownership import owned_by

# The maximum number of rows that are read. An operator's list of a large installation is cut.
_MOST_READ: Final = 20_000
_LIVE_FOR: Final = timedelta(seconds=20)


@dataclass(slots=True)
class EndpointCounts:
    """The counts of an endpoint, of all dispatchers together. The relay has no user."""

    user_id: str
    host: str
    port: int
    # Indexed by the number of the reply class; 0 means no reply.
    replies: Sequence[int]
    # Indexed by the bucket of the latency (`shared.smtp.latencies`).
    latencies: Sequence[int]
    circuit_open_at: datetime | None
    next_probe_at: datetime | None
    dispatchers: int = 1


async def read_endpoints(
    connection: AsyncConnection, user_id: str | None
) -> Sequence[EndpointCounts]:
    """Return the endpoints of a user (None: of all users), those with the most attempts first."""
    row = EndpointReportRow
    statement: Any = (
        select(
            row.user_id,
            row.host,
            row.port,
            row.replies,
            row.latencies,
            row.circuit_open_at,
            row.next_probe_at,
        )
        .join(DispatcherRow, DispatcherRow.id == row.dispatcher)
        .where(DispatcherRow.seen_at > func.now() - _LIVE_FOR, DispatcherRow.stopped_at.is_(None))
        .limit(_MOST_READ)
    )
    found: dict[tuple[str, str, int], EndpointCounts] = {}
    for each in await connection.execute(owned_by(statement, row.user_id, user_id)):
        key = (each.user_id, each.host, each.port)
        known = found.get(key)
        if known is None:
            found[key] = EndpointCounts(*each)
            continue
        known.replies = _sum(known.replies, each.replies)
        known.latencies = _sum(known.latencies, each.latencies)
        known.dispatchers += 1
        if known.circuit_open_at is None:
            known.circuit_open_at = each.circuit_open_at
            known.next_probe_at = each.next_probe_at
    return sorted(found.values(), key=lambda one: (-sum(one.replies), one.host, one.port))


def _sum(some: Sequence[int], others: Sequence[int]) -> list[int]:
    # A release with more classes may run at the same time.
    size = max(len(some), len(others))
    padded = ([*each, *[0] * (size - len(each))] for each in (some, others))
    return [a + b for a, b in zip(*padded, strict=True)]
