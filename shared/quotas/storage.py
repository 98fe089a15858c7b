"""Reads the quotas and domains of users, and enforces the quotas that count rows.

These quotas are exact. A transaction that adds rows locks the user, counts the rows, and holds the
lock until it commits. So two transactions of one user never count at the same time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Integer, delete, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.counts import user_counts
from outbox_server.shared.database.models import (
    BatchRejection,
    JobChange,
    JobEventCount,
    Sender,
    Suppression,
    SuppressionCount,
    UserRow,
    WebhookRow,
)
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.states import JobChangeKind
from outbox_server.shared.user_quotas import QUOTAS, UserQuotas

# The first half of the keys of the advisory locks on users. Any number would do.
_LOCK_SPACE: Final = 0x5551

# The overrides, for statements that join the table.
QUOTA_COLUMNS: Final = tuple(getattr(UserRow, name) for name in QUOTAS)


def quotas_of(row: Any, defaults: UserQuotas) -> UserQuotas:
    """Return the quotas of a row with QUOTA_COLUMNS."""
    return defaults.overridden({name: getattr(row, name) for name in QUOTAS})


def user_lock(user_id: Any) -> tuple[ColumnElement[int], ColumnElement[int]]:
    """Return the key of the advisory lock on the counted rows of a user."""
    return literal(_LOCK_SPACE, Integer), func.hashtext(user_id)


async def lock_user(connection: AsyncConnection, user_id: str) -> None:
    """Lock a user's counted rows against other additions, until the end of the transaction.

    Take this lock before locks on rows. A different order could cause deadlocks.
    """
    lock = func.pg_advisory_xact_lock(*user_lock(literal(owner_of(user_id))))
    await connection.execute(select(lock))


async def read_quotas(
    connection: AsyncConnection, user_id: str, defaults: UserQuotas
) -> UserQuotas:
    """Return the current quotas of a user, from the database and not from a cache."""
    statement = owned_by(select(*QUOTA_COLUMNS), UserRow.user_id, user_id)
    row = (await connection.execute(statement)).one_or_none()
    return defaults if row is None else quotas_of(row, defaults)


async def read_unproven_endpoints(connection: AsyncConnection) -> dict[str, int]:
    """Return the overrides of `unproven_endpoints` by user."""
    column = UserRow.unproven_endpoints
    statement = select(UserRow.user_id, column).where(column.is_not(None))
    rows = await connection.execute(owned_by(statement, UserRow.user_id, None))
    return {row.user_id: row.unproven_endpoints for row in rows}


async def read_domains(connection: AsyncConnection, user_id: str) -> Sequence[str]:
    """Return the domains that are assigned to a user."""
    statement = owned_by(select(UserRow.sender_domains), UserRow.user_id, user_id)
    return await connection.scalar(statement) or ()


@dataclass(frozen=True, slots=True)
class UserUsage:
    """The current numbers of a user that quotas of the installation limit."""

    waiting_jobs: int
    senders: int
    stored_rejections: int
    stored_events: int
    suppressions: int
    webhooks: int


async def read_usage(connection: AsyncConnection, user_id: str) -> UserUsage:
    """Return the current numbers of a user. Jobs that are being sent count as waiting."""
    stored = owned_by(select(UserRow.stored_rejections_count), UserRow.user_id, user_id)
    events = owned_by(select(JobEventCount.n), JobEventCount.user_id, user_id)
    suppressions = owned_by(select(SuppressionCount.n), SuppressionCount.user_id, user_id)
    return UserUsage(
        waiting_jobs=(await user_counts(connection, user_id)).open,
        senders=await _count_senders(connection, user_id),
        stored_rejections=await connection.scalar(stored) or 0,
        stored_events=await connection.scalar(events) or 0,
        suppressions=await connection.scalar(suppressions) or 0,
        webhooks=await _count_webhooks(connection, user_id),
    )


async def check_waiting_jobs(
    connection: AsyncConnection, user_id: str, more: int, quotas: UserQuotas, *, added: bool = False
) -> None:
    """Check that a user may have `more` waiting jobs. The user must be locked.

    `added` says that this transaction has added them already. Failed jobs whose retry is stored
    count as waiting.

    Raises:
        ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
    """
    current = (await user_counts(connection, user_id)).open
    current += await _count_retries(connection, user_id)
    current -= more if added else 0
    refusal = quotas.exceeded("waiting_jobs", user_id, current, more)
    if refusal is not None:
        raise refusal


async def _count_retries(connection: AsyncConnection, user_id: str) -> int:
    """Return how many jobs of a user are retried by changes that are not written yet."""
    senders = select(Sender.id).where(Sender.user_id == user_id)
    retries = select(func.coalesce(func.sum(JobChange.n), 0)).where(
        JobChange.kind == int(JobChangeKind.RETRY), JobChange.sender_id.in_(senders)
    )
    return int(await connection.scalar(retries) or 0)


async def _lock_and_check(
    connection: AsyncConnection,
    user_id: str,
    defaults: UserQuotas,
    quota: str,
    count: Callable[[AsyncConnection, str], Awaitable[int]],
) -> None:
    await lock_user(connection, user_id)
    quotas = await read_quotas(connection, user_id, defaults)
    refusal = quotas.exceeded(quota, user_id, await count(connection, user_id))
    if refusal is not None:
        raise refusal


async def lock_and_check_senders(
    connection: AsyncConnection, user_id: str, defaults: UserQuotas
) -> None:
    """Lock the user, and check that it may have one more sender.

    Raises:
        ResourceExhausted: USER_SENDERS_EXCEEDED.
    """
    await _lock_and_check(connection, user_id, defaults, "senders", _count_senders)


async def lock_and_check_webhooks(
    connection: AsyncConnection, user_id: str, defaults: UserQuotas
) -> None:
    """Lock the user, and check that it may have one more webhook.

    Raises:
        ResourceExhausted: USER_WEBHOOKS_EXCEEDED.
    """
    await _lock_and_check(connection, user_id, defaults, "webhooks", _count_webhooks)


async def check_suppressions(
    connection: AsyncConnection, user_id: str, more: int, defaults: UserQuotas
) -> None:
    """Check that a user may have `more` suppressions. The user's suppressions must be locked.

    Raises:
        ResourceExhausted: USER_SUPPRESSIONS_EXCEEDED.
    """
    stored = owned_by(select(SuppressionCount.n), SuppressionCount.user_id, user_id)
    current = await connection.scalar(stored)
    if current is None:
        # This happens once per user. From now on, triggers count.
        counted = owned_by(select(func.count()), Suppression.user_id, user_id)
        current = await connection.scalar(counted) or 0
        await connection.execute(
            insert(SuppressionCount).values(user_id=owner_of(user_id), n=current)
        )
    quotas = await read_quotas(connection, user_id, defaults)
    refusal = quotas.exceeded("suppressions", user_id, current, more)
    if refusal is not None:
        raise refusal


async def room_for_rejections(connection: AsyncConnection, user_id: str, quotas: UserQuotas) -> int:
    """Return how many more rejections of a user can be stored."""
    before = select(UserRow.stored_rejections_count).where(UserRow.user_id == user_id)
    return max(quotas.stored_rejections - (await connection.scalar(before) or 0), 0)


async def store_rejections(
    connection: AsyncConnection, user_id: str, batch_id: int, quotas: UserQuotas
) -> int:
    """Count the stored rejections of a new batch, and remove those above the user's quota.

    Return how many were removed. The last ones of the batch are removed. The user must be locked.
    """
    of_batch = BatchRejection.batch_id == batch_id
    stored = await connection.scalar(select(func.count()).where(of_batch)) or 0
    if not stored:
        return 0
    room = await room_for_rejections(connection, user_id, quotas)
    if room < stored:
        first = (
            select(BatchRejection.row_number)
            .where(of_batch)
            .order_by(BatchRejection.row_number)
            .offset(room)
            .limit(1)
        )
        await connection.execute(
            delete(BatchRejection).where(
                of_batch, BatchRejection.row_number >= first.scalar_subquery()
            )
        )
    kept = min(stored, room)
    if kept:
        count = UserRow.stored_rejections_count
        await connection.execute(
            insert(UserRow)
            .values(user_id=user_id, stored_rejections_count=kept)
            .on_conflict_do_update(
                index_elements=[UserRow.user_id], set_={count.name: count + kept}
            )
        )
    return stored - kept


async def _count_senders(connection: AsyncConnection, user_id: str) -> int:
    statement = select(func.count()).where(Sender.deleted_at.is_(None))
    count: int = (
        await connection.execute(owned_by(statement, Sender.user_id, user_id))
    ).scalar_one()
    return count


async def _count_webhooks(connection: AsyncConnection, user_id: str) -> int:
    statement = owned_by(select(func.count()), WebhookRow.user_id, user_id)
    return await connection.scalar(statement) or 0
