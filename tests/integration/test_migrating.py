"""Migrations of a database in use: locks, interruptions, two migrators, and their records."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Event

import psycopg
import pytest

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.migrating import MigrationBlockedError, migrate
from outbox_server.shared.database.schema import REVISION, SchemaRevision, read_revision
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings
from tests.eventually import PATIENCE, eventually
from tests.release_after import INDEX, LAST, VERSIONS, contract_step

PROGRAM = """
import sys
from pathlib import Path
from outbox_server.shared.database.migrating import migrate
migrate(sys.argv[1], more_versions=Path(sys.argv[2]))
"""


def value(url: str, statement: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return row and row[0]


def revision(url: str) -> object:
    return value(url, "SELECT version_num FROM alembic_version")


def is_valid(url: str) -> object:
    return value(url, f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{INDEX}')")


def migrators(url: str) -> object:
    return value(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox migrate'"
        " AND datname = current_database()",
    )


async def test_a_locked_table_is_tried_again_until_it_is_free(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    said: list[str] = []
    tried = Event()

    def say(line: str) -> None:
        said.append(line)
        tried.set()

    with psycopg.connect(url) as holder:
        holder.execute("SELECT id FROM email_jobs")
        pid = holder.info.backend_pid
        migration = asyncio.create_task(
            asyncio.to_thread(migrate, url, say=say, more_versions=VERSIONS)
        )
        assert await asyncio.to_thread(tried.wait, PATIENCE)
        assert revision(url) == REVISION
        holder.rollback()
    await migration
    assert f"pid {pid}" in said[0]
    assert "a table is locked" in said[0]
    assert revision(url) == LAST
    assert is_valid(url)


def test_a_table_that_stays_locked_gives_an_error_that_names_the_holder(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    with psycopg.connect(url) as holder:
        holder.execute("SELECT id FROM email_jobs")
        with pytest.raises(MigrationBlockedError, match=f"pid {holder.info.backend_pid}"):
            migrate(url, more_versions=VERSIONS, patience=timedelta(0))
    assert revision(url) == REVISION


async def test_a_migration_that_was_killed_while_it_built_an_index_is_resumed(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    migrate(url, more_versions=VERSIONS, revision="9003")
    with psycopg.connect(url) as holder:
        # The build waits for older transactions, so the kill surely happens during the build.
        holder.execute("INSERT INTO installation DEFAULT VALUES")
        holder.execute("LOCK TABLE email_jobs IN ROW EXCLUSIVE MODE")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, url, VERSIONS, cwd=Path(__file__).parents[2]
        )
        await eventually(lambda: is_valid(url) is False)
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        # Its session ends too, although it waits inside PostgreSQL.
        await eventually(lambda: migrators(url) == 0)
        assert is_valid(url) is False
    assert revision(url) == "9003"
    migrate(url, more_versions=VERSIONS)
    assert is_valid(url)
    assert revision(url) == LAST


async def test_an_index_build_shows_its_progress_and_the_transaction_that_it_waits_for(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    migrate(url, more_versions=VERSIONS, revision="9003")
    said: list[str] = []
    with psycopg.connect(url) as holder:
        holder.execute("LOCK TABLE email_jobs IN ROW EXCLUSIVE MODE")
        pid = holder.info.backend_pid
        building = asyncio.create_task(
            asyncio.to_thread(migrate, url, say=said.append, more_versions=VERSIONS)
        )
        await eventually(lambda: said)
    await building
    assert said[0] == f"index: waiting for writers before build, for the transaction of pid {pid}"
    assert said[-1].startswith(f"{LAST}: ")
    assert is_valid(url)


async def test_a_second_migrator_waits_for_the_first(new_database: Callable[[], str]) -> None:
    url = new_database()
    said: list[str] = []
    waits = Event()

    def say(line: str) -> None:
        said.append(line)
        waits.set()

    with psycopg.connect(url, autocommit=True) as first:
        first.execute("SELECT pg_advisory_lock(7402311915)")
        with pytest.raises(MigrationBlockedError, match="another process migrates"):
            await asyncio.to_thread(migrate, url, patience=timedelta(0))
        second = asyncio.create_task(
            asyncio.to_thread(migrate, url, say=say, more_versions=VERSIONS)
        )
        assert await asyncio.to_thread(waits.wait, PATIENCE)
        assert "another process migrates this database" in said[0]
        assert revision(url) == REVISION
    await second
    assert revision(url) == LAST


async def test_two_migrators_of_an_empty_database_do_not_wait_for_each_other(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, url, VERSIONS, cwd=Path(__file__).parents[2]
        )
        for _ in range(2)
    ]
    async with asyncio.timeout(PATIENCE):
        assert [await process.wait() for process in processes] == [0, 0]
    assert revision(url) == LAST
    assert is_valid(url)


def test_the_migrations_of_an_older_release_leave_a_newer_schema_as_it_is(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    url = new_database()
    versions = contract_step(tmp_path, oldest="9002")
    migrate(url, more_versions=versions, revision=LAST)
    said: list[str] = []
    migrate(url, say=said.append)
    assert said == [f"the schema is at revision {LAST}, newer than this release: it stays"]
    migrate(url, more_versions=versions)
    with pytest.raises(ConfigurationError, match="run a newer release"):
        migrate(url)
    assert revision(url) == "9005"


async def recorded(url: str) -> SchemaRevision:
    engine = create_engine(load_settings(database_url=url))
    try:
        return await read_revision(engine)
    finally:
        await engine.dispose()


async def test_an_expand_step_keeps_older_code_running_and_a_contract_step_refuses_it(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    url = new_database()
    versions = contract_step(tmp_path, oldest="9002")
    await asyncio.to_thread(migrate, url, more_versions=versions, revision=LAST)
    expanded = await recorded(url)
    assert expanded == SchemaRevision(LAST, None)
    expanded.check(REVISION)
    await asyncio.to_thread(migrate, url, more_versions=versions)
    contracted = await recorded(url)
    assert contracted == SchemaRevision("9005", "9002")
    contracted.check("9002")
    with pytest.raises(ConfigurationError, match=f"this release has {REVISION}: run a newer"):
        contracted.check(REVISION)


async def test_a_database_without_a_schema_has_no_revision(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE alembic_version DROP COLUMN oldest_revision")
    assert await recorded(url) == SchemaRevision(REVISION, None)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE alembic_version")
    assert await recorded(url) == SchemaRevision("", None)
