"""The continuous backup of docs/operating.md: pg_basebackup, pg_receivewal, and a lost machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.deploy.embedded.system_user import user_for_postgres
from outbox_server.deploy.embedded.wheels import postgres_binaries
from outbox_server.shared.states import JobState
from tests.conftest import Stores, _build_schema
from tests.dispatchers import DispatcherProcess, options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.world import World, jobs_in

ROOT: Final = Path(__file__).parents[2]
# The documented lines.
RECEIVE: Final = ("pg_receivewal", "--synchronous", "--directory")
BACKUP: Final = ("pg_basebackup", "--wal-method=none", "--checkpoint=fast", "--pgdata")
WAIT_FOR_RECEIVER: Final = "ALTER SYSTEM SET synchronous_standby_names = 'pg_receivewal'"
RECOVERY: Final = ("restore_command = 'cp archive/%f %p'", "synchronous_standby_names = ''")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user may enter."""
    made = Path(tempfile.mkdtemp(prefix="outbox-archive-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@asynccontextmanager
async def postgres_in(folder: Path, stores: Stores) -> AsyncIterator[PostgresServer]:
    """Run a PostgreSQL of the run's version."""
    server = PostgresServer(
        folder,
        durable=False,
        binaries=stores.postgres._binaries,
        system_user=stores.postgres._system_user,
    )
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


@asynccontextmanager
async def tool(stores: Stores, name: str, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program of PostgreSQL; end it at the end of the block."""
    program = (stores.postgres._binaries or postgres_binaries()) / name
    process = await asyncio.create_subprocess_exec(program, *words)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def is_true(url: str, question: str) -> bool:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(question.encode()).fetchone()
    return row is not None and bool(row[0])


def change(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())
        connection.execute("SELECT pg_reload_conf()")


async def lose_the_machine(
    folder: Path, stores: Stores, redis_url: str, inbox: Inbox
) -> tuple[Path, Path, list[int]]:
    """Back up while mail is sent, then kill PostgreSQL and the dispatcher.

    Returns:
        The base backup, the folder with the WAL, and all jobs that were accepted.
    """
    base, archive = folder / "base", folder / "archive"
    archive.mkdir()
    async with postgres_in(folder / "lost", stores) as primary:
        await primary.ensure_database()
        await asyncio.to_thread(_build_schema, primary.url())
        admin = primary.url("postgres", "postgres")
        receiving = (*RECEIVE[1:], str(archive), "--no-loop", "--dbname", admin)
        async with tool(stores, RECEIVE[0], *receiving):
            waits = "SELECT count(*) FROM pg_stat_replication WHERE {}"
            await eventually(lambda: is_true(admin, waits.format("state = 'streaming'")))
            change(admin, WAIT_FOR_RECEIVER)
            await eventually(lambda: is_true(admin, waits.format("sync_state = 'sync'")))
            values = options(primary.url(), redis_url, inbox.url, min_gap="20ms")
            dispatcher = DispatcherProcess(values, folder / "dispatcher.log")
            async with World(settings_of(values)) as world:
                senders = [await world.sender() for _ in range(4)]
                jobs = [job for sender in senders for job in await world.schedule(sender, 40)]
                await dispatcher.start()
                try:
                    await eventually(lambda: len(inbox.mails) >= 20)
                    backing_up = (*BACKUP[1:], str(base), "--dbname", admin)
                    async with tool(stores, BACKUP[0], *backing_up) as process:
                        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
                    at_backup = len(inbox.mails)
                    # Accepted after the base backup.
                    jobs += await world.schedule(senders[0], 40)
                    await eventually(lambda: len(inbox.mails) >= at_backup + 20)
                finally:
                    await asyncio.gather(primary.kill(), dispatcher.kill())
                await world.redis.flushall()
    return base, archive, jobs


def prepare_recovery(base: Path, archive: Path) -> None:
    """Do what the documentation says between the loss and the start of the new server."""
    shutil.copytree(archive, base / "archive")
    for partial in (base / "archive").glob("*.partial"):
        partial.rename(partial.with_suffix(""))
    with (base / "postgresql.auto.conf").open("a") as settings:
        settings.writelines(f"{line}\n" for line in RECOVERY)
    (base / "recovery.signal").touch()


async def test_after_the_loss_of_the_machine_nothing_is_lost_and_nothing_is_sent_twice(
    folder: Path, stores: Stores, redis_url: str, inbox: Inbox
) -> None:
    base, archive, jobs = await lose_the_machine(folder, stores, redis_url, inbox)
    arrived = set(jobs_in(inbox.mails))
    assert len(arrived) < len(jobs)
    prepare_recovery(base, archive)
    user = user_for_postgres(stores.postgres._system_user)
    if user is not None:
        for path in (base, *base.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)
    async with postgres_in(base, stores) as restored:
        admin = restored.url("postgres", "postgres")
        await eventually(lambda: is_true(admin, "SELECT NOT pg_is_in_recovery()"))
        values = options(restored.url(), redis_url, inbox.url, min_gap="20ms", lease="2s")
        settings = settings_of({**values, "uncertain_policy": "hold"})
        async with World(settings) as world:
            assert {row.id for row in await world.sql("SELECT id FROM email_jobs")} == set(jobs)
            sent = await world.in_state(JobState.SENT)
            # Only mail that was being transmitted is not recorded as sent.
            assert sent <= arrived <= sent | await world.in_state(JobState.SENDING)
            async with running(settings):

                async def all_ended() -> bool:
                    return not await world.in_state(JobState.SCHEDULED, JobState.SENDING)

                await eventually(all_ended)
            held = await world.in_state(JobState.UNCERTAIN)
            arrivals = jobs_in(inbox.mails)
            assert set(arrivals) | held == set(jobs)
            assert max(arrivals.values()) == 1
            await world.check_counts()


def test_the_documented_commands_are_the_tested_ones() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    for words in (" ".join(RECEIVE), " ".join(BACKUP), WAIT_FOR_RECEIVER, *RECOVERY):
        assert words in page
