"""Stores the requests that changed something, by which a repeated call is recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import Text, and_, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import ChangeRequest
from outbox_server.shared.database.ownership import bind_call

# The scope of callers that act for no particular user.
_ANY_USER: Final = ""
# How long a call is expected to be in progress. After that, it was probably interrupted.
_RECENT: Final = timedelta(seconds=10)
# The row of an earlier request may be removed between two statements.
_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """An earlier request with the same id.

    `answer` is its serialized answer; None means that it has none: it is in progress, or was
    interrupted.
    """

    digest: bytes
    answer: bytes | None
    # Whether it was stored within the last seconds, so that the first call may be in progress.
    recent: bool = False


@dataclass(frozen=True, slots=True)
class RequestKey:
    """What identifies a request: the user that it acts for (None means any), and its id."""

    user_id: str | None
    request_id: str

    @property
    def scope(self) -> str:
        """Return the value of the column."""
        bind_call(self.user_id)
        return _ANY_USER if self.user_id is None else self.user_id


async def begin_request(
    connection: AsyncConnection, key: RequestKey, digest: bytes, *, lock: bool = False
) -> StoredRequest | None:
    """Store the request, and return None; or return the earlier request with this id.

    If a transaction with the same id is open, this waits for its end. With `lock`, others wait for
    the end of this transaction if there was an earlier request, too.
    """
    new = insert(ChangeRequest).values(
        scope=key.scope, request_id=key.request_id, digest=digest, user_id=key.user_id
    )
    for _ in range(_TRIES):
        stored = await connection.execute(
            new.on_conflict_do_nothing().returning(ChangeRequest.scope)
        )
        if stored.first() is not None:
            return None
        found = await find_request(connection, key, lock=lock)
        if found is not None:
            return found
    raise AssertionError("a request is removed as often as it is stored")


async def find_request(
    connection: AsyncConnection, key: RequestKey, *, lock: bool = False
) -> StoredRequest | None:
    """Return the earlier request with this id; None if there was none."""
    recent = ChangeRequest.created_at > func.now() - _RECENT
    found = select(ChangeRequest.digest, ChangeRequest.answer, recent.label("recent")).where(
        ChangeRequest.scope == key.scope, ChangeRequest.request_id == key.request_id
    )
    if lock:
        found = found.with_for_update()
    row = (await connection.execute(found)).one_or_none()
    return None if row is None else StoredRequest(row.digest, row.answer, row.recent)


async def find_requests(
    connection: AsyncConnection, keys: Sequence[RequestKey]
) -> dict[tuple[str, str], StoredRequest]:
    """Return the earlier requests with these ids, by scope and id."""
    scopes = literal([key.scope for key in keys], ARRAY(Text))
    ids = literal([key.request_id for key in keys], ARRAY(Text))
    these = func.unnest(scopes, ids).table_valued("scope", "request_id").render_derived()
    found = select(
        ChangeRequest.scope, ChangeRequest.request_id, ChangeRequest.digest, ChangeRequest.answer
    ).join(
        these,
        and_(ChangeRequest.scope == these.c.scope, ChangeRequest.request_id == these.c.request_id),
    )
    return {
        (row.scope, row.request_id): StoredRequest(row.digest, row.answer)
        for row in await connection.execute(found)
    }


async def store_answer(
    connection: AsyncConnection,
    key: RequestKey,
    answer: bytes,
    owner: str | None,
    address_key: str | None,
) -> None:
    """Store the answer to a request that `begin_request` has stored.

    `owner` owns what was changed; `address_key` is the key of the recipient that it is about.
    """
    stored = (
        update(ChangeRequest)
        .where(ChangeRequest.scope == key.scope, ChangeRequest.request_id == key.request_id)
        .values(answer=answer, user_id=owner, address_key=address_key)
    )
    await connection.execute(stored)


async def forget_unanswered(connection: AsyncConnection, key: RequestKey, digest: bytes) -> None:
    """Remove a request that `begin_request` has stored and that has no answer."""
    await connection.execute(
        delete(ChangeRequest).where(
            ChangeRequest.scope == key.scope,
            ChangeRequest.request_id == key.request_id,
            ChangeRequest.digest == digest,
            ChangeRequest.answer.is_(None),
        )
    )


async def store_progress(
    connection: AsyncConnection, key: RequestKey, digest: bytes, answer: bytes
) -> None:
    """Store how far a request has come that `begin_request` has stored: its digest and answer."""
    stored = (
        update(ChangeRequest)
        .where(ChangeRequest.scope == key.scope, ChangeRequest.request_id == key.request_id)
        .values(digest=digest, answer=answer)
    )
    await connection.execute(stored)


async def store_first_answer(connection: AsyncConnection, key: RequestKey, answer: bytes) -> bytes:
    """Store an answer unless one is stored already. Return the stored answer."""
    stored = (
        update(ChangeRequest)
        .where(ChangeRequest.scope == key.scope, ChangeRequest.request_id == key.request_id)
        .values(answer=func.coalesce(ChangeRequest.answer, answer))
        .returning(ChangeRequest.answer)
    )
    found = (await connection.execute(stored)).scalar_one_or_none()
    return answer if found is None else found
