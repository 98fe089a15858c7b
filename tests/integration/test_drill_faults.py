"""The faults of a drill in PostgreSQL's writes and in Redis' clock, on real servers."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg import errors
from redis.asyncio import Redis

from outbox_server.deploy.drill.clocks import HOW_TO_GET, clock_by_file, faketime_library, set_clock
from outbox_server.deploy.drill.database import fail_writes, heal_writes
from outbox_server.deploy.embedded.valkey import ValkeyServer
from tests.eventually import eventually


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
