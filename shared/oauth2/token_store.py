"""The SQL of access tokens: one row per credentials. All times are PostgreSQL's clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, bindparam, func, or_, select, update
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import OAuth2CredentialsRow as Row
from outbox_server.shared.database.models import Sender
from outbox_server.shared.oauth2.token_answers import Failure

_NOW = func.clock_timestamp()


@dataclass(frozen=True, slots=True)
class StoredToken:
    """The access token that all processes share, and the state of the request for the next."""

    version: UUID
    # Encrypted. None means that there is none, or that it has expired.
    access_token: bytes | None = field(repr=False)
    # True until it is time to request the next token.
    fresh: bool
    # True while a process is requesting the next token.
    leased: bool
    # Why the last request failed. None when the next request may be made.
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class LeasedCredentials:
    """Credentials that only this process may use until `lease_until`. Secrets are encrypted."""

    credentials_id: int
    sender_id: int
    user_id: str
    version: UUID
    lease_until: datetime
    token_url: str
    client_id: str
    scope: str
    client_secret: bytes | None = field(repr=False)
    refresh_token: bytes | None = field(repr=False)
    # The number of requests that failed since the last access token.
    failures: int


async def read_token(connection: AsyncConnection, credentials_id: int) -> StoredToken | None:
    """Return the stored token; None if these credentials were replaced or deleted."""
    row = (
        await connection.execute(
            select(
                Row.version,
                Row.access_token,
                func.coalesce(Row.expires_at > _NOW, False).label("valid"),
                func.coalesce(Row.refresh_at > _NOW, False).label("fresh"),
                func.coalesce(Row.lease_until > _NOW, False).label("leased"),
                func.coalesce(Row.retry_at > _NOW, False).label("failed"),
                Row.error,
                Row.refused,
            ).where(Row.id == credentials_id)
        )
    ).one_or_none()
    if row is None:
        return None
    return StoredToken(
        version=row.version,
        access_token=row.access_token if row.valid else None,
        fresh=row.fresh,
        leased=row.leased,
        failure=Failure(row.error, row.refused) if row.failed else None,
    )


async def take_lease(
    connection: AsyncConnection, credentials_id: int, version: UUID, lease: timedelta
) -> LeasedCredentials | None:
    """Take the lease for requesting the token after `version`.

    None means that another process has the lease, that the token was replaced already, or that the
    last failure forbids a request now. The lease of a process that died ends by itself.
    """
    row = (
        await connection.execute(
            update(Row)
            .where(
                Row.id == credentials_id,
                Row.version == version,
                or_(Row.lease_until.is_(None), Row.lease_until <= _NOW),
                or_(Row.retry_at.is_(None), Row.retry_at <= _NOW),
            )
            .values(lease_until=_later("lease", lease))
            .returning(
                Row.id,
                Row.sender_id,
                select(Sender.user_id)
                .where(Sender.id == Row.sender_id)
                .scalar_subquery()
                .label("user_id"),
                Row.version,
                Row.lease_until,
                Row.token_url,
                Row.client_id,
                Row.scope,
                Row.client_secret,
                Row.refresh_token,
                Row.failures,
            )
        )
    ).one_or_none()
    if row is None or row.lease_until is None:
        return None
    return LeasedCredentials(
        credentials_id=row.id,
        sender_id=row.sender_id,
        user_id=row.user_id,
        version=row.version,
        lease_until=row.lease_until,
        token_url=row.token_url,
        client_id=row.client_id,
        scope=row.scope,
        client_secret=row.client_secret,
        refresh_token=row.refresh_token,
        failures=row.failures,
    )


async def store_token(
    connection: AsyncConnection,
    leased: LeasedCredentials,
    access_token: bytes,
    refresh_token: bytes | None,
    *,
    refresh_in: timedelta,
    expires_in: timedelta,
) -> bool:
    """Store an access token, and the refresh token that came with it, in one statement.

    The first process to store a token wins, even if its lease has ended, so that no token is lost.
    Returns False if another process was first, or if the credentials were replaced.
    """
    values = {
        "access_token": access_token,
        "refresh_at": _later("refresh_in", refresh_in),
        "expires_at": _later("expires_in", expires_in),
        "version": func.gen_random_uuid(),
        "lease_until": None,
        "failures": 0,
        "retry_at": None,
        "error": None,
        "refused": False,
    }
    if refresh_token is not None:
        values["refresh_token"] = refresh_token
    stored = await connection.execute(
        update(Row)
        .where(Row.id == leased.credentials_id, Row.version == leased.version)
        .values(values)
        .returning(Row.id)
    )
    return stored.one_or_none() is not None


async def store_failure(
    connection: AsyncConnection, leased: LeasedCredentials, failure: Failure, wait: timedelta
) -> None:
    """Record why there is no new token, and end the lease. No process asks again before `wait`."""
    await connection.execute(
        update(Row)
        .where(
            Row.id == leased.credentials_id,
            Row.version == leased.version,
            Row.lease_until == leased.lease_until,
        )
        .values(
            lease_until=None,
            failures=Row.failures + 1,
            retry_at=_later("wait", wait),
            error=failure.message,
            refused=failure.refused,
        )
    )


def _later(name: str, by: timedelta) -> ColumnElement[datetime]:
    return _NOW + bindparam(name, by, type_=INTERVAL)
