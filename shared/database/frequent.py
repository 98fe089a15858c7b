"""Runs the few statements that every mail needs by psycopg alone, on connections that are kept.

SQLAlchemy takes about 1 ms of CPU for such a statement, with its connection from the pool. psycopg
takes a tenth of that. The statements are still written with SQLAlchemy, and compiled once.
"""

from __future__ import annotations

import re
import select
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg
from psycopg import sql
from sqlalchemy import ClauseElement
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.database.connecting import PostgresConnection, RawCursor

_DIALECT: Final = PGDialect_psycopg()  # type: ignore[no-untyped-call]
# A parameter, a constant of the text (such as the list of an IN), and a percent sign, as SQLAlchemy
# writes them for psycopg.
_PLACE: Final = re.compile(r"%\((\w+)\)s|__\[POSTCOMPILE_(\w+)\]|%%")


class FrequentStatement:
    """A statement, compiled once.

    Its constants become part of the text: a generic plan then knows them, such as the states of a
    partial index. Arrays and numbers are passed as text, so that PostgreSQL alone decides their
    types. psycopg would choose a type by the values, and each combination of types would be another
    prepared statement.
    """

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=_DIALECT)
        self.names: list[str] = []

        def place(found: re.Match[str]) -> str:
            name = found[1] or found[2]
            if name is None:
                return "%"
            value = compiled.params[name]
            if found[2]:
                each = value if isinstance(value, (list, tuple)) else (value,)
                return ", ".join(sql.Literal(one).as_string() for one in each)
            if value is not None:
                return sql.Literal(value).as_string()
            if name not in self.names:
                self.names.append(name)
            return f"${self.names.index(name) + 1}"

        self.text: Final = _PLACE.sub(place, str(compiled))
        self._query: Final = self.text.encode()

    async def run(
        self, connection: psycopg.AsyncConnection[Any], values: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """Run it with a value for each name, and return its rows."""
        cursor = RawCursor(connection)
        await cursor.execute(self._query, self.parameters(values), binary=True)
        return await cursor.fetchall()

    def parameters(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the values in the order of the text, as psycopg passes them on."""
        return [_parameter(values[name]) for name in self.names]


def _parameter(value: Any) -> Any:
    if isinstance(value, list):
        return array_text(value)
    # A text has no type of its own: PostgreSQL takes the type of the cast around it.
    return str(value) if isinstance(value, int) else value


def array_text(values: Iterable[bool | int | str | None]) -> str:
    """Return the text of an array, as PostgreSQL reads it."""
    return "{" + ",".join([_element(value) for value in values]) + "}"


def _element(value: bool | int | str | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)


def named_rows(names: Iterable[str]) -> Callable[[tuple[Any, ...]], Any]:
    """Return the function that gives the columns of a row these names."""
    # The type is made from a list, and mypy knows only literals.
    row: Any = namedtuple("Row", tuple(names))  # type: ignore[misc]  # noqa: PYI024
    make: Callable[[tuple[Any, ...]], Any] = row._make
    return make


async def driver_of(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """Return the connection of psycopg that SQLAlchemy uses, within the same transaction."""
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    if not isinstance(driver, PostgresConnection):
        raise TypeError(f"not a connection of psycopg: {type(driver).__name__}")
    return driver


@asynccontextmanager
async def driver_within(
    connection: AsyncConnection,
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Use psycopg's connection within a transaction of SQLAlchemy.

    One that leads to a read-only server, such as a former primary, does not return to the pool.
    """
    driver = await driver_of(connection)
    try:
        yield driver
    except psycopg.errors.ReadOnlySqlTransaction:
        await connection.invalidate()
        raise


@asynccontextmanager
async def transaction_on(driver: psycopg.AsyncConnection[Any]) -> AsyncIterator[None]:
    """Open a transaction on a connection of `KeptConnections`."""
    async with driver.transaction():
        if isinstance(driver, PostgresConnection) and driver.local_settings is not None:
            await driver.execute(driver.local_settings)
        yield


class KeptConnections:
    """Connections of an engine of single statements that one part of the process keeps for itself.

    At most `kept` are kept while they are not used, so the engine needs as many more for each such
    part. The engine's pool limits their number. A connection that is kept has its statements
    prepared.
    """

    def __init__(self, engine: AsyncEngine, kept: int = 1) -> None:
        self._engine = engine
        self._most = kept
        self._idle: list[tuple[AsyncConnection, psycopg.AsyncConnection[Any]]] = []

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Use a connection for single statements. One that an error has left unusable is closed."""
        pooled, driver = await self._take()
        try:
            yield driver
        except psycopg.Error as error:
            if driver.closed or isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                # After a failover, the others lead to the former primary too.
                fairy = await pooled.get_raw_connection()
                pool = self._engine.sync_engine.pool
                pool._invalidate(fairy, error, _checkin=False)  # noqa: SLF001 - as SQLAlchemy does
                await _drop(pooled)
                await self.aclose()
            else:
                await self._keep(pooled, driver)
            raise
        except BaseException:
            await _drop(pooled)
            raise
        await self._keep(pooled, driver)

    async def _take(self) -> tuple[AsyncConnection, psycopg.AsyncConnection[Any]]:
        while self._idle:
            pooled, driver = self._idle.pop()
            if _is_quiet(driver):
                return pooled, driver
            await _drop(pooled)
        return await self._open()

    async def _open(self) -> tuple[AsyncConnection, psycopg.AsyncConnection[Any]]:
        pooled = await self._engine.connect()
        try:
            return pooled, await driver_of(pooled)
        except BaseException:
            await pooled.close()
            raise

    async def _keep(self, pooled: AsyncConnection, driver: psycopg.AsyncConnection[Any]) -> None:
        if len(self._idle) < self._most and not driver.closed:
            self._idle.append((pooled, driver))
        else:
            await pooled.close()

    async def aclose(self) -> None:
        """Return the unused connections to the pool of the engine."""
        while self._idle:
            pooled, _ = self._idle.pop()
            await pooled.close()


def _is_quiet(driver: psycopg.AsyncConnection[Any]) -> bool:
    """Whether nothing arrived on an idle connection, such as its end at a restart of PostgreSQL."""
    if driver.closed:
        return False
    waiting = select.poll()
    waiting.register(driver.fileno(), select.POLLIN)
    return not waiting.poll(0)


async def _drop(pooled: AsyncConnection) -> None:
    await pooled.invalidate()
    await pooled.close()
