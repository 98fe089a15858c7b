"""The statements on the quotas and domains that operators have set for users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import Sender, UserRow
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.quotas.storage import QUOTA_COLUMNS
from outbox_server.shared.user_quotas import QUOTAS


@dataclass(frozen=True, slots=True)
class UserRecord:
    """The settings of a user. `overrides` has None for each quota with its default."""

    user_id: str
    overrides: Mapping[str, int | None]
    # Limits of all its senders together; None means the default.
    hourly_limit: int | None = None
    min_gap_ms: int | None = None
    sender_domains: Sequence[str] = ()
    updated_at: datetime | None = None


_COLUMNS = (
    UserRow.user_id,
    *QUOTA_COLUMNS,
    UserRow.hourly_limit,
    UserRow.min_gap_ms,
    UserRow.sender_domains,
    UserRow.updated_at,
)


def _record(row: Any) -> UserRecord:
    overrides = {name: getattr(row, name) for name in QUOTAS}
    return UserRecord(
        row.user_id,
        overrides,
        row.hourly_limit,
        row.min_gap_ms,
        row.sender_domains,
        row.updated_at,
    )


async def read_user(connection: AsyncConnection, user_id: str) -> UserRecord:
    """Return a user. One without a row has no overrides."""
    statement = owned_by(select(*_COLUMNS), UserRow.user_id, user_id)
    row = (await connection.execute(statement)).one_or_none()
    return UserRecord(user_id, dict.fromkeys(QUOTAS)) if row is None else _record(row)


async def list_users(connection: AsyncConnection, after: str, limit: int) -> Sequence[UserRecord]:
    """Return the first `limit` users after `after` that an operator has changed."""
    statement = owned_by(
        select(*_COLUMNS)
        .where(UserRow.user_id > after, UserRow.updated_at.is_not(None))
        .order_by(UserRow.user_id)
        .limit(limit),
        UserRow.user_id,
        None,
    )
    return [_record(row) for row in await connection.execute(statement)]


async def update_user(connection: AsyncConnection, user_id: str, values: Mapping[str, Any]) -> None:
    """Change the given columns of a user. None in the column of a quota means the default."""
    changes = {**values, "updated_at": func.now()}
    statement = (
        insert(UserRow)
        .values(user_id=owner_of(user_id), **changes)
        .on_conflict_do_update(index_elements=[UserRow.user_id], set_=changes)
    )
    await connection.execute(statement)


async def mark_senders_stale(connection: AsyncConnection, user_id: str) -> Sequence[int]:
    """Request a load of all senders of a user, because its limits change. Return the senders."""
    statement = owned_by(select(Sender.id).order_by(Sender.id), Sender.user_id, user_id)
    sender_ids = (await connection.execute(statement)).scalars().all()
    if sender_ids:
        await mark_stale(connection, sender_ids)
    return sender_ids
