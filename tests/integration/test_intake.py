"""Intakes during which a process dies or data changes."""

from __future__ import annotations

import asyncio
import queue
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import pytest_asyncio
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import ScheduleBatchResponse, UploadBatchRequest
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_service_pb2 import DeleteSenderRequest, PauseSenderRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest

from outbox_server.shared.settings import load_settings
from tests.conftest import Stores
from tests.dispatchers import DispatcherProcess
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import (
    Scheduler,
    options_for,
    refusal_of,
    running_scheduler,
    scheduler_process,
)

TABLES = ("batches", "batch_rejections", "email_jobs", "count_deltas", "head_markers")
# Sessions that have copied rows: the scheduler's sweeps have open transactions too.
_OPEN_INTAKES = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND state LIKE 'idle in transaction%%' AND query LIKE 'RELEASE%%'"
)
_WAIT_FOR_LOCKS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
BLOCK = 5_000
# Longer than the scheduler's own waits, except its waits for callers.
SLEEP_S = 3.0


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url) as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


class Upload:
    """An upload whose data the test sends step by step."""

    def __init__(self, scheduler: Scheduler, sender: sender_pb2.Sender, **options: Any) -> None:
        self._messages: asyncio.Queue[UploadBatchRequest | None] = asyncio.Queue()
        self._messages.put_nowait(UploadBatchRequest(options=options_for(sender, **options)))
        self.call = scheduler.batches.UploadBatch(self._send())
        self._row = 0
        self.send("email,n\n")

    async def _send(self) -> AsyncIterator[UploadBatchRequest]:
        while (message := await self._messages.get()) is not None:
            yield message

    def send(self, text: str) -> None:
        self._messages.put_nowait(UploadBatchRequest(chunk=text.encode()))

    def send_rows(self, count: int) -> None:
        rows = range(self._row, self._row + count)
        self._row += count
        self.send("".join(f"user{i}@b.org,{i}\n" for i in rows))

    async def end(self) -> ScheduleBatchResponse:
        self._messages.put_nowait(None)
        async with asyncio.timeout(PATIENCE):
            return await self.call


def stored(scheduler: Scheduler) -> int:
    return sum(scheduler.value(f"SELECT count(*) FROM {table}") for table in TABLES)


async def opened(scheduler: Scheduler) -> None:
    """Wait until an intake has opened its transaction and waits for more rows."""
    await eventually(lambda: scheduler.value(_OPEN_INTAKES) == 1)


async def closed(scheduler: Scheduler) -> None:
    await eventually(lambda: scheduler.value(_OPEN_INTAKES) == 0)


async def test_a_slow_upload_of_few_rows_holds_no_transaction_open(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    upload = Upload(scheduler, sender)
    upload.send_rows(BLOCK - 1)
    await scheduler.schedule(sender)  # a round trip later
    assert scheduler.value(_OPEN_INTAKES) == 0
    upload.send_rows(1)
    await opened(scheduler)
    assert (await upload.end()).batch.accepted_count == BLOCK


async def test_a_client_that_cancels_leaves_nothing(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    upload = Upload(scheduler, sender, request_id="once")
    upload.send_rows(3 * BLOCK)
    await opened(scheduler)
    upload.call.cancel()
    await closed(scheduler)
    assert stored(scheduler) == 0
    answer = await scheduler.schedule(sender, request_id="once")
    assert not answer.replayed


_KILLED_CLIENT = """
import asyncio, sys
import grpc
from outbox.v1 import batch_pb2, batch_service_pb2_grpc
from outbox.v1.batch_service_pb2 import UploadBatchRequest

async def messages():
    options = batch_pb2.BatchOptions(
        request_id="once", sender_id=sys.argv[2], subject="Hello", body="Good day"
    )
    yield UploadBatchRequest(options=options)
    rows = "".join(f"user{i}@b.org\\n" for i in range(15_000))
    yield UploadBatchRequest(chunk=f"email\\n{rows}".encode())
    await asyncio.Event().wait()

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        await batch_service_pb2_grpc.BatchServiceStub(channel).UploadBatch(messages())

asyncio.run(main())
"""


async def test_a_client_that_is_killed_leaves_nothing(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _KILLED_CLIENT, scheduler.address, sender.sender_id
    )
    await opened(scheduler)
    client.kill()
    await client.wait()
    await closed(scheduler)
    assert stored(scheduler) == 0


@asynccontextmanager
async def separate_scheduler(
    database_url: str, redis_url: str, folder: Path
) -> AsyncIterator[tuple[DispatcherProcess, Scheduler]]:
    async with (
        scheduler_process(database_url, redis_url, folder) as (process, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        async with asyncio.timeout(PATIENCE):
            await channel.channel_ready()
        settings = load_settings(database_url=database_url, redis_url=redis_url)
        yield process, Scheduler(channel, settings, address)


async def test_a_scheduler_that_is_killed_leaves_nothing(
    scheduler: Scheduler, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with separate_scheduler(database_url, redis_url, tmp_path) as (process, doomed):
        sender = await doomed.sender()
        upload = Upload(doomed, sender, request_id="once")
        upload.send_rows(3 * BLOCK)
        await opened(scheduler)
        await process.kill()
        assert (await broken(upload.end())) in ("UNAVAILABLE", "CANCELLED")
        await closed(scheduler)
        assert stored(scheduler) == 0
        assert not (await scheduler.schedule(sender, request_id="once")).replayed


async def test_a_scheduler_paused_during_an_upload_continues_the_upload(
    scheduler: Scheduler, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with separate_scheduler(database_url, redis_url, tmp_path) as (process, sleeper):
        sender = await sleeper.sender()
        upload = Upload(sleeper, sender, request_id="once")
        upload.send_rows(2 * BLOCK)
        await opened(scheduler)
        process.pause()
        asleep = time.monotonic()
        upload.send_rows(BLOCK)
        # A client that gave up the paused scheduler repeats the request: it cannot know which one
        # runs.
        again = Upload(scheduler, sender, request_id="once")
        again.send_rows(3 * BLOCK)
        other = await scheduler.schedule(sender)
        await eventually(lambda: time.monotonic() > asleep + SLEEP_S)
        process.resume()

        first, second = await upload.end(), await again.end()
        assert first.batch.accepted_count == 3 * BLOCK
        assert first.batch.batch_id == second.batch.batch_id
        assert {first.replayed, second.replayed} == {True, False}
        assert other.batch.batch_id != first.batch.batch_id
        assert scheduler.value("SELECT count(*) FROM email_jobs") == 3 * BLOCK + 1
        assert scheduler.value("SELECT sum(n)::int FROM count_deltas") == 3 * BLOCK + 1


async def broken(call: Awaitable[ScheduleBatchResponse]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name


async def test_a_request_that_waits_for_an_equal_one_runs_if_that_fails(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    first = Upload(scheduler, sender, request_id="once")
    first.send_rows(BLOCK)
    await opened(scheduler)
    second = asyncio.ensure_future(scheduler.schedule(sender, request_id="once"))
    await eventually(lambda: scheduler.value(_WAIT_FOR_LOCKS) == 1)
    first.call.cancel()
    answer = await second
    assert (answer.replayed, answer.batch.accepted_count) == (False, 1)


async def test_a_pause_does_not_wait_for_an_upload(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    upload = Upload(scheduler, sender)
    upload.send_rows(BLOCK)
    await opened(scheduler)
    pause = PauseSenderRequest(sender_id=sender.sender_id)
    await scheduler.senders.PauseSender(pause, timeout=PATIENCE)
    assert (await upload.end()).batch.accepted_count == BLOCK


async def test_a_sender_that_is_deleted_during_an_upload_gets_no_jobs(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    upload = Upload(scheduler, sender)
    upload.send_rows(BLOCK)
    await opened(scheduler)
    await scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=sender.sender_id))
    refusal = await refusal_of(upload.end())
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "SENDER_NOT_FOUND")
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 0


async def test_an_address_that_is_suppressed_during_an_upload_gets_no_mail(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    upload = Upload(scheduler, sender)
    upload.send_rows(BLOCK)
    await opened(scheduler)
    for number in (7, BLOCK + 7):  # one that is stored already and one that follows
        await scheduler.suppressions.CreateSuppression(
            CreateSuppressionRequest(
                user_id="ann", suppression=Suppression(email=f"USER{number}@b.org")
            )
        )
    upload.send_rows(BLOCK)
    batch = (await upload.end()).batch
    assert (batch.accepted_count, batch.suppressed_count) == (2 * BLOCK - 2, 2)
    assert batch.counts.scheduled_count == 2 * BLOCK - 2
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 2 * BLOCK - 2


async def test_an_address_that_is_suppressed_right_before_the_commit_gets_no_mail(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    with psycopg.connect(scheduler.settings.database_url) as connection:
        # Stops the intake after its last check of the suppressions.
        connection.execute("SELECT FROM senders FOR NO KEY UPDATE")
        accepting = asyncio.ensure_future(scheduler.schedule(sender))
        await eventually(lambda: scheduler.value(_WAIT_FOR_LOCKS) == 1)
        suppressing = asyncio.ensure_future(
            scheduler.suppressions.CreateSuppression(
                CreateSuppressionRequest(user_id="ann", suppression=Suppression(email="a@b.org"))
            )
        )
        await eventually(lambda: scheduler.value(_WAIT_FOR_LOCKS) == 2)
    await accepting
    await suppressing
    assert scheduler.rows("SELECT state FROM email_jobs") == [(7,)]


async def test_a_sender_is_not_deleted_right_before_the_commit_of_its_jobs(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    with psycopg.connect(scheduler.settings.database_url) as connection:
        # Stops the intake after its last check of the sender.
        await asyncio.to_thread(connection.execute, "LOCK TABLE count_deltas IN SHARE MODE")
        accepting = asyncio.ensure_future(scheduler.schedule(sender))
        await eventually(lambda: scheduler.value(_WAIT_FOR_LOCKS) == 1)
        deleting = asyncio.ensure_future(
            refusal_of(
                scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=sender.sender_id))
            )
        )
        await eventually(lambda: scheduler.value(_WAIT_FOR_LOCKS) == 2)
    await accepting
    assert (await deleting).reason == "SENDER_HAS_OPEN_JOBS"


async def test_bad_rows_late_in_an_upload_refuse_the_whole_upload(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    upload = Upload(scheduler, sender)
    upload.send_rows(2 * BLOCK)
    upload.send("bad\0row,x\n")
    refusal = await refusal_of(upload.end())
    assert refusal.reason == "CSV_NUL"
    assert f"row {2 * BLOCK + 1}" in refusal.message
    assert stored(scheduler) == 0


async def test_a_refusal_does_not_wait_for_the_next_chunk(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    upload = Upload(scheduler, sender, mode=batch_pb2.BATCH_MODE_STRICT)
    upload.send("bad,x\n" * BLOCK)
    refusal = await refusal_of(upload.call)
    assert refusal.reason == "ROW_REJECTED"


async def test_a_batch_is_accepted_while_redis_is_unreachable(
    scheduler: Scheduler, sender: sender_pb2.Sender, stores: Stores
) -> None:
    await stores.redis.stop()
    try:
        answer = await scheduler.schedule(sender)
    finally:
        await stores.redis.start()
    assert answer.batch.accepted_count == 1
    assert any("queue cannot be loaded" in notice for notice in answer.notices)
    # The marker makes a dispatcher load it later.
    assert scheduler.value("SELECT count(*) FROM head_markers") == 1


async def test_a_lost_connection_to_postgresql_refuses_only_the_current_batch(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    # A blocking client is used: one of grpc.aio waits forever if it is refused while it writes.
    messages: queue.SimpleQueue[UploadBatchRequest | None] = queue.SimpleQueue()
    messages.put(UploadBatchRequest(options=options_for(sender)))
    rows = "".join(f"user{i}@b.org\n" for i in range(BLOCK))
    messages.put(UploadBatchRequest(chunk=f"email\n{rows}".encode()))
    with grpc.insecure_channel(scheduler.address) as channel:
        upload = BatchServiceStub(channel).UploadBatch
        call = asyncio.create_task(
            asyncio.to_thread(upload, iter(messages.get, None), timeout=PATIENCE)
        )
        await opened(scheduler)
        with psycopg.connect(scheduler.settings.database_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE 'RELEASE%'"
            )
        messages.put(None)
        refusal = await refusal_of(call)
    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
    assert stored(scheduler) == 0
    assert (await scheduler.schedule(sender)).batch.accepted_count == 1


def test_memory_does_not_grow_with_an_upload(database_url: str, redis_url: str) -> None:
    grown = _grown_kib(database_url, redis_url)
    # 100,000 rows are 8 MB: ten times as many rows as fit into the first blocks.
    assert grown < 12 * 1024


def _grown_kib(database_url: str, redis_url: str) -> int:
    async def run() -> int:
        async with running_scheduler(database_url, redis_url) as scheduler:
            sender = await scheduler.sender()

            def rows(count: int) -> Iterator[bytes]:
                yield b"email,first,last,company\n"
                for start in range(0, count, 1_000):
                    yield "".join(
                        f"user{i}@example.org,First{i},Last{i},A Company of {i}\n"
                        for i in range(start, start + 1_000)
                    ).encode()

            async def upload(count: int) -> None:
                async def messages() -> AsyncIterator[UploadBatchRequest]:
                    yield UploadBatchRequest(
                        options=options_for(sender, body="{{ first }} {{ last }} {{ company }}")
                    )
                    for chunk in rows(count):
                        yield UploadBatchRequest(chunk=chunk)

                answer = await scheduler.batches.UploadBatch(messages())
                assert answer.batch.accepted_count == count

            await upload(20_000)
            before = _peak_kib()
            await upload(120_000)
            return _peak_kib() - before

    return asyncio.run(run())


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


async def test_calls_cancelled_during_a_statement_leave_a_usable_connection(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    pause = PauseSenderRequest(sender_id=sender.sender_id)
    with psycopg.connect(scheduler.settings.database_url) as connection:
        connection.execute("SELECT FROM senders FOR UPDATE")
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError):
                await scheduler.senders.PauseSender(pause, timeout=0.2)
    for _ in range(2 * scheduler.settings.database_pool):
        await scheduler.schedule(sender)


async def test_a_scheduler_that_stops_ends_a_stalled_upload(
    database_url: str, redis_url: str
) -> None:
    async with asyncio.timeout(PATIENCE):
        async with running_scheduler(database_url, redis_url, shutdown_grace="500ms") as scheduler:
            upload = Upload(scheduler, await scheduler.sender())
            upload.send_rows(BLOCK)
            await opened(scheduler)
            scheduler.stop()
            assert await broken(upload.call) in ("UNAVAILABLE", "CANCELLED")
    assert stored(scheduler) == 0


async def test_stalled_uploads_do_not_delay_a_batch_sent_in_one_message(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    uploads = [Upload(scheduler, sender) for _ in range(scheduler.settings.database_pool)]
    for upload in uploads:
        upload.send_rows(BLOCK)
    await eventually(lambda: scheduler.value(_OPEN_INTAKES) >= 2)
    async with asyncio.timeout(PATIENCE):
        assert (await scheduler.schedule(sender)).batch.accepted_count == 1
    for upload in uploads:
        upload.call.cancel()
    await closed(scheduler)
