"""Statements that run without SQLAlchemy, on connections that are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Integer,
    Text,
    bindparam,
    func,
    literal,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.frequent import FrequentStatement, KeptConnections
from outbox_server.shared.settings import load_settings
from tests.conftest import DATABASE, Stores
from tests.eventually import eventually
from tests.pgbouncer import pooler

ECHO = FrequentStatement(
    select(
        bindparam("numbers", type_=ARRAY(BigInteger)),
        bindparam("texts", type_=ARRAY(Text)),
        bindparam("flags", type_=ARRAY(Boolean)),
        bindparam("one", type_=BigInteger),
    )
)
# What a hostile server may write into its replies.
TEXTS = [
    "",
    "NULL",
    "null",
    None,
    "a b",
    '"',
    "\\",
    '\\"',
    "{}",
    "{1,2}",
    ",",
    "\t\r\n",
    "é\U0001f600",
    "%s $1",
]
VALUES: dict[str, Any] = {
    "numbers": [1, None, -(2**63), 2**63 - 1],
    "texts": TEXTS,
    "flags": [True, None, False],
    "one": 7,
}


@pytest_asyncio.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    async with engine_of(database_url) as engine:
        yield engine


@asynccontextmanager
async def engine_of(url: str) -> AsyncIterator[AsyncEngine]:
    settings = load_settings(database_url=url, database_pool=3)
    engine = create_engine(settings, lookups_only=True, single_statements=True)
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def kept_by(engine: AsyncEngine) -> AsyncIterator[KeptConnections]:
    kept = KeptConnections(engine)
    try:
        yield kept
    finally:
        await kept.aclose()


async def test_arrays_arrive_as_they_were_whatever_their_texts(engine: AsyncEngine) -> None:
    async with kept_by(engine) as kept, kept.connection() as connection:
        [row] = await ECHO.run(connection, VALUES)
        assert row == (VALUES["numbers"], TEXTS, VALUES["flags"], 7)
        empty: dict[str, Any] = {"numbers": [], "texts": [], "flags": [], "one": None}
        assert await ECHO.run(connection, empty) == [([], [], [], None)]


def test_constants_are_part_of_the_text() -> None:
    number = literal(3, Integer)
    statement = FrequentStatement(
        select(func.concat(number, literal("it's 1 %")), number.in_([1, 2])).where(
            bindparam("given", type_=Integer) > bindparam("given", type_=Integer)
        )
    )
    assert statement.names == ["given"]
    assert "'it''s 1 %'" in statement.text
    assert "IN (1, 2)" in statement.text
    assert statement.text.count("$1") == 2


async def test_a_statement_is_prepared_once_whatever_its_values_and_its_plan_is_kept(
    engine: AsyncEngine,
) -> None:
    async with kept_by(engine) as kept, kept.connection() as connection:
        for size in range(8):
            values = {"numbers": [10**size] * size, "texts": ["x"] * size, "flags": [], "one": size}
            await ECHO.run(connection, values)
        cursor = await connection.execute(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements", prepare=False
        )
        [(generic, custom)] = await cursor.fetchall()
    assert (generic, custom) == (3, 0)


@pytest.mark.usefixtures("database_url")
async def test_behind_a_pooler_each_statement_has_its_settings_and_none_is_prepared(
    stores: Stores,
) -> None:
    password = stores.postgres.passwords.password_of("outbox")
    shown = FrequentStatement(select(func.current_setting("plan_cache_mode")))
    async with (
        pooler(stores.postgres.port, DATABASE, password) as bouncer,
        engine_of(bouncer.url(DATABASE)) as engine,
        kept_by(engine) as kept,
        kept.connection() as connection,
    ):
        for _ in range(10):
            assert await shown.run(connection, {}) == [("force_generic_plan",)]
            assert await ECHO.run(connection, VALUES)
        prepared = await connection.execute("SELECT count(*) FROM pg_prepared_statements")
        assert await prepared.fetchone() == (0,)


PID = FrequentStatement(select(func.pg_backend_pid()))


async def session_of(kept: KeptConnections) -> int:
    async with kept.connection() as connection:
        [(pid,)] = await PID.run(connection, {})
        return int(pid)


async def test_a_connection_is_kept_until_postgresql_ends_it(engine: AsyncEngine) -> None:
    async with kept_by(engine) as kept:
        first = await session_of(kept)
        assert await session_of(kept) == first
        async with engine.connect() as other:
            # Waits until the session has ended.
            assert await other.scalar(select(func.pg_terminate_backend(first, 10_000)))
        second = await session_of(kept)
        assert second != first
        assert await session_of(kept) == second


async def test_a_connection_to_a_server_that_became_read_only_is_not_used_again(
    engine: AsyncEngine,
) -> None:
    async def write_there(kept: KeptConnections) -> None:
        async with kept.connection() as connection:
            await connection.execute("SET default_transaction_read_only = on")
            await connection.execute("DELETE FROM senders")

    async with kept_by(engine) as kept:
        async with kept.connection(), kept.connection():
            pass
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await write_there(kept)
        async with kept.connection() as connection:
            await connection.execute("DELETE FROM senders")


async def test_an_error_of_a_statement_keeps_its_connection(engine: AsyncEngine) -> None:
    async with kept_by(engine) as kept:
        first = await session_of(kept)

        async def fail() -> None:
            async with kept.connection() as connection:
                await ECHO.run(connection, VALUES | {"numbers": [2**63]})

        with pytest.raises(psycopg.errors.NumericValueOutOfRange):
            await fail()
        assert await session_of(kept) == first


async def test_a_connection_whose_statement_was_cancelled_is_not_used_again(
    engine: AsyncEngine,
) -> None:
    async with kept_by(engine) as kept:
        first = await session_of(kept)

        async def sleep() -> None:
            async with kept.connection() as connection:
                await connection.execute("SELECT pg_sleep(60)")

        task = asyncio.create_task(sleep())
        async with engine.connect() as other:
            await eventually(lambda: is_active(other, first))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await session_of(kept) != first


async def is_active(connection: AsyncConnection, pid: int) -> bool:
    query = text("SELECT state = 'active' FROM pg_stat_activity WHERE pid = :pid")
    return bool(await connection.scalar(query, {"pid": pid}))


async def test_connections_that_are_not_kept_return_to_the_pool(engine: AsyncEngine) -> None:
    async with kept_by(engine) as kept:
        # As many as the pool has, and one more than are kept.
        async with kept.connection(), kept.connection(), kept.connection():
            pass
        async with engine.connect() as free:
            assert await free.scalar(select(literal(1))) == 1
