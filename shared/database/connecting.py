"""Connections to PostgreSQL, directly or through a pooler such as PgBouncer.

A pooler in transaction mode gives each transaction another session of PostgreSQL. So startup
options are refused, the effects of SET are lost, and statements that another session prepared are
unknown. A connection finds out by itself whether there is a pooler.
"""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import conninfo, sql
from psycopg.pq import TransactionStatus
from psycopg.raw_cursor import RawCursorMixin

from outbox_server.shared.database.url_parameters import check_parameters
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.store_urls import DATABASE_FORM, check_database_url

_VARIABLE: Final = "OUTBOX_DATABASE_URL"
_CONNECT_TIMEOUT_S: Final = 5
STATEMENT_TIMEOUT_MS: Final = 60_000
# PostgreSQL ends such a statement itself and reports an error. If no reply comes although the
# network acknowledges all packets (such as a frozen host behind a proxy), keep-alives detect
# nothing, and only this limit ends the wait.
_ANSWER_LIMIT_S = STATEMENT_TIMEOUT_MS / 1000 + 10
# Parameters of libpq that the URL may change.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "connect_timeout": _CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "client_encoding": "UTF8",
}
# A parameter of psycopg, which libpq does not know.
_PREPARE: Final = re.compile(r"([?&])prepare_threshold=([^&]*)(&|$)")
_NEVER: Final = ("none", "0")
_PREPARE_AFTER: Final = 5
_UNKNOWN: Final = re.compile(r'invalid URI query parameter: "(\w{1,60})"')


@dataclass(frozen=True, slots=True)
class DatabaseTarget:
    """Where to connect: the parameters of libpq, and after how many uses a statement is prepared.

    `prepare_after` None means never. Unless `prepare_given`, it applies only without a pooler.
    """

    parameters: Mapping[str, Any]
    prepare_after: int | None = _PREPARE_AFTER
    prepare_given: bool = False


def parse_target(url: str) -> DatabaseTarget:
    """Return the target of a URL of libpq, with several hosts if need be.

    Raises:
        ConfigurationError: it is malformed, or has a wrong parameter; the text does not contain it,
            as it has a password.
    """
    try:
        check_database_url(url)
        rest, given, after = _split_prepare(url)
        # libpq knows the scheme without the name of a driver.
        found = conninfo.conninfo_to_dict(re.sub(r"^\w+(\+\w+)?://", "postgresql://", rest))
        check_parameters(found)
    except ValueError as error:
        raise ConfigurationError(f"{_VARIABLE}: {error}") from None
    except psycopg.ProgrammingError as error:
        unknown = _UNKNOWN.search(str(error))
        cause = f"has an unknown parameter {unknown[1]!r}" if unknown else "is malformed for libpq"
        raise ConfigurationError(f"{_VARIABLE}: {cause}; write {DATABASE_FORM}") from None
    return DatabaseTarget({**_DEFAULTS, **found}, after, given)


def _split_prepare(url: str) -> tuple[str, bool, int | None]:
    """Return the URL without `prepare_threshold`, whether it was there, and its value."""
    found = _PREPARE.search(url)
    if found is None:
        return url, False, _PREPARE_AFTER
    rest = url[: found.start()] + (found[1] if found[3] else "") + url[found.end() :]
    value = found[2].lower()
    if value in _NEVER:
        return rest, True, None
    if not value.isdecimal() or len(value) > len("1000"):
        raise ValueError("prepare_threshold must be none or a number of uses from 1 on")
    return rest, True, int(value)


class PostgresConnection(psycopg.AsyncConnection[Any]):
    """A connection that applies its settings in each transaction if there is a pooler."""

    # None means no limit.
    answer_limit_s: float | None = None
    # The statement that applies the settings to a transaction; None without a pooler.
    local_settings: sql.Composed | None = None
    # Whether there may be a pooler.
    pooled = True

    async def configure(self, target: DatabaseTarget, settings: Mapping[str, str]) -> None:
        """Find out whether there is a pooler, and apply the settings accordingly.

        A pooler tells its clients a process id of its own, which is not that of a session of
        PostgreSQL. Then the settings end with this one statement.
        """
        await self.set_autocommit(True)
        pid = sql.Literal(self.info.backend_pid)
        pooled = sql.SQL("pg_backend_pid() <> {}").format(pid)
        query = sql.SQL("SELECT {}, {}").format(pooled, _setting(settings, local=pooled))
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            answer = await self.execute(query, prepare=False)
        if answer.description is None:
            # A pooler that mixes up its clients passes on the answer to another client's statement.
            raise psycopg.OperationalError("the answer belongs to another statement")
        row = await answer.fetchone()
        await self.set_autocommit(False)
        self.pooled = row is not None and bool(row[0])
        if self.pooled:
            self.local_settings = sql.SQL("SELECT {}").format(
                _setting(settings, local=sql.SQL("true"))
            )
        use = target.prepare_given or self.local_settings is None
        self.prepare_threshold = target.prepare_after if use else None

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - psycopg's
        """Cancel the running statement. Behind a pooler, close the connection instead.

        PgBouncer 1.18 and 1.19 end, with all their connections, when a busy system sends cancel
        requests (issues 822 and 904 of PgBouncer). Without one, PostgreSQL notices the end of the
        client later: at the latest when the statement's timeout is over.
        """
        if self.pooled:
            self.pgconn.finish()
        else:
            await super().cancel_safe(timeout=timeout)

    async def set_read_only(self, value: bool | None) -> None:
        """Let transactions only read. False means the server's default.

        After a snapshot, SQLAlchemy sets it to False, so that each transaction would ask for
        writes. A replica that is not promoted yet refuses that with an error of its own (0A000).
        """
        await super().set_read_only(value or None)

    async def wait(self, *args: Any, **options: Any) -> Any:
        """Wait for PostgreSQL, for a limited time."""
        try:
            async with asyncio.timeout(self.answer_limit_s):
                return await super().wait(*args, **options)
        except TimeoutError:
            # A late reply could still arrive, so the connection is closed. The pool then drops all
            # older ones.
            self.pgconn.finish()
            raise psycopg.OperationalError("PostgreSQL does not reply") from None


def _setting(settings: Mapping[str, str], *, local: sql.Composable) -> sql.Composed:
    """Return the expressions that set these; `local`: until the end of the transaction."""
    each = (
        sql.SQL("set_config({}, {}, {})").format(sql.Literal(name), sql.Literal(value), local)
        for name, value in settings.items()
    )
    return sql.SQL(", ").join(each)


class _Cursor(psycopg.AsyncCursor[Any]):
    """A cursor whose statements have the settings of the connection, behind a pooler too.

    They take one more round trip per transaction. A single statement then needs a transaction of
    its own: settings must be there before it is planned.
    """

    async def execute(self, *args: Any, **options: Any) -> Any:
        connection: Any = self.connection
        settings = connection.local_settings
        if settings is None or connection.info.transaction_status is not TransactionStatus.IDLE:
            return await super().execute(*args, **options)
        if not connection.autocommit:
            await self._apply(settings)
            return await super().execute(*args, **options)
        async with connection.transaction():
            await self._apply(settings)
            return await super().execute(*args, **options)

    async def _apply(self, settings: sql.Composed) -> None:
        await super().execute(settings)

    async def executemany(self, *args: Any, **options: Any) -> Any:
        connection: Any = self.connection
        await _begin(connection)
        return await super().executemany(*args, **options)


class RawCursor(RawCursorMixin[psycopg.AsyncConnection[Any], Any], _Cursor):
    """The same for statements whose parameters are $1, $2 and so on, which psycopg does not parse.

    See `shared.database.frequent`.
    """

    async def _apply(self, settings: sql.Composed) -> None:
        await psycopg.AsyncCursor(self.connection).execute(settings)


class _ServerCursor(psycopg.AsyncServerCursor[Any]):
    """A cursor of PostgreSQL, which lives in a transaction, with the settings of the connection."""

    async def execute(self, *args: Any, **options: Any) -> Any:
        connection: Any = self.connection
        await _begin(connection)
        return await super().execute(*args, **options)


async def _begin(connection: PostgresConnection) -> None:
    """Begin a transaction with its settings behind a pooler, unless one has begun."""
    if connection.local_settings is not None and not connection.autocommit:
        idle = connection.info.transaction_status is TransactionStatus.IDLE
        if idle:
            await connection.cursor().execute("SELECT 1")


async def connect(
    target: DatabaseTarget, settings: Mapping[str, str], *, patient: bool = False
) -> psycopg.AsyncConnection[Any]:
    """Return a connection with these settings of PostgreSQL. `patient`: no wait has a limit.

    Raises:
        psycopg.Error: it is refused, or PostgreSQL does not answer.
    """
    try:
        connection = await PostgresConnection.connect(**target.parameters, cursor_factory=_Cursor)
    except BaseException as error:
        # The frames of an attempt that was cancelled hold its open socket, and the error holds the
        # frames. PostgreSQL would wait for the password for a minute, and DROP DATABASE with it.
        traceback.clear_frames(error.__traceback__)
        raise
    connection.server_cursor_factory = _ServerCursor
    try:
        connection.answer_limit_s = None if patient else _ANSWER_LIMIT_S
        await connection.configure(target, settings)
    except BaseException as error:
        await connection.close()
        if isinstance(error, TimeoutError):
            raise psycopg.OperationalError("PostgreSQL does not reply") from None
        raise
    return connection


def connect_directly(
    url: str, settings: Mapping[str, str] | None = None, *, autocommit: bool = False, **more: Any
) -> psycopg.Connection[Any]:
    """Return a blocking connection with a session of its own, which migrations need.

    `more` are parameters of libpq, in place of the URL's.

    Raises:
        ConfigurationError: the URL is malformed, or leads to a pooler.
        psycopg.Error: it is refused, or PostgreSQL does not answer.
    """
    parameters = {**parse_target(url).parameters, **more, "autocommit": True}
    connection: psycopg.Connection[Any] = psycopg.connect(**parameters)
    try:
        _refuse_pooler(connection)
        for name, value in (settings or {}).items():
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
        connection.autocommit = autocommit
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_pooler(connection: psycopg.Connection[Any]) -> None:
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    if row is None or row[0] != connection.info.backend_pid:
        raise ConfigurationError(
            f"{_VARIABLE}: this command needs a session of its own, and the URL leads to a "
            "pooler, such as PgBouncer: run it with the URL of PostgreSQL itself"
        )
