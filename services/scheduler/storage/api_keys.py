"""Lists API keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition
from outbox_server.shared.auth.keys import ApiKey
from outbox_server.shared.auth.store import KEY_COLUMNS, key_of
from outbox_server.shared.database.models import ApiKeyRow
from outbox_server.shared.filters.fields import Filter

_LEAVES: Final[Mapping[str, Leaf]] = {
    "kind": column(ApiKeyRow.kind),
    "user_id": column(ApiKeyRow.user_id, nullable=True),
    "display_name": column(ApiKeyRow.name),
    "read_only": column(ApiKeyRow.read_only),
    "create_time": column(ApiKeyRow.created_at),
    "expire_time": column(ApiKeyRow.expires_at, nullable=True),
    "last_use_time": column(ApiKeyRow.last_used_at, nullable=True),
    "revoke_time": column(ApiKeyRow.revoked_at, nullable=True),
}


async def list_api_keys(
    connection: AsyncConnection,
    user_id: str | None,
    tree: Filter | None,
    after: str,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[ApiKey], str | None]:
    """Return the first `limit` keys after an id ("": all) that match, in the order of ids.

    `user_id` None means the keys of all users. If there are fewer, although more may follow, the id
    where to continue is returned too.
    """
    rows: Select[Any] = select(*KEY_COLUMNS)
    if after:
        rows = rows.where(ApiKeyRow.key_id < after if descending else ApiKeyRow.key_id > after)
    if user_id is not None:
        rows = rows.where(ApiKeyRow.user_id == user_id)
    matches = None if tree is None else condition(tree, _LEAVES)
    found = await search(connection, rows, ApiKeyRow.key_id, matches, limit, descending=descending)
    return [key_of(row) for row in found.rows], found.reached
