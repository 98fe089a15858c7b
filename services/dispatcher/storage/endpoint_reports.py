"""What this dispatcher has lately counted at each SMTP endpoint, for StatsService."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import bindparam, delete
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher.endpoint_meter import EndpointName
from outbox_server.shared.database.models import EndpointReportRow


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """The counts of an endpoint, and its circuit; the times are None while it is closed."""

    name: EndpointName
    replies: Sequence[int]
    latencies: Sequence[int]
    circuit_open_at: datetime | None = None
    next_probe_at: datetime | None = None


async def write_endpoints(
    connection: AsyncConnection,
    number: int,
    changed: Collection[EndpointReport],
    gone: Collection[EndpointName],
) -> None:
    """Write the reports that have changed, and delete those of endpoints without attempts."""
    if changed:
        new = insert(EndpointReportRow)
        keys = ("user_id", "host", "port", "dispatcher")
        values = ("replies", "latencies", "circuit_open_at", "next_probe_at")
        await connection.execute(
            new.on_conflict_do_update(
                index_elements=keys, set_={name: new.excluded[name] for name in values}
            ),
            [
                {
                    **one.name._asdict(),
                    "dispatcher": number,
                    "replies": list(one.replies),
                    "latencies": list(one.latencies),
                    "circuit_open_at": one.circuit_open_at,
                    "next_probe_at": one.next_probe_at,
                }
                # Sorted, so that two transactions cannot deadlock.
                for one in sorted(changed, key=lambda one: one.name)
            ],
        )
    if gone:
        row = EndpointReportRow
        await connection.execute(
            delete(row).where(
                row.user_id == bindparam("u"),
                row.host == bindparam("h"),
                row.port == bindparam("p"),
                row.dispatcher == number,
            ),
            [{"u": one.user_id, "h": one.host, "p": one.port} for one in sorted(gone)],
        )
