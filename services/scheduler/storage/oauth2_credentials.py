"""Writes the OAuth 2.0 credentials of senders. For access tokens see `shared.oauth2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import case, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import OAuth2CredentialsRow as Row
from outbox_server.shared.database.models import Sender

# The fields of a sender's credentials that callers may see, as one JSON object. NULL without any.
VISIBLE_CREDENTIALS: Final = (
    select(
        func.json_build_object(
            "token_url",
            Row.token_url,
            "client_id",
            Row.client_id,
            "scope",
            Row.scope,
            "client_secret_set",
            Row.client_secret.is_not(None),
            "refresh_token_set",
            Row.refresh_token.is_not(None),
        )
    )
    .where(Row.sender_id == Sender.id)
    .correlate(Sender)
    .scalar_subquery()
)


async def replace_credentials(
    connection: AsyncConnection, sender_id: int, values: Mapping[str, Any] | None
) -> None:
    """Replace the credentials of a sender. None deletes them.

    The caller has locked the sender's row. The new row has a new id and no access token, so a
    request that is under way for the old row cannot store its token.
    """
    await connection.execute(delete(Row).where(Row.sender_id == sender_id))
    if values is not None:
        await connection.execute(insert(Row).values(sender_id=sender_id, **values))


async def request_new_token(connection: AsyncConnection, sender_id: int) -> None:
    """Make the next session request an access token, even if the provider refused one before.

    The present token is kept until then, in case the provider cannot be reached.
    """
    await connection.execute(
        update(Row)
        .where(Row.sender_id == sender_id)
        .values(
            failures=0,
            retry_at=None,
            error=None,
            refused=False,
            # The expiry is NULL if there is no token.
            refresh_at=case((Row.access_token.is_not(None), func.clock_timestamp())),
        )
    )
