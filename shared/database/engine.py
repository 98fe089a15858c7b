"""Access to PostgreSQL: the engine, and conversions for storage modules."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

import psycopg
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from outbox_server.shared.database.connecting import (
    STATEMENT_TIMEOUT_MS,
    connect,
    parse_target,
)
from outbox_server.shared.database.fair_pool import FairPool
from outbox_server.shared.database.ownership import refuse_unbounded
from outbox_server.shared.settings import Settings

# A call waits this long for a lock, such as the lock of a call that changes the same sender.
LOCK_TIMEOUT = timedelta(seconds=10)
# PostgreSQL ends a transaction that sends nothing for this time: its host or network is gone.
# Otherwise its locks would last for hours, and no event of any user is shown while a transaction
# that has written events is open (`shared.events.storage`).
_IDLE_TIMEOUT_MS = 60_000
# Settings that the driver and our statements rely on, but that a database or a role may change.
_FIXED: Final[Mapping[str, str]] = {
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "default_transaction_isolation": "read committed",
    # Connections in the pool may be idle for any time.
    "idle_session_timeout": "0",
    "jit": "off",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

_LOST = (
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.IdleInTransactionSessionTimeout,
)

# The errors of PostgreSQL and its driver that work outside of calls expects. It is tried again
# after each of them: an outage, a pooler that forgot a prepared statement, a missing privilege or
# column. None may end the process, because its successor would get the same error.
DATABASE_ERRORS = (SQLAlchemyError, psycopg.Error, OSError)


def create_engine(
    settings: Settings,
    *,
    lookups_only: bool = False,
    single_statements: bool = False,
    patient: bool = False,
    lock_timeout: timedelta = LOCK_TIMEOUT,
    kept: int = 0,
) -> AsyncEngine:
    """Return the engine of one process, with a bounded pool and a time limit on every wait.

    `lookups_only`: every statement finds its rows by keys. Its plan must not depend on the
    statistics, which are wrong for a table that was just filled.
    `single_statements`: each statement is its own transaction, in one round trip instead of four.
    `patient`: statements and transactions have no time limit, because nobody waits for them.
    `lock_timeout`: how long a statement waits for a lock that somebody else holds.
    `kept`: connections that parts keep for themselves, in addition to OUTBOX_DATABASE_POOL.
    No statement of a call runs before the call is bound to its user: `shared.database.ownership`.

    Raises:
        ConfigurationError: OUTBOX_DATABASE_URL is malformed.
    """
    settings_of_postgres = {
        "statement_timeout": str(0 if patient else STATEMENT_TIMEOUT_MS),
        "lock_timeout": str(0 if patient else lock_timeout // _MILLISECOND),
        "idle_in_transaction_session_timeout": str(0 if patient else _IDLE_TIMEOUT_MS),
        **_FIXED,
    }
    if lookups_only:
        # Read in the order of the index, too: a bitmap scan that sorts a million jobs of a sender
        # to find the first 128 takes 0.5 s.
        scans = ("seqscan", "hashjoin", "mergejoin", "bitmapscan")
        settings_of_postgres |= {f"enable_{scan}": "off" for scan in scans}
        if single_statements:
            # Otherwise PostgreSQL plans a statement with arrays at every use, which takes as long
            # as the statement itself.
            settings_of_postgres["plan_cache_mode"] = "force_generic_plan"
    target = parse_target(settings.database_url)
    engine = create_async_engine(
        "postgresql+psycopg://",
        async_creator=partial(connect, target, settings_of_postgres, patient=patient),
        poolclass=FairPool,
        pool_size=settings.database_pool + kept,
        max_overflow=0,
        pool_timeout=10,
        # A call must not fail because a restart of PostgreSQL closed a pooled connection. A process
        # of single statements repeats failed ones, and saves the round trip.
        pool_pre_ping=not single_statements,
        # Bound values contain personal data, such as mail addresses, so error texts must not have
        # them.
        hide_parameters=True,
        isolation_level="AUTOCOMMIT" if single_statements else "READ COMMITTED",
        pool_reset_on_return=None if single_statements else "rollback",
    )
    refuse_unbounded(engine)
    event.listen(engine.sync_engine, "handle_error", _leave_standby)
    return engine


def is_locked(error: Exception) -> bool:
    """Return whether a statement ended because somebody else held a lock for too long."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, psycopg.errors.LockNotAvailable)


def _leave_standby(context: ExceptionContext) -> None:
    """Treat a read-only server, and the end of an idle transaction, as a lost connection.

    After a failover the server is a standby. New connections reach the new primary, old ones never
    do. psycopg reports both errors (25006, 25P03) as internal ones, which would count as bugs.
    """
    if isinstance(context.original_exception, _LOST):
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
