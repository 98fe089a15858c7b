"""A disk that is really full: PostgreSQL's data and its WAL on a small file system."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psycopg
import pytest
from outbox.v1 import sender_pb2
from outbox.v1.batch_service_pb2 import UploadBatchRequest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.shared.database.migrating import migrate
from outbox_server.shared.states import JobState
from tests.conftest import Stores
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, options_for, reasons_of, running_scheduler
from tests.world import World, jobs_in

DISK, BALLAST, ROWS = "150m", 24 * 1024 * 1024, 20_000
EXHAUSTED = ("RESOURCE_EXHAUSTED", "DATABASE_EXHAUSTED")
UNAVAILABLE = ("UNAVAILABLE", "DATABASE_UNAVAILABLE")


@pytest.fixture
def disk() -> Iterator[Path]:
    """Return a separate small file system."""
    # Not pytest's own folder, which PostgreSQL may not enter.
    folder = Path(tempfile.mkdtemp(prefix="outbox-disk-"))
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
        )
        if mounted.returncode:
            pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
async def postgres(disk: Path, stores: Stores) -> AsyncIterator[PostgresServer]:
    """Run a PostgreSQL of the run's version on the small file system."""
    server = PostgresServer(
        disk / "data",
        log=disk.with_suffix(".log"),
        binaries=stores.postgres._binaries,
        system_user=stores.postgres._system_user,
    )
    try:
        await server.start()
        yield server
    finally:
        await server.kill()
        disk.with_suffix(".log").unlink()


async def flood(
    scheduler: Scheduler, sender: sender_pb2.Sender, name: str, rows: int
) -> tuple[int, tuple[str, str] | None]:
    """Upload a batch for next month; return the number of accepted rows, or the refusal."""

    async def messages() -> AsyncIterator[UploadBatchRequest]:
        later = datetime.now(UTC) + timedelta(days=30)
        batch = options_for(sender, request_id=name, schedule_time=later)
        yield UploadBatchRequest(options=batch)
        yield UploadBatchRequest(chunk=b"email,note\n")
        for start in range(0, rows, 1_000):
            lines = "".join(f"r{i}@b.org,{'x' * 200}\n" for i in range(start, start + 1_000))
            yield UploadBatchRequest(chunk=lines.encode())

    try:
        answer = await scheduler.batches.UploadBatch(messages(), timeout=PATIENCE)
    except grpc.aio.AioRpcError as error:
        return 0, reasons_of(error)
    return answer.batch.accepted_count, None


@pytest.mark.parametrize("log_too", [False, True])
async def test_a_full_disk_refuses_calls_with_a_retry_delay_and_loses_nothing(
    postgres: PostgresServer, redis_url: str, inbox: Inbox, disk: Path, log_too: bool
) -> None:
    await postgres.ensure_database()
    if not log_too:
        # Without this, the WAL fills the disk, and PostgreSQL stops until there is space.
        await administrate(postgres, "ALTER SYSTEM SET max_wal_size = '32MB'")
        await administrate(postgres, "SELECT pg_reload_conf()")
    await asyncio.to_thread(migrate, postgres.url())
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(BALLAST))
    values = options(postgres.url(), redis_url, inbox.url, min_gap="50ms", lease="30s")
    async with (
        World(settings_of(values)) as world,
        running_scheduler(postgres.url(), redis_url, min_gap="50ms") as scheduler,
        running(settings_of(values)),
    ):
        sender = await scheduler.sender()
        jobs = await world.schedule(await world.sender(), 150)
        accepted: Counter[str] = Counter()
        refusals: list[tuple[str, str]] = []
        doubtful: set[str] = set()
        for n in range(50):
            names = [f"{n}.{i}" for i in range(3)]
            answers = await asyncio.gather(*(flood(scheduler, sender, m, ROWS) for m in names))
            for name, (rows, refusal) in zip(names, answers, strict=True):
                accepted += Counter({name: rows})
                refusals += [refusal] if refusal else []
                doubtful |= {name} if refusal == UNAVAILABLE else set()
            # Data or WAL may be full first, depending on checkpoints.
            wanted = {UNAVAILABLE} if log_too else {UNAVAILABLE, EXHAUSTED}
            if len(refusals) >= 6 and wanted & set(refusals):
                break
        else:
            raise AssertionError(f"the disk is never full: {Counter(refusals)}")
        assert set(refusals) <= {EXHAUSTED, UNAVAILABLE}
        assert accepted

        ballast.unlink()
        await eventually(lambda: takes_again(postgres, scheduler, sender))
        await eventually(lambda: arrived(inbox, len(jobs)))
        await eventually(lambda: sent(world, jobs))

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        stored = await world.sql(
            "SELECT request_id AS name, count(*) AS n FROM batches JOIN email_jobs j"
            " ON j.batch_id = batches.id WHERE request_id LIKE '%%.%%' GROUP BY 1"
        )
        found = {row.name: row.n for row in stored}
        # PostgreSQL may end between a commit and its answer. Then the caller cannot know the
        # outcome and repeats the request. In any case the batch is stored completely or not at all.
        assert found == {**accepted, **dict.fromkeys(doubtful & found.keys(), ROWS)}
        # Sorts of this check would need files on the small disk.
        await world.sql("SET work_mem = '200MB'")
        await world.check_counts()


async def administrate(postgres: PostgresServer, statement: str) -> None:
    url = postgres.url("postgres", SUPERUSER)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(statement.encode())


async def takes(scheduler: Scheduler, sender: sender_pb2.Sender) -> bool:
    return await flood(scheduler, sender, "afterwards", 1_000) == (1_000, None)


async def takes_again(
    postgres: PostgresServer, scheduler: Scheduler, sender: sender_pb2.Sender
) -> bool:
    """Start PostgreSQL if it has ended, as a supervisor does; return whether mail is accepted.

    After the disk was full it first tries to recover, so it may end some time later.
    """
    if not postgres.child.running:
        await postgres.start()
    return await takes(scheduler, sender)


def arrived(inbox: Inbox, n: int) -> bool:
    return len(inbox.mails) >= n


async def sent(world: World, jobs: list[int]) -> bool:
    try:
        return set(jobs) <= await world.in_state(JobState.SENT)
    except psycopg.OperationalError:  # a connection that was opened before
        return False
