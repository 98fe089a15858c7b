"""Access to PostgreSQL: the engine, and conversions for storage modules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import psycopg
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from outbox_server.shared.database.fair_pool import FairPool
from outbox_server.shared.database.ownership import refuse_unbounded
from outbox_server.shared.settings import Settings

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 5
# A statement that takes longer is stuck; a long intake consists of many statements.
_STATEMENT_TIMEOUT_MS = 60_000
# PostgreSQL ends such a statement itself and reports an error. If no reply comes although the
# network acknowledges all packets (such as a frozen host behind a proxy), keep-alives detect
# nothing, and only this limit ends the wait.
_ANSWER_LIMIT_S = _STATEMENT_TIMEOUT_MS / 1000 + 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

# What work outside of calls may get from PostgreSQL and its driver. All of it is tried again: an
# outage, but also a pooler that forgot a prepared statement, or a missing privilege or column. None
# may end a process, because the next one would meet the same.
DATABASE_ERRORS = (SQLAlchemyError, psycopg.Error, OSError)


class _Connection(psycopg.AsyncConnection[Any]):
    """A connection whose waits for PostgreSQL all have a time limit."""

    async def wait(self, *args: Any, **options: Any) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                return await super().wait(*args, **options)
        except TimeoutError:
            # A late reply could still arrive, so close; the pool then drops all older connections.
            self.pgconn.finish()
            raise psycopg.OperationalError("PostgreSQL does not reply") from None


def driver_url(url: str) -> str:
    """Return the URL with the driver that Outbox uses: psycopg 3."""
    return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def create_engine(
    settings: Settings,
    *,
    lookups_only: bool = False,
    single_statements: bool = False,
    patient: bool = False,
) -> AsyncEngine:
    """Return the engine of one process, with a bounded pool and a time limit on every wait.

    `lookups_only`: every statement finds its rows by keys. Its plan must not depend on the
    statistics, which are wrong for a table that was just filled.
    `single_statements`: each statement is its own transaction, in one round trip instead of four.
    `patient`: statements have no time limit, because nobody waits for them.
    No statement of a call runs before the call is bound to its user: `shared.database.ownership`.
    """
    limit = 0 if patient else _STATEMENT_TIMEOUT_MS
    options = f"-c statement_timeout={limit} -c timezone=UTC -c jit=off"
    if lookups_only:
        options += " -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off"
        # Read in the order of the index, too: a bitmap scan that sorts a million jobs of a sender
        # to find the first 128 takes 0.5 s.
        options += " -c enable_bitmapscan=off"
    engine = create_async_engine(
        driver_url(settings.database_url),
        poolclass=FairPool,
        pool_size=settings.database_pool,
        max_overflow=0,
        pool_timeout=10,
        # A call must not fail because a restart of PostgreSQL closed a pooled connection. A process
        # of single statements repeats failed ones, and saves the round trip.
        pool_pre_ping=not single_statements,
        # Bound values contain personal data, such as mail addresses: keep them out of error texts.
        hide_parameters=True,
        isolation_level="AUTOCOMMIT" if single_statements else "READ COMMITTED",
        pool_reset_on_return=None if single_statements else "rollback",
        connect_args={
            "async_creator_fn": (psycopg.AsyncConnection if patient else _Connection).connect,
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "options": options,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    )
    refuse_unbounded(engine)
    event.listen(engine.sync_engine, "handle_error", _leave_standby)
    return engine


def _leave_standby(context: ExceptionContext) -> None:
    """Treat a read-only server as a lost connection.

    After a failover the server is a standby. New connections reach the new primary, old ones never
    do. psycopg reports the error (25006) as an internal one, which would count as a bug.
    """
    if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
        context.is_disconnect = True
        raise OperationalError(
            context.statement,
            None,
            context.original_exception,
            hide_parameters=True,
            connection_invalidated=True,
        )


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open a read-only transaction whose statements all see the database at the same moment."""
    async with engine.connect() as connection:
        yield await connection.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )


def unix_ms(time: datetime) -> int:
    """Return the time in whole ms since 1970, rounded up, so that nothing is due too early."""
    return -((_EPOCH - time) // _MILLISECOND)


def from_unix_ms(milliseconds: int) -> datetime:
    """Return the UTC time of `milliseconds` since 1970."""
    return _EPOCH + timedelta(milliseconds=milliseconds)
