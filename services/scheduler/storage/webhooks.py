"""The SQL of webhooks: what users create, show, change and delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import case, delete, func, insert, literal, select, update
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.changes import next_revision
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition
from outbox_server.shared.database.models import WebhookDeliveryRow, WebhookRow
from outbox_server.shared.database.ownership import owned_by, owner_of
from outbox_server.shared.events.storage import find_start, read_drawn
from outbox_server.shared.filters.fields import Filter
from outbox_server.shared.quotas.storage import lock_and_check_webhooks
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.states import JobState
from outbox_server.shared.user_quotas import UserQuotas


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


# A process works on a webhook for less than this time (webhook_delivery.py).
LEASE: Final = timedelta(minutes=1)
WEBHOOK_COLUMNS: Final = (
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


def webhook_of(row: Any) -> WebhookRecord:
    """Return the webhook of a row of `WEBHOOK_COLUMNS`."""
    values = row._asdict()
    values["webhook_id"] = values.pop("id")
    values["states"] = frozenset(map(JobState, values["states"]))
    return WebhookRecord(**values)


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
        .returning(*WEBHOOK_COLUMNS)
    )
    return webhook_of((await connection.execute(statement)).one())


async def read_webhook(
    connection: AsyncConnection, webhook_id: int, user_id: str | None, *, lock: bool = False
) -> WebhookRecord | None:
    """Return a webhook; None if it does not exist or belongs to another user."""
    statement = select(*WEBHOOK_COLUMNS).where(WebhookRow.id == webhook_id)
    if lock:
        statement = statement.with_for_update()
    row = (await connection.execute(owned_by(statement, WebhookRow.user_id, user_id))).one_or_none()
    return None if row is None else webhook_of(row)


_LEAVES: Final[Mapping[str, Leaf]] = {
    "url": column(WebhookRow.url),
    "sender_id": column(WebhookRow.sender_id, nullable=True),
    "disabled": column(WebhookRow.disabled),
    "create_time": column(WebhookRow.created_at),
}


async def list_webhooks(
    connection: AsyncConnection,
    user_id: str,
    tree: Filter | None,
    after: int,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[WebhookRecord], int | None]:
    """Return the first webhooks of a user after an id that match.

    If there are fewer than `limit`, although more may follow, the id where to continue is returned
    too.
    """
    key = WebhookRow.id
    rows = select(*WEBHOOK_COLUMNS).where(key < after if descending else key > after)
    matches = None if tree is None else condition(tree, _LEAVES)
    found = await search(
        connection,
        owned_by(rows, WebhookRow.user_id, user_id),
        key,
        matches,
        limit,
        descending=descending,
    )
    return [webhook_of(row) for row in found.rows], found.reached


async def update_webhook(
    connection: AsyncConnection, webhook_id: int, user_id: str | None, values: Mapping[str, Any]
) -> WebhookRecord:
    """Change a webhook that the transaction has locked."""
    changed = dict(values)
    if changed.get("disabled") is False:
        changed |= {"failures": 0, "failing_since": None, "error": None, "next_at": soon()}
    statement = (
        update(WebhookRow)
        .where(WebhookRow.id == webhook_id)
        .values(revision=next_revision(WebhookRow.revision), **changed)
        .returning(*WEBHOOK_COLUMNS)
    )
    return webhook_of(
        (await connection.execute(owned_by(statement, WebhookRow.user_id, user_id))).one()
    )


async def rotate_secret(
    connection: AsyncConnection,
    webhook_id: int,
    user_id: str | None,
    secret: bytes,
    keep: timedelta,
) -> WebhookRecord:
    """Replace the secret of a locked webhook. The old secret also signs for the time `keep`."""
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


def soon() -> Any:
    """Return the `next_at` that ends a long rest of a webhook that the transaction has locked.

    A time within the next minute stays: it may be the end of a lease, whose request must stay the
    only one.
    """
    now = func.statement_timestamp()
    return case(
        (WebhookRow.next_at > now + literal(LEASE, INTERVAL), now), else_=WebhookRow.next_at
    )
