"""Removes old requests that changed something, and old events of the audit log."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    and_,
    cast,
    delete,
    extract,
    func,
    select,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute

from outbox_server.shared.database.models import AuditEvent, ChangeRequest
from outbox_server.shared.database.ownership import owned_by

_KEYS: Final[dict[type, tuple[str, ...]]] = {
    ChangeRequest: ("scope", "request_id"),
    AuditEvent: ("id",),
}
# The actions that accept a batch.
ACCEPTING: Final = frozenset({"ScheduleBatch", "UploadBatch", "UploadBatchFile", "SendTestEmail"})


def next_revision(revision: InstrumentedAttribute[int]) -> ColumnElement[int]:
    """Return a revision that no other change has, even one that a failover has lost."""
    microseconds = cast(extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger)
    return func.greatest(revision + 1, microseconds)


async def forget_address(connection: AsyncConnection, user_id: str, address_key: str) -> None:
    """Remove the requests about one recipient of a user, for an erasure.

    A call that repeats one of them is made again.
    """
    named = func.strpos(func.lower(ChangeRequest.request_id), address_key) > 0
    statement = delete(ChangeRequest).where((ChangeRequest.address_key == address_key) | named)
    await connection.execute(owned_by(statement, ChangeRequest.user_id, user_id))


async def remove_requests(connection: AsyncConnection, older_than: timedelta, limit: int) -> int:
    """Remove the oldest requests, at most `limit`. Return how many were removed."""
    old = ChangeRequest.created_at < func.now() - older_than
    return await _remove(connection, ChangeRequest, old, ChangeRequest.created_at, limit)


async def remove_surplus_requests(connection: AsyncConnection, most: int, limit: int) -> int:
    """Remove the oldest requests of a scope that has more than `most`. Return how many."""
    share = (ChangeRequest.scope,)
    return await _remove_surplus(
        connection, ChangeRequest, share, ChangeRequest.created_at, most, limit
    )


async def remove_events(connection: AsyncConnection, older_than: timedelta, limit: int) -> int:
    """Remove the oldest events of the audit log, at most `limit`. Return how many were removed."""
    old = AuditEvent.happened_at < func.now() - older_than
    return await _remove(connection, AuditEvent, old, AuditEvent.happened_at, limit)


async def remove_surplus_events(connection: AsyncConnection, most: int, limit: int) -> int:
    """Remove the oldest events of an actor that changed a user's data more than `most` times.

    Each actor has a share of its own, so that no user can push out what an operator did. Accepted
    batches have a separate share, so that a program that schedules each mail alone does not push
    out rare changes. Return how many were removed.
    """
    accepted = AuditEvent.action.in_(sorted(ACCEPTING))
    share = AuditEvent.user_id, AuditEvent.actor, accepted
    return await _remove_surplus(connection, AuditEvent, share, AuditEvent.happened_at, most, limit)


async def _remove_surplus(  # noqa: PLR0917 - two tables with their own columns
    connection: AsyncConnection,
    table: type[ChangeRequest | AuditEvent],
    share: Sequence[ColumnElement[Any] | InstrumentedAttribute[Any]],
    time: InstrumentedAttribute[datetime],
    most: int,
    limit: int,
) -> int:
    """Remove the oldest rows of one share that has more than `most`.

    A share is the rows with equal values in the columns `share`. Rows with NULL in the first of
    them are kept.
    """
    crowded = select(*share).where(share[0].is_not(None))
    crowded = crowded.group_by(*share).having(func.count() > most)
    found = (await connection.execute(crowded.limit(1))).one_or_none()
    if found is None:
        return 0
    its = and_(*(column == value for column, value in zip(share, found, strict=True)))
    newest = select(time).where(its).order_by(time.desc())
    first_kept = newest.offset(most - 1).limit(1).scalar_subquery()
    return await _remove(connection, table, and_(its, time < first_kept), time, limit)


async def _remove(
    connection: AsyncConnection,
    table: type[ChangeRequest | AuditEvent],
    which: ColumnElement[bool],
    order: InstrumentedAttribute[datetime],
    limit: int,
) -> int:
    key = [table.__table__.c[name] for name in _KEYS[table]]
    some = select(*key).where(which).order_by(order).limit(limit).with_for_update(skip_locked=True)
    removed = await connection.execute(delete(table).where(tuple_(*key).in_(some)))
    return removed.rowcount
