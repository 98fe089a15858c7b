"""The table of API keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import and_, func, insert, literal, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.auth.keys import (
    ApiKey,
    ApiKeyKind,
    NewKey,
    PresentedKey,
    is_key_id,
)
from outbox_server.shared.database.models import ApiKeyRow, UserRow
from outbox_server.shared.quotas.storage import QUOTA_COLUMNS, quotas_of
from outbox_server.shared.user_quotas import UserQuotas

# A key is looked up before each call, so a lock on its table must not hold up the calls.
_LOCK_LIMIT: Final = "250ms"
# `last_used_at` is written at most once in this time, by all processes together.
USE_INTERVAL: Final = timedelta(minutes=1)

# It holds until the end of the transaction.
_WAIT_BRIEFLY: Final = select(func.set_config("lock_timeout", _LOCK_LIMIT, literal(True)))

KEY_COLUMNS: Final[tuple[Any, ...]] = (
    ApiKeyRow.key_id,
    ApiKeyRow.kind,
    ApiKeyRow.user_id,
    ApiKeyRow.name,
    ApiKeyRow.created_at,
    ApiKeyRow.last_used_at,
    ApiKeyRow.revoked_at,
    ApiKeyRow.expires_at,
    ApiKeyRow.read_only,
)


def key_of(row: Any) -> ApiKey:
    """Return the key of a row with KEY_COLUMNS."""
    return ApiKey(
        key_id=row.key_id,
        kind=ApiKeyKind(row.kind),
        user_id=row.user_id,
        name=row.name,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
        expires_at=row.expires_at,
        read_only=row.read_only,
    )


@dataclass(frozen=True, slots=True)
class StoredKey:
    """The stored part of a valid key, against which callers are checked."""

    secret_hash: bytes
    kind: ApiKeyKind
    user_id: str | None
    # Whether `last_used_at` is older than USE_INTERVAL.
    use_is_old: bool
    # Set for a user's key only: the quotas of its user.
    quotas: UserQuotas | None = None
    # Whether it may call only methods that change nothing.
    read_only: bool = False
    # None means that it does not expire.
    expires_in: timedelta | None = None


class ApiKeyStore:
    """The statements on the table of API keys that servers use."""

    def __init__(self, engine: AsyncEngine, quotas: UserQuotas | None = None) -> None:
        """`quotas` are the defaults, for users without overrides. None means no quotas."""
        self._engine = engine
        self._quotas = quotas

    async def find(self, key_id: str) -> StoredKey | None:
        """Return a key; None if it does not exist, is revoked or has expired.

        Raises:
            sqlalchemy.exc.DBAPIError: somebody keeps its table locked, or PostgreSQL is away.
        """
        statement = (
            select(
                ApiKeyRow.secret_hash,
                ApiKeyRow.kind,
                ApiKeyRow.user_id,
                ApiKeyRow.read_only,
                _use_is_old().label("use_is_old"),
                (ApiKeyRow.expires_at - func.now()).label("expires_in"),
                *QUOTA_COLUMNS,
            )
            .outerjoin(UserRow, UserRow.user_id == ApiKeyRow.user_id)
            .where(_is_valid(key_id))
        )
        async with self._briefly() as connection:
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            return None
        quotas = None
        if row.user_id is not None and self._quotas is not None:
            quotas = quotas_of(row, self._quotas)
        return StoredKey(
            row.secret_hash,
            ApiKeyKind(row.kind),
            row.user_id,
            row.use_is_old,
            quotas,
            row.read_only,
            row.expires_in,
        )

    async def is_valid(self, key_id: str) -> bool:
        """Return whether a key exists and is neither revoked nor expired; read no other table.

        Raises:
            sqlalchemy.exc.DBAPIError: as `find`.
        """
        async with self._briefly() as connection:
            found = await connection.scalar(select(ApiKeyRow.key_id).where(_is_valid(key_id)))
        return found is not None

    async def note_use(self, key_id: str) -> None:
        """Record that a key was used now, unless a use within USE_INTERVAL is recorded."""
        async with self._briefly() as connection:
            await connection.execute(
                update(ApiKeyRow)
                .where(ApiKeyRow.key_id == key_id, _use_is_old())
                .values(last_used_at=func.now())
            )
            await connection.commit()

    @asynccontextmanager
    async def _briefly(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that waits for no lock for long."""
        async with self._engine.connect() as opened:
            # An engine of single statements would end the limit with its statement.
            connection = await opened.execution_options(isolation_level="READ COMMITTED")
            await connection.execute(_WAIT_BRIEFLY)
            yield connection


def _is_valid(key_id: str) -> Any:
    return and_(
        ApiKeyRow.key_id == key_id,
        ApiKeyRow.revoked_at.is_(None),
        func.coalesce(ApiKeyRow.expires_at > func.now(), True),
    )


def _use_is_old() -> Any:
    return func.coalesce(ApiKeyRow.last_used_at < func.now() - USE_INTERVAL, True)


async def insert_key(
    connection: AsyncConnection,
    key: NewKey,
    kind: ApiKeyKind,
    user_id: str | None,
    name: str,
    *,
    read_only: bool = False,
    expires_at: datetime | None = None,
) -> ApiKey:
    """Store a new key."""
    statement = (
        insert(ApiKeyRow)
        .values(
            key_id=key.key_id,
            secret_hash=key.secret_hash,
            kind=kind,
            user_id=user_id,
            name=name,
            read_only=read_only,
            expires_at=expires_at,
        )
        .returning(*KEY_COLUMNS)
    )
    return key_of((await connection.execute(statement)).one())


@dataclass(frozen=True, slots=True)
class Registration:
    """The row of a key that was registered, and whether it is new."""

    key: ApiKey
    secret_hash: bytes
    created: bool


async def register_key(
    connection: AsyncConnection,
    key: PresentedKey,
    kind: ApiKeyKind,
    user_id: str | None,
    name: str,
) -> Registration:
    """Store a key that was made elsewhere, unless its id is stored; return the stored row."""
    insertion = (
        postgresql.insert(ApiKeyRow)
        .values(
            key_id=key.key_id, secret_hash=key.secret_hash, kind=kind, user_id=user_id, name=name
        )
        .on_conflict_do_nothing(index_elements=[ApiKeyRow.key_id])
        .returning(ApiKeyRow.key_id)
    )
    created = (await connection.execute(insertion)).one_or_none() is not None
    statement = select(*KEY_COLUMNS, ApiKeyRow.secret_hash).where(ApiKeyRow.key_id == key.key_id)
    row = (await connection.execute(statement)).one()
    return Registration(key_of(row), row.secret_hash, created)


async def list_keys(connection: AsyncConnection, user_id: str | None) -> Sequence[ApiKey]:
    """Return all keys, or all keys of one user, the oldest first, including revoked ones."""
    statement = select(*KEY_COLUMNS).order_by(ApiKeyRow.created_at, ApiKeyRow.key_id)
    if user_id is not None:
        statement = statement.where(ApiKeyRow.user_id == user_id)
    return [key_of(row) for row in await connection.execute(statement)]


async def read_key(connection: AsyncConnection, key_id: str) -> ApiKey | None:
    """Return a key, even a revoked one; None if it does not exist."""
    if not is_key_id(key_id):  # PostgreSQL cannot compare every text
        return None
    statement = select(*KEY_COLUMNS).where(ApiKeyRow.key_id == key_id)
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else key_of(row)


async def revoke_key(connection: AsyncConnection, key_id: str) -> ApiKey | None:
    """Revoke a key, keeping the time of the first revocation; None if it does not exist."""
    statement = (
        update(ApiKeyRow)
        .where(ApiKeyRow.key_id == key_id)
        .values(revoked_at=func.coalesce(ApiKeyRow.revoked_at, func.now()))
        .returning(*KEY_COLUMNS)
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else key_of(row)
