"""The faults of a drill in PostgreSQL and in Redis, on real servers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from redis.asyncio import Redis

from outbox_server.deploy.drill.clocks import HOW_TO_GET, clock_by_file, faketime_library, set_clock
from outbox_server.deploy.drill.database import (
    CopiedDatabase,
    are_loaded,
    fail_writes,
    heal_writes,
    markers_of,
)
from outbox_server.deploy.drill.split_brain import become_copy
from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.shared.heads.markers import mark_stale
from tests.conftest import Stores
from tests.dispatchers import options, settings_of
from tests.eventually import eventually
from tests.world import World


async def test_writes_fail_with_the_error_of_a_full_disk_until_the_fault_is_healed(
    database_url: str,
) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        assert await fail_writes(database_url, "53100", 1.0)
        assert await fail_writes(database_url, "40001", 1.0)
        with pytest.raises(errors.SerializationFailure):
            await connection.execute("UPDATE email_jobs SET attempt = 1")
        assert await fail_writes(database_url, "53100", 1.0)
        for statement in ("DELETE FROM head_markers", "UPDATE email_jobs SET attempt = 1"):
            with pytest.raises(errors.DiskFull):
                await connection.execute(statement)
        with pytest.raises(errors.DiskFull):
            async with connection.cursor().copy("COPY head_markers (sender_id) FROM STDIN"):
                pass
        assert await heal_writes(database_url)
        assert await heal_writes(database_url)
        await connection.execute("DELETE FROM head_markers")
        left = await connection.execute("SELECT 1 FROM pg_trigger WHERE tgname = 'drill_fault'")
        assert await left.fetchall() == []


async def test_the_fault_does_not_queue_for_a_locked_table(database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as paused:
        await paused.execute("LOCK TABLE email_jobs IN ROW EXCLUSIVE MODE")
        assert not await fail_writes(database_url, "53100", 1.0)
        await paused.rollback()
    assert await heal_writes(database_url)


async def test_the_clock_of_a_running_redis_steps_back_and_forth(tmp_path: Path) -> None:
    library = faketime_library()
    assert library is not None, HOW_TO_GET
    file = tmp_path / "clock"
    set_clock(file, 0)
    server = ValkeyServer(tmp_path / "valkey")
    server.environment = clock_by_file(library, file)
    await server.start()
    try:
        async with Redis.from_url(server.url) as client:

            async def is_off_by(seconds: float) -> bool:
                whole, micros = await client.time()
                return abs(whole + micros / 1e6 - time.time() - seconds) < 0.9

            await eventually(partial(is_off_by, 0))
            process = await client.info("server")
            for seconds in (-8.0, 0.0, -2.0):
                set_clock(file, seconds)
                await eventually(partial(is_off_by, seconds))
            assert (await client.info("server"))["run_id"] == process["run_id"]
    finally:
        await server.stop()


async def test_a_database_is_set_aside_and_replaced_by_a_copy_also_if_a_step_is_repeated(
    stores: Stores, new_database: Callable[[], str]
) -> None:
    url = new_database()
    name = str(conninfo_to_dict(url)["dbname"])
    databases = CopiedDatabase(lambda: stores.postgres.url("postgres", SUPERUSER), name)
    async with await psycopg.AsyncConnection.connect(url) as connected:
        await connected.execute("SELECT 1")
        for _ in range(2):
            await databases.set_aside()
            with pytest.raises(psycopg.OperationalError, match="does not exist"):
                await psycopg.AsyncConnection.connect(url)
        assert connected.broken or await ends(connected)
    copy = stores.postgres.url(databases.copy, SUPERUSER)
    for number in range(2):
        await databases.make_empty()
        async with await psycopg.AsyncConnection.connect(copy) as copying:
            await copying.execute(f"CREATE TABLE copy_{number} ()".encode())
    for _ in range(2):
        await databases.put_in_place()
    async with await psycopg.AsyncConnection.connect(url) as connected:
        tables = await connected.execute("SELECT relname FROM pg_class WHERE relname ~ '^copy_'")
        assert await tables.fetchall() == [("copy_1",)]
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        await psycopg.AsyncConnection.connect(stores.postgres.url(databases.aside, SUPERUSER))


async def ends(connection: psycopg.AsyncConnection) -> bool:
    with pytest.raises(psycopg.OperationalError):
        await connection.execute("SELECT 1")
    return True


async def test_a_change_counts_as_loaded_once_its_markers_are_gone(
    database_url: str, redis_url: str
) -> None:
    async with World(settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1"))) as world:
        sender, other = await world.sender(), await world.sender(user="bert")
        async with world.engine.begin() as connection:
            await mark_stale(connection, [sender, other])
        markers = await markers_of(database_url, "anna")
        assert markers is not None
        assert len(markers) == 1
        assert not await are_loaded(database_url, markers)
        await world.sql("DELETE FROM head_markers WHERE sender_id = %s", sender)
        assert await are_loaded(database_url, markers)
        # A later marker is of another change.
        async with world.engine.begin() as connection:
            await mark_stale(connection, [sender])
        assert await are_loaded(database_url, markers)
        assert await markers_of(database_url, "bert")
    gone = "postgresql://outbox@127.0.0.1:1/outbox"
    assert not await are_loaded(gone, markers)
    assert await markers_of(gone, "anna") is None


async def test_two_servers_of_redis_are_primaries_with_the_same_data(tmp_path: Path) -> None:
    first, second = ValkeyServer(tmp_path / "first"), ValkeyServer(tmp_path / "second")
    second.password = first.password
    try:
        await first.start()
        await second.start()
        async with (
            Redis.from_url(first.url, decode_responses=True) as one,
            Redis.from_url(second.url, decode_responses=True) as other,
        ):
            await one.set("key", "of both")
            await become_copy(second, first)
            assert await other.get("key") == "of both"
            assert (await one.role())[0] == (await other.role())[0] == "master"
            await other.set("key", "of the second")
            assert await one.get("key") == "of both"
            await become_copy(first, second)
            assert await one.get("key") == "of the second"
            assert await one.set("key", "writable")
    finally:
        await first.stop()
        await second.stop()
