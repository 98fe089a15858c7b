"""The heartbeat: where and when mail could last be sent.

`written_by` is the transaction that wrote the row, as is the system column `xmin`. In a database
that was restored from a dump, or copied by logical replication, another transaction has written the
row, so the two differ. Copies of the files, such as replicas and `pg_basebackup`, keep both.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import (
    BigInteger,
    Text,
    cast,
    func,
    literal_column,
    null,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import Heartbeat

# `xmin` has 32 bits, without the epoch.
_XIDS: Final = 2**32
_FUNCTIONS: Final = ("pg_control_system()", "pg_current_wal_lsn()", "pg_walfile_name(pg_lsn)")


@dataclass(frozen=True, slots=True)
class StoredBeat:
    """The heartbeat in PostgreSQL. `original`: the row was not copied by a restore."""

    number: int
    at: datetime
    original: bool
    system_identifier: int | None
    timeline: int


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What this PostgreSQL is, and its time. What the role may not read is None or 0."""

    now: datetime
    system_identifier: int | None
    timeline: int


async def readable_functions(connection: AsyncConnection) -> frozenset[str]:
    """Return the functions of `read_identity` that the role may call. By default all may."""
    rights = select(*(func.has_function_privilege(name, "EXECUTE") for name in _FUNCTIONS))
    found = (await connection.execute(rights)).one()
    return frozenset(name for name, may in zip(_FUNCTIONS, found, strict=True) if may)


async def read_identity(connection: AsyncConnection, readable: frozenset[str]) -> ServerIdentity:
    """Return what this PostgreSQL is."""
    identifier = (
        select(literal_column("system_identifier")).select_from(func.pg_control_system())
    ).scalar_subquery()
    # The name of a WAL file begins with the timeline, in eight hexadecimal digits. Right after a
    # promotion it is newer than that of pg_control_checkpoint().
    wal = func.pg_walfile_name(func.pg_current_wal_lsn())
    row = (
        await connection.execute(
            select(
                func.clock_timestamp().label("now"),
                (identifier if _FUNCTIONS[0] in readable else null()).label("identifier"),
                (wal if readable.issuperset(_FUNCTIONS[1:]) else null()).label("wal"),
            )
        )
    ).one()
    return ServerIdentity(row.now, row.identifier, int(row.wal[:8], 16) if row.wal else 0)


async def read_heartbeat(connection: AsyncConnection) -> StoredBeat | None:
    """Return the heartbeat, locked until the end of the transaction; None before the first one."""
    written_by = cast(cast(literal_column("heartbeat.xmin"), Text), BigInteger)
    row = (
        await connection.execute(
            select(
                Heartbeat.number,
                Heartbeat.beat_at,
                (Heartbeat.written_by == written_by).label("original"),
                Heartbeat.system_identifier,
                Heartbeat.timeline,
            ).with_for_update()
        )
    ).one_or_none()
    if row is None:
        return None
    return StoredBeat(row.number, row.beat_at, row.original, row.system_identifier, row.timeline)


async def write_heartbeat(
    connection: AsyncConnection, number: int, identity: ServerIdentity
) -> None:
    """Write the heartbeat. The transaction must have no savepoint, which has an id of its own."""
    values = {
        "number": number,
        "beat_at": identity.now,
        "written_by": func.mod(func.txid_current(), _XIDS),
        "system_identifier": identity.system_identifier,
        "timeline": identity.timeline,
    }
    await connection.execute(
        insert(Heartbeat)
        .values(values)
        .on_conflict_do_update(index_elements=[Heartbeat.singleton], set_=values)
    )
