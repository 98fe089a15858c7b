"""The SQL of posting to webhooks: which have work, their leases, and their failed deliveries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Select,
    any_,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition
from outbox_server.services.scheduler.storage.webhooks import (
    WEBHOOK_COLUMNS,
    WebhookRecord,
    soon,
    webhook_of,
)
from outbox_server.shared.database.models import JobEvent, WebhookDeliveryRow, WebhookRow
from outbox_server.shared.events.storage import between, event_place
from outbox_server.shared.filters.fields import Filter
from outbox_server.shared.filters.resources import DeliveryState

# A webhook with this many deliveries that will be tried again gets no new ones.
MOST_PENDING: Final = 20
# A webhook whose requests have all failed for this time is disabled.
GIVE_UP_AFTER: Final = timedelta(days=5)


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A delivery that has failed."""

    delivery_id: int
    webhook_id: int
    after_event: int
    last_event: int
    event_count: int
    attempts: int
    created_at: datetime
    next_at: datetime | None
    http_status: int | None
    error: str


_DELIVERY: Final[tuple[Any, ...]] = (
    WebhookDeliveryRow.id,
    WebhookDeliveryRow.webhook_id,
    WebhookDeliveryRow.after_event,
    WebhookDeliveryRow.last_event,
    WebhookDeliveryRow.event_count,
    WebhookDeliveryRow.attempts,
    WebhookDeliveryRow.created_at,
    WebhookDeliveryRow.next_at,
    WebhookDeliveryRow.http_status,
    WebhookDeliveryRow.error,
)


def _delivery(row: Any) -> DeliveryRecord:
    return DeliveryRecord(*row)


_LEAVES: Final[Mapping[str, Leaf]] = {
    "state": column(
        case(
            (WebhookDeliveryRow.next_at.is_not(None), int(DeliveryState.PENDING)),
            else_=int(DeliveryState.FAILED),
        )
    ),
    # Compared as the largest type, because a filter may have any number.
    "event_count": column(cast(WebhookDeliveryRow.event_count, BigInteger)),
    "attempt_count": column(cast(WebhookDeliveryRow.attempts, BigInteger)),
    "http_status": column(func.coalesce(cast(WebhookDeliveryRow.http_status, BigInteger), 0)),
    "create_time": column(WebhookDeliveryRow.created_at),
    "next_attempt_time": column(WebhookDeliveryRow.next_at, nullable=True),
}


async def list_deliveries(
    connection: AsyncConnection,
    webhook_id: int,
    tree: Filter | None,
    after: int,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[DeliveryRecord], int | None]:
    """Return the first failed deliveries of a webhook after an id that match.

    Check its owner before. If there are fewer than `limit`, although more may follow, the id where
    to continue is returned too.
    """
    key = WebhookDeliveryRow.id
    rows: Select[Any] = select(*_DELIVERY).where(
        WebhookDeliveryRow.webhook_id == webhook_id, key < after if descending else key > after
    )
    matches = None if tree is None else condition(tree, _LEAVES)
    found = await search(connection, rows, key, matches, limit, descending=descending)
    return [_delivery(row) for row in found.rows], found.reached


async def redeliver(connection: AsyncConnection, webhook_id: int, delivery_id: int | None) -> int:
    """Try deliveries again from now on: one, or all that were given up. Return how many."""
    which = WebhookDeliveryRow.webhook_id == webhook_id
    if delivery_id is None:
        which &= WebhookDeliveryRow.next_at.is_(None)
    else:
        which &= WebhookDeliveryRow.id == delivery_id
    moved = await connection.execute(
        update(WebhookDeliveryRow).where(which).values(next_at=func.now(), attempts=0)
    )
    if moved.rowcount:
        await connection.execute(
            update(WebhookRow).where(WebhookRow.id == webhook_id).values(next_at=soon())
        )
    return moved.rowcount


async def remove_old_deliveries(
    connection: AsyncConnection, older_than: timedelta, limit: int
) -> int:
    """Remove failed deliveries whose events are removed. Return how many were removed."""
    old = (
        select(WebhookDeliveryRow.id)
        .where(WebhookDeliveryRow.created_at < func.now() - literal(older_than, INTERVAL))
        .order_by(WebhookDeliveryRow.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    removed = await connection.execute(
        delete(WebhookDeliveryRow).where(WebhookDeliveryRow.id.in_(old))
    )
    return removed.rowcount


@dataclass(frozen=True, slots=True)
class WaitingWebhook:
    """A webhook with something to post."""

    webhook_id: int
    user_id: str
    # Since when it may be worked on.
    next_at: datetime
    # Whether there is something to post.
    has_work: bool


_DUE_DELIVERY: Final = (
    select(WebhookDeliveryRow.id)
    .where(
        WebhookDeliveryRow.webhook_id == WebhookRow.id,
        WebhookDeliveryRow.next_at <= func.statement_timestamp(),
    )
    .correlate(WebhookRow)
)


async def find_work(
    connection: AsyncConnection, after: int, horizon: int, limit: int
) -> Sequence[WaitingWebhook]:
    """Return the first webhooks after an id, and whether each has something to post."""
    # This is not EXISTS, which has no order and may therefore read the events of all users.
    event = (
        select(JobEvent.id)
        .where(*between(WebhookRow.user_id, WebhookRow.after_event, literal(horizon, BigInteger)))
        .order_by(*event_place)
        .limit(1)
        .correlate(WebhookRow)
        .scalar_subquery()
    )
    rests = WebhookRow.disabled | (WebhookRow.next_at > func.statement_timestamp())
    rows = await connection.execute(
        select(
            WebhookRow.id,
            WebhookRow.user_id,
            WebhookRow.next_at,
            (~rests & or_(event.is_not(None), _DUE_DELIVERY.exists())).label("has_work"),
        )
        .where(WebhookRow.id > after)
        .order_by(WebhookRow.id)
        .limit(limit)
    )
    return [WaitingWebhook(*row) for row in rows]


async def claim(
    connection: AsyncConnection, webhook_ids: Collection[int], lease: timedelta
) -> Sequence[WebhookRecord]:
    """Lease webhooks that no other process has leased meanwhile."""
    statement = (
        update(WebhookRow)
        .where(
            WebhookRow.id == any_(literal(list(webhook_ids), ARRAY(BigInteger))),
            WebhookRow.next_at <= func.statement_timestamp(),
            WebhookRow.disabled.is_(False),
        )
        .values(next_at=func.statement_timestamp() + literal(lease, INTERVAL))
        .returning(*WEBHOOK_COLUMNS)
    )
    return [webhook_of(row) for row in await connection.execute(statement)]


async def read_due_delivery(
    connection: AsyncConnection, webhook_id: int
) -> tuple[DeliveryRecord | None, int]:
    """Return the delivery to try again first, and how many will be tried again."""
    mine = WebhookDeliveryRow.webhook_id == webhook_id
    due = WebhookDeliveryRow.next_at <= func.statement_timestamp()
    row = (
        await connection.execute(
            select(*_DELIVERY).where(mine, due).order_by(WebhookDeliveryRow.next_at).limit(1)
        )
    ).one_or_none()
    waiting = select(func.count()).where(mine, WebhookDeliveryRow.next_at.is_not(None))
    return None if row is None else _delivery(row), await connection.scalar(waiting) or 0


async def advance(connection: AsyncConnection, webhook: WebhookRecord, after_event: int) -> bool:
    """Store the new position of a leased webhook. Return False if it must get no more events.

    Its lease may have expired, and its user may have changed, disabled or deleted it.
    """
    moved = await connection.execute(
        update(WebhookRow)
        .where(
            WebhookRow.id == webhook.webhook_id,
            WebhookRow.next_at == webhook.next_at,
            WebhookRow.revision == webhook.revision,
        )
        .values(after_event=after_event)
    )
    return bool(moved.rowcount)


async def release(
    connection: AsyncConnection,
    webhook: WebhookRecord,
    *,
    after_event: int,
    pause: timedelta = timedelta(0),
    succeeded: bool | None = None,
    error: str = "",
    disable: bool = False,
) -> bool:
    """End a lease, with the new position. Return False if the lease had expired.

    `succeeded` None means that nothing was posted.
    """
    values: dict[str, Any] = {
        "after_event": after_event,
        "next_at": func.statement_timestamp() + literal(pause, INTERVAL),
    }
    if succeeded:
        values |= {"failures": 0, "failing_since": None, "error": None}
    elif succeeded is False:
        since = func.coalesce(WebhookRow.failing_since, func.statement_timestamp())
        given_up = since < func.statement_timestamp() - literal(GIVE_UP_AFTER, INTERVAL)
        values |= {
            "failures": WebhookRow.failures + 1,
            "failing_since": since,
            "error": error,
            # Its user may have disabled it during the request.
            "disabled": True if disable else WebhookRow.disabled | given_up,
        }
    done = await connection.execute(
        update(WebhookRow)
        .where(WebhookRow.id == webhook.webhook_id, WebhookRow.next_at == webhook.next_at)
        .values(values)
    )
    return bool(done.rowcount)


async def add_delivery(
    connection: AsyncConnection, delivery: DeliveryRecord, wait: timedelta | None
) -> None:
    """Store a delivery that has failed."""
    at = None if wait is None else func.statement_timestamp() + literal(wait, INTERVAL)
    await connection.execute(
        insert(WebhookDeliveryRow).values(
            id=delivery.delivery_id,
            webhook_id=delivery.webhook_id,
            after_event=delivery.after_event,
            last_event=delivery.last_event,
            event_count=delivery.event_count,
            next_at=at,
            http_status=delivery.http_status,
            error=delivery.error,
        )
    )


async def end_delivery(connection: AsyncConnection, delivery_id: int) -> None:
    """Forget a delivery that has succeeded at last."""
    await connection.execute(delete(WebhookDeliveryRow).where(WebhookDeliveryRow.id == delivery_id))


async def fail_delivery(
    connection: AsyncConnection,
    delivery_id: int,
    wait: timedelta | None,
    http_status: int | None,
    error: str,
) -> None:
    """Record another failed try. If `wait` is None, the delivery is given up."""
    at = None if wait is None else func.statement_timestamp() + literal(wait, INTERVAL)
    await connection.execute(
        update(WebhookDeliveryRow)
        .where(WebhookDeliveryRow.id == delivery_id)
        .values(
            attempts=WebhookDeliveryRow.attempts + 1,
            next_at=at,
            http_status=http_status,
            error=error,
        )
    )
