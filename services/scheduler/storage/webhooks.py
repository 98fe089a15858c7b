"""All SQL of webhooks and their failed deliveries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import BigInteger, any_, case, delete, func, insert, literal, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import JobEvent, WebhookDeliveryRow, WebhookRow
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.events.storage import between, event_place, find_start, read_drawn
from outbox_server.shared.quotas.storage import lock_and_check_webhooks
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.states import JobState
from outbox_server.shared.user_quotas import UserQuotas

# A webhook with this many deliveries that will be tried again gets no new ones.
MOST_PENDING: Final = 20
# A webhook whose requests have all failed for this time is disabled.
GIVE_UP_AFTER: Final = timedelta(days=5)


@dataclass(frozen=True, slots=True)
class WebhookRecord:
    """A webhook."""

    webhook_id: int
    user_id: str
    url: str
    secret: bytes = field(repr=False)
    # The secret before a rotation, while it signs too.
    old_secret: bytes | None = field(repr=False)
    old_secret_until: datetime | None
    sender_id: int | None
    states: frozenset[JobState]
    disabled: bool
    revision: int
    created_at: datetime
    after_event: int
    # The end of the lease, if this process has claimed the webhook.
    next_at: datetime
    failures: int
    failing_since: datetime | None
    error: str | None

    def secrets(self, box: SecretBox) -> Sequence[str]:
        """Return the secrets that sign, the present one first.

        Raises:
            FailedPrecondition: DECRYPTION_FAILED.
        """
        stored = (self.secret,) if self.old_secret is None else (self.secret, self.old_secret)
        return [box.decrypt(each) for each in stored]


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


# A process works on a webhook for less than that (webhook_delivery.py).
LEASE: Final = timedelta(minutes=1)
_COLUMNS: Final = (
    WebhookRow.id,
    WebhookRow.user_id,
    WebhookRow.url,
    WebhookRow.secret,
    *(
        case((WebhookRow.old_secret_until > func.statement_timestamp(), value)).label(value.name)
        for value in (WebhookRow.old_secret, WebhookRow.old_secret_until)
    ),
    WebhookRow.sender_id,
    WebhookRow.states,
    WebhookRow.disabled,
    WebhookRow.revision,
    WebhookRow.created_at,
    WebhookRow.after_event,
    WebhookRow.next_at,
    WebhookRow.failures,
    WebhookRow.failing_since,
    WebhookRow.error,
)
_DELIVERY: Final = (
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


def _record(row: Any) -> WebhookRecord:
    values = row._asdict()
    values["webhook_id"] = values.pop("id")
    values["states"] = frozenset(map(JobState, values["states"]))
    return WebhookRecord(**values)


def _delivery(row: Any) -> DeliveryRecord:
    return DeliveryRecord(*row)


async def insert_webhook(
    connection: AsyncConnection,
    webhook_id: int,
    user_id: str,
    values: Mapping[str, Any],
    defaults: UserQuotas,
) -> WebhookRecord:
    """Add a webhook, which gets the events from now on, and those of the last minute.

    Some of the ids that were drawn already may be committed later, in transactions under way.

    Raises:
        ResourceExhausted: USER_WEBHOOKS_EXCEEDED.
    """
    await lock_and_check_webhooks(connection, user_id, defaults)
    start = await find_start(connection, (await read_drawn(connection)).at, user_id)
    statement = (
        insert(WebhookRow)
        .values(
            id=webhook_id, user_id=owner_of(user_id), after_event=start.event_id, **dict(values)
        )
        .returning(*_COLUMNS)
    )
    return _record((await connection.execute(statement)).one())


async def read_webhook(
    connection: AsyncConnection, webhook_id: int, user_id: str | None, *, lock: bool = False
) -> WebhookRecord | None:
    """Return a webhook; None if it does not exist or belongs to another user."""
    statement = select(*_COLUMNS).where(WebhookRow.id == webhook_id)
    if lock:
        statement = statement.with_for_update()
    row = (await connection.execute(owned_by(statement, WebhookRow.user_id, user_id))).one_or_none()
    return None if row is None else _record(row)


async def list_webhooks(
    connection: AsyncConnection, user_id: str, after: int, limit: int
) -> Sequence[WebhookRecord]:
    """Return the first webhooks of a user after an id."""
    statement = select(*_COLUMNS).where(WebhookRow.id > after).order_by(WebhookRow.id).limit(limit)
    rows = await connection.execute(owned_by(statement, WebhookRow.user_id, user_id))
    return [_record(row) for row in rows]


async def update_webhook(
    connection: AsyncConnection, webhook_id: int, user_id: str | None, values: Mapping[str, Any]
) -> WebhookRecord:
    """Change a webhook that the transaction has locked."""
    changed = dict(values)
    if changed.get("disabled") is False:
        changed |= {"failures": 0, "failing_since": None, "error": None, "next_at": _soon()}
    statement = (
        update(WebhookRow)
        .where(WebhookRow.id == webhook_id)
        .values(revision=WebhookRow.revision + 1, **changed)
        .returning(*_COLUMNS)
    )
    return _record(
        (await connection.execute(owned_by(statement, WebhookRow.user_id, user_id))).one()
    )


async def rotate_secret(
    connection: AsyncConnection,
    webhook_id: int,
    user_id: str | None,
    secret: bytes,
    keep: timedelta,
) -> WebhookRecord:
    """Replace the secret of a webhook that the transaction has locked; `keep` the old one."""
    values = {
        "old_secret": WebhookRow.secret,
        "old_secret_until": func.statement_timestamp() + literal(keep, INTERVAL),
        "secret": secret,
    }
    return await update_webhook(connection, webhook_id, user_id, values)


async def delete_webhook(connection: AsyncConnection, webhook_id: int, user_id: str | None) -> None:
    """Delete a webhook that the transaction has locked, with its failed deliveries."""
    await connection.execute(
        owned_by(delete(WebhookRow).where(WebhookRow.id == webhook_id), WebhookRow.user_id, user_id)
    )
    await connection.execute(
        delete(WebhookDeliveryRow).where(WebhookDeliveryRow.webhook_id == webhook_id)
    )


async def list_deliveries(
    connection: AsyncConnection, webhook_id: int, after: int, limit: int
) -> Sequence[DeliveryRecord]:
    """Return the first failed deliveries of a webhook after an id. Check its owner before."""
    rows = await connection.execute(
        select(*_DELIVERY)
        .where(WebhookDeliveryRow.webhook_id == webhook_id, WebhookDeliveryRow.id > after)
        .order_by(WebhookDeliveryRow.id)
        .limit(limit)
    )
    return [_delivery(row) for row in rows]


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
            update(WebhookRow).where(WebhookRow.id == webhook_id).values(next_at=_soon())
        )
    return moved.rowcount


def _soon() -> Any:
    """Return the `next_at` that ends a long rest of a webhook that the transaction has locked.

    A time within the next minute stays: it may be the end of a lease, whose request must stay the
    only one.
    """
    now = func.statement_timestamp()
    return case(
        (WebhookRow.next_at > now + literal(LEASE, INTERVAL), now), else_=WebhookRow.next_at
    )


async def remove_old_deliveries(
    connection: AsyncConnection, older_than: timedelta, limit: int
) -> int:
    """Remove failed deliveries whose events are removed. Return how many that were."""
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


# Delivering ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WaitingWebhook:
    """A webhook with something to post."""

    webhook_id: int
    user_id: str
    # Since when it may be worked on.
    next_at: datetime
    # Whether there is something, or it was only looked at.
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
    # Not EXISTS, which has no order, and so may read the events of all users.
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
        .returning(*_COLUMNS)
    )
    return [_record(row) for row in await connection.execute(statement)]


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
    """Record another failed try. Without a `wait`, the delivery is given up."""
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
