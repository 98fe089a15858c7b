"""The check of PostgreSQL by health, while tables are locked."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from urllib.parse import urlsplit

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.services.dispatcher.storage.turning import TURN
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.models import Base
from outbox_server.shared.database.schema import SchemaGuard
from outbox_server.shared.database.serving import OF_EACH_MAIL, check_serving
from outbox_server.shared.heads.statements import HEADS_STATEMENT, HISTORY_STATEMENT
from outbox_server.shared.settings import load_settings
from outbox_server.shared.store_trouble import trouble_of
from tests.conftest import Stores
from tests.eventually import eventually


def test_the_tables_of_each_mail_are_those_of_the_statements_of_dispatchers(
    database_url: str,
) -> None:
    with psycopg.connect(database_url) as connection:
        triggers = connection.execute(
            "SELECT prosrc FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid"
            " WHERE tgrelid = 'email_jobs'::regclass AND NOT tgisinternal"
        ).fetchall()
    assert triggers
    statements = [TURN.text, str(HEADS_STATEMENT), str(HISTORY_STATEMENT)]
    statements += [source for (source,) in triggers]
    used = {
        table
        for table in Base.metadata.tables
        if any(
            re.search(rf"\b(?:FROM|JOIN|INTO|UPDATE|,)\s+{table}\b", text) for text in statements
        )
    }
    assert used == OF_EACH_MAIL


@pytest_asyncio.fixture(params=[False, True], ids=["transactions", "single statements"])
async def engine(database_url: str, request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    # So that a check fails instead of waiting.
    limit = timedelta(milliseconds=500)
    settings = load_settings(database_url=database_url, auth="off")
    engine = create_engine(
        settings, lock_timeout=limit, single_statements=request.param, lookups_only=request.param
    )
    yield engine
    await engine.dispose()


async def lock(holder: psycopg.AsyncConnection, table: str) -> None:
    await holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())


async def test_a_locked_table_that_no_mail_needs_is_no_trouble(
    engine: AsyncEngine, database_url: str
) -> None:
    """As by VACUUM FULL. Mail flows meanwhile."""
    async with await psycopg.AsyncConnection.connect(database_url) as holder:
        for table in ("webhooks", "audit_events", "api_keys"):
            await lock(holder, table)
        await check_serving(engine)
    async with engine.connect() as connection:
        left = await connection.exec_driver_sql("SHOW lock_timeout")
        assert left.scalar() == "500ms"


@pytest.mark.parametrize("table", ["attempts", "email_jobs", "job_events", "senders"])
async def test_a_locked_table_of_each_mail_is_a_trouble(
    engine: AsyncEngine, database_url: str, table: str
) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as holder:
        await lock(holder, table)
        with pytest.raises(DBAPIError) as caught:
            await check_serving(engine)
    assert trouble_of(caught.value).kind == "locked"


@pytest.mark.parametrize("table", ["webhooks", "senders"])
async def test_a_missing_column_of_any_table_is_a_trouble(engine: AsyncEngine, table: str) -> None:
    column = [each.name for each in Base.metadata.tables[table].columns][-1]
    async with engine.connect() as connection:
        await connection.exec_driver_sql(f"ALTER TABLE {table} RENAME COLUMN {column} TO gone")
        await connection.commit()
        try:
            with pytest.raises(DBAPIError) as caught:
                await check_serving(engine)
        finally:
            await connection.exec_driver_sql(f"ALTER TABLE {table} RENAME COLUMN gone TO {column}")
            await connection.commit()
    assert trouble_of(caught.value).kind == "column missing"


async def test_health_notices_a_missing_column_and_reports_it_until_it_is_back(
    engine: AsyncEngine,
) -> None:
    """Not every check asks for all columns, but each one does while a column is missing."""
    guard = SchemaGuard(engine)

    async def fails() -> bool:
        try:
            await guard.check()
        except DBAPIError as error:
            return trouble_of(error).kind == "column missing"
        return False

    assert not await fails()
    async with engine.connect() as connection:
        await connection.exec_driver_sql("ALTER TABLE webhooks RENAME COLUMN url TO gone")
        await connection.commit()
        try:
            await eventually(fails)
            assert [await fails() for _ in range(3)] == [True] * 3
        finally:
            await connection.exec_driver_sql("ALTER TABLE webhooks RENAME COLUMN gone TO url")
            await connection.commit()
    assert not await fails()


async def test_health_notices_a_server_that_does_not_write_at_the_next_check(
    engine: AsyncEngine, stores: Stores, database_url: str
) -> None:
    guard = SchemaGuard(engine)
    # So that no check of all tables notices it.
    guard._whole_at = math.inf
    await guard.check()
    name = urlsplit(database_url).path.lstrip("/")
    async with await psycopg.AsyncConnection.connect(
        stores.postgres.url(name, SUPERUSER), autocommit=True
    ) as admin:
        await admin.execute(
            f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode()
        )
        try:
            await engine.dispose()
            with pytest.raises(DBAPIError) as caught:
                await guard.check()
        finally:
            await admin.execute(
                f"ALTER DATABASE {name} RESET default_transaction_read_only".encode()
            )
    assert trouble_of(caught.value).kind == "read-only server"


@pytest.mark.parametrize("table", ["audit_events", "batches", "change_requests", "email_jobs"])
async def test_a_missing_privilege_to_accept_batches_is_a_trouble(
    engine: AsyncEngine, stores: Stores, database_url: str, table: str
) -> None:
    url = stores.postgres.url(urlsplit(database_url).path.lstrip("/"), SUPERUSER)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as admin:
        await admin.execute(f"REVOKE INSERT ON {table} FROM outbox".encode())
        try:
            with pytest.raises(DBAPIError) as caught:
                await check_serving(engine)
        finally:
            await admin.execute(f"GRANT INSERT ON {table} TO outbox".encode())
    assert trouble_of(caught.value).kind == "permission denied"
