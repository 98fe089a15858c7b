"""The way to PostgreSQL: engine, migrations, and conversions that every storage module needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, TypeVar

import psycopg
import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import event, select
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from outbox_server.shared.database.models import Sender
from outbox_server.shared.database.ownership import refuse_unbounded
from outbox_server.shared.settings import Settings

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 5
_RETRY_S = 0.5
# A statement that takes longer than this is stuck; a long intake is many statements.
_STATEMENT_TIMEOUT_MS = 60_000
# PostgreSQL ends a statement itself, and says so. Where it says nothing for as long, while the
# network acknowledges all that we send (a proxy that lost the way, a frozen host behind it),
# keep-alives see nothing, and only this ends the wait.
_ANSWER_LIMIT_S = _STATEMENT_TIMEOUT_MS / 1000 + 10
_log = structlog.get_logger(__name__)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

# What a call raises when PostgreSQL is gone, slow, full, or took back a transaction: a later try
# may succeed. Anything else is a fault of ours.
DATABASE_ERRORS = (OperationalError, InterfaceError, PoolTimeoutError, OSError)


class _Connection(psycopg.AsyncConnection[Any]):
    """A connection whose every wait for PostgreSQL has an end."""

    async def wait(self, *args: Any, **options: Any) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                return await super().wait(*args, **options)
        except TimeoutError:
            # Nobody knows what is still on its way; and by this the pool drops all of its age.
            self.pgconn.finish()
            raise psycopg.OperationalError("PostgreSQL gives no answer") from None


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
    """Return the engine of one process: a bounded pool, every wait with an end.

    `lookups_only`: every statement finds its rows by keys. Its plans must not change with what
    the statistics say of a table that was filled a moment ago.
    No statement of a call runs before the call is bound to its user: `shared.database.ownership`.
    `single_statements`: each statement is its own transaction, in one round trip and not four.
    `patient`: a statement may take as long as it takes, for nobody waits for it.
    """
    limit = 0 if patient else _STATEMENT_TIMEOUT_MS
    options = f"-c statement_timeout={limit} -c timezone=UTC -c jit=off"
    if lookups_only:
        options += " -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off"
        # And in the order of the index: a bitmap of a sender's jobs, sorted for the first 128 of
        # them, takes 0.5 s at a million.
        options += " -c enable_bitmapscan=off"
    engine = create_async_engine(
        driver_url(settings.database_url),
        pool_size=settings.database_pool,
        max_overflow=0,
        pool_timeout=10,
        # A connection that PostgreSQL's restart cut must not be what a caller finds out with. A
        # process of single statements repeats what failed, and saves the round trip.
        pool_pre_ping=not single_statements,
        # Bound values are mail addresses and more: they stay out of error texts.
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
    """Treat a read-only server as one that is gone.

    After a failover it is a standby now: a new connection finds the new primary, and the old ones
    never will. psycopg counts the error (25006) among internal ones, which are faults of ours.
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


async def ping(engine: AsyncEngine) -> None:
    """Read a table, which succeeds only if PostgreSQL answers and the database is migrated.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: PostgreSQL cannot be reached, or the table is missing.
    """
    async with engine.connect() as connection:
        await connection.execute(select(Sender.id).limit(1))


def unix_ms(time: datetime) -> int:
    """Return the time in whole ms since 1970, rounded up: nothing is due a part of a ms early."""
    return -((_EPOCH - time) // _MILLISECOND)


def from_unix_ms(milliseconds: int) -> datetime:
    """Return the UTC time of `milliseconds` since 1970."""
    return _EPOCH + timedelta(milliseconds=milliseconds)


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option(
        "script_location", str(files("outbox_server.shared.database").joinpath("migrations"))
    )
    config.set_main_option("sqlalchemy.url", driver_url(url).replace("%", "%%"))
    return config


def migrate(url: str) -> None:
    """Bring the schema up to date; safe to run from many processes at once."""
    command.upgrade(_config(url), "head")


async def until_reachable(engine: AsyncEngine, ask: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """Return what `ask` returns, in a transaction of its own, once PostgreSQL answers.

    A service that starts beside its database must not fail because it was the faster one.
    """
    while True:
        try:
            async with engine.begin() as connection:
                return await ask(connection)
        except DATABASE_ERRORS as error:
            _log.warning("postgresql_unreachable", error=type(error).__name__)
            await asyncio.sleep(_RETRY_S)
