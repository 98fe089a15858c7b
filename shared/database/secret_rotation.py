"""Re-encrypts the stored secrets of endpoints with the newest key, one chunk per transaction.

The secrets are SMTP passwords, the secrets and tokens of OAuth 2.0, and the secrets of webhooks.
Secrets that already use the newest key do not change, so an interrupted rotation can be started
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import OAuth2CredentialsRow, Sender, WebhookRow
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.secrets import SecretBox

# About 50 ms of work. An UpdateSender of one of these senders may have to wait for it.
CHUNK: Final = 500
_STORED: Final = Sender.smtp_password.is_not(None)
_OAUTH2_SECRETS: Final = ("client_secret", "refresh_token", "access_token")


@dataclass(frozen=True, slots=True)
class RotatedChunk:
    """The result for one chunk of senders."""

    looked_at: int
    rotated: int
    # The senders whose secrets no key decrypts.
    unreadable: Sequence[int]
    # The last sender of the chunk. None means that none was left.
    last_id: int | None


async def count_passwords(connection: AsyncConnection) -> int:
    """Return how many passwords are stored."""
    found: int = (
        await connection.execute(select(func.count()).select_from(Sender).where(_STORED))
    ).scalar_one()
    return found


async def rotate_chunk(
    connection: AsyncConnection, secrets: SecretBox, after_id: int, limit: int = CHUNK
) -> RotatedChunk:
    """Rotate the first `limit` passwords of senders after `after_id`.

    The sender's revision does not change: the password is the same, and caches stay valid.
    """
    rows: Sequence[Any] = (
        await connection.execute(
            select(Sender.id, Sender.smtp_password)
            .where(Sender.id > after_id, _STORED)
            .order_by(Sender.id)
            .limit(limit)
            .with_for_update(key_share=True)
        )
    ).all()
    changes, unreadable = [], []
    for sender_id, token in rows:
        try:
            renewed = secrets.rotate(token)
        except FailedPrecondition:
            unreadable.append(sender_id)
            continue
        if renewed is not None:
            changes.append({"rotated_id": sender_id, "token": renewed})
    if changes:
        await connection.execute(
            update(Sender)
            .where(Sender.id == bindparam("rotated_id"))
            .values(smtp_password=bindparam("token")),
            changes,
        )
    return RotatedChunk(len(rows), len(changes), unreadable, rows[-1].id if rows else None)


async def count_oauth2(connection: AsyncConnection) -> int:
    """Return how many senders have OAuth 2.0 credentials."""
    found: int = (
        await connection.execute(select(func.count()).select_from(OAuth2CredentialsRow))
    ).scalar_one()
    return found


async def rotate_oauth2_chunk(
    connection: AsyncConnection, secrets: SecretBox, after_id: int, limit: int = CHUNK
) -> RotatedChunk:
    """Rotate the OAuth 2.0 secrets of the first `limit` senders after `after_id`.

    The counts of the result are senders, not secrets. An access token that no key decrypts is
    ignored, because the next token replaces it.
    """
    row_of = OAuth2CredentialsRow
    rows: Sequence[Any] = (
        await connection.execute(
            select(row_of.sender_id, *(getattr(row_of, name) for name in _OAUTH2_SECRETS))
            .where(row_of.sender_id > after_id)
            .order_by(row_of.sender_id)
            .limit(limit)
            .with_for_update(key_share=True)
        )
    ).all()
    rotated, unreadable = 0, []
    for row in rows:
        renewed: dict[str, bytes] = {}
        lost = False
        for name in _OAUTH2_SECRETS:
            token = getattr(row, name)
            try:
                changed = None if token is None else secrets.rotate(token)
            except FailedPrecondition:
                lost = lost or name != "access_token"
                continue
            if changed is not None:
                renewed[name] = changed
        if renewed:
            await connection.execute(
                update(row_of).where(row_of.sender_id == row.sender_id).values(renewed)
            )
        if lost:
            unreadable.append(row.sender_id)
        elif renewed:
            rotated += 1
    return RotatedChunk(len(rows), rotated, unreadable, rows[-1].sender_id if rows else None)


async def rotate_webhook_chunk(
    connection: AsyncConnection, secrets: SecretBox, after_id: int, limit: int = CHUNK
) -> RotatedChunk:
    """Rotate the secrets of the first `limit` webhooks after `after_id`."""
    rows: Sequence[Any] = (
        await connection.execute(
            select(WebhookRow.id, WebhookRow.secret, WebhookRow.old_secret)
            .where(WebhookRow.id > after_id)
            .order_by(WebhookRow.id)
            .limit(limit)
            .with_for_update(key_share=True)
        )
    ).all()
    rotated, unreadable = 0, []
    for webhook_id, *tokens in rows:
        try:
            renewed = [None if token is None else secrets.rotate(token) for token in tokens]
        except FailedPrecondition:
            unreadable.append(webhook_id)
            continue
        changed = {
            name: token
            for name, token in zip(("secret", "old_secret"), renewed, strict=True)
            if token is not None
        }
        if changed:
            rotated += 1
            await connection.execute(
                update(WebhookRow).where(WebhookRow.id == webhook_id).values(changed)
            )
    return RotatedChunk(len(rows), rotated, unreadable, rows[-1].id if rows else None)
