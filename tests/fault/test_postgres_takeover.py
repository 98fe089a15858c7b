"""The replica of a drill takes over from PostgreSQL, and nothing that was committed is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from outbox_server.deploy.child import processes_in
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.deploy.embedded.replication import Replication
from outbox_server.shared.database.engine import create_engine, snapshot
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores
from tests.eventually import eventually


@dataclass
class Keeper:
    """What a drill's stack is for the replication: it knows which server is the primary."""

    postgres: PostgresServer


@pytest.fixture
async def keeper(stores: Stores) -> AsyncIterator[Keeper]:
    """A primary of its own, with a table, and nothing that starts it again."""
    # Beside the run's own PostgreSQL, in a folder that its user may enter.
    folder = Path(tempfile.mkdtemp(dir=stores.postgres.folder.parent))
    os.chmod(folder, 0o711)  # noqa: PTH101 - a blocking call either way
    server = PostgresServer(
        folder / "postgres",
        durable=False,
        binaries=stores.postgres._binaries,
        system_user=stores.postgres._system_user,
    )
    server.replicated = True
    await server.start()
    await server.ask("CREATE TABLE kept (number int)")
    try:
        yield Keeper(server)
    finally:
        await server.stop()
        shutil.rmtree(folder)


async def insert(keeper: Keeper, number: int) -> None:
    await keeper.postgres.ask(f"INSERT INTO kept VALUES ({number})")


async def insert_until_cancelled(keeper: Keeper, answered: list[int]) -> None:
    """Insert numbers, and note those whose commit was answered."""
    number = 0
    while True:
        number += 1
        with suppress(psycopg.Error):
            await insert(keeper, number)
            answered.append(number)
        await asyncio.sleep(0)


async def ten_more(answered: list[int]) -> None:
    before = len(answered)
    await eventually(lambda: len(answered) >= before + 10)


async def test_replicas_take_over_in_turn_and_have_every_commit_that_was_answered(
    keeper: Keeper,
) -> None:
    replication = Replication(keeper)
    answered: list[int] = []
    primaries = [keeper.postgres]
    try:
        await replication.start()
        inserting = asyncio.create_task(insert_until_cancelled(keeper, answered))
        try:
            for _ in range(2):
                await ten_more(answered)
                await replication.take_over()
                primaries.append(keeper.postgres)
            await ten_more(answered)
        finally:
            inserting.cancel()
            await asyncio.wait({inserting})
        kept = await keeper.postgres.ask("SELECT array_agg(number) FROM kept")
        assert set(answered) <= set(kept)
        assert len({server.folder for server in primaries}) == 3
        assert not any(server.running for server in primaries[:-1])
    finally:
        await replication.stop()
    assert not keeper.postgres.running


async def test_commits_wait_for_a_replica_that_hangs_and_survive_a_kill_of_the_primary(
    keeper: Keeper,
) -> None:
    replication = Replication(keeper)
    try:
        await replication.start()
        [replica] = replication._all
        processes = processes_in(replica.folder, "postgres")
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        inserting = asyncio.create_task(insert(keeper, 1))
        waiting = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        try:
            await eventually(lambda: keeper.postgres.ask(waiting))
            assert not inserting.done()
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
            await asyncio.wait({inserting})
        await inserting
        # It recovers, and its replica finds it again.
        await keeper.postgres.kill()
        await keeper.postgres.start()
        await insert(keeper, 2)
        await replication.take_over()
        assert await keeper.postgres.ask("SELECT count(*) FROM kept") == 2
    finally:
        await replication.stop()


async def test_a_client_of_a_replica_that_is_not_promoted_yet_leaves_it(keeper: Keeper) -> None:
    """Also with a connection that was used for a snapshot, which only reads."""
    await keeper.postgres.ensure_database()
    replication = Replication(keeper)
    try:
        await replication.start()
        [replica] = replication._all
        engine = create_engine(load_settings(database_url=replica.url()))
        try:
            async with snapshot(engine) as connection:
                assert await connection.scalar(text("SELECT pg_is_in_recovery()"))
            with pytest.raises(OperationalError, match="read-only") as caught:
                async with engine.begin() as connection:
                    await connection.execute(text("CREATE TABLE written ()"))
            assert caught.value.connection_invalidated
        finally:
            await engine.dispose()
    finally:
        await replication.stop()
