"""An overloaded scheduler refuses calls with a retry delay, and its memory stays bounded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from outbox.v1 import batch_service_pb2, sender_pb2, sender_service_pb2

from outbox_server.services.scheduler import intake
from outbox_server.shared.fair_shares import PATIENCE as IN_LINE
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores
from tests.dispatchers import DispatcherProcess
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import (
    Scheduler,
    options_for,
    reasons_of,
    running_scheduler,
    scheduler_process,
)


async def pressed(call: Awaitable[Any]) -> tuple[str, str]:
    """Return code and reason of a refusal that must have a retry delay."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(PATIENCE):
            await call
    return reasons_of(caught.value)


# PostgreSQL is full or unreachable -----------------------------------------------------------


@pytest.mark.parametrize("table", ["email_jobs", "batches", "count_deltas"])
async def test_a_full_disk_refuses_the_batch_and_a_later_try_succeeds(
    database_url: str, redis_url: str, table: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        await scheduler.define(
            "CREATE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'could not extend file: No space left' USING ERRCODE = '53100';"
            " END $$"
        )
        try:
            await scheduler.define(
                f"CREATE TRIGGER full_disk BEFORE INSERT ON {table}"
                " FOR EACH ROW EXECUTE FUNCTION disk_full()",
            )
            refused = await pressed(scheduler.schedule(sender, request_id="once"))
            refused_upload = await pressed(scheduler.batches.UploadBatch(upload(sender)))
        finally:
            await scheduler.define("DROP FUNCTION disk_full CASCADE")

        assert refused == refused_upload == ("RESOURCE_EXHAUSTED", "DATABASE_EXHAUSTED")
        assert scheduler.value("SELECT count(*) FROM email_jobs") == 0
        assert not (await scheduler.schedule(sender, request_id="once")).replayed


async def test_calls_are_unavailable_while_postgresql_has_no_free_connection(
    database_url: str, redis_url: str, stores: Stores
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        with psycopg.connect(stores.postgres.url("postgres", "postgres"), autocommit=True) as admin:
            admin.execute("ALTER ROLE outbox CONNECTION LIMIT 0")
            try:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE usename = 'outbox'"
                )
                refused = await pressed(scheduler.schedule(sender))
            finally:
                admin.execute("ALTER ROLE outbox CONNECTION LIMIT -1")
        assert refused == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        assert (await scheduler.schedule(sender)).batch.accepted_count == 1


# A flood -------------------------------------------------------------------------------------


async def test_a_flood_while_the_database_hangs_is_refused_at_once(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_WAITING", 3)
    async with running_scheduler(database_url, redis_url) as scheduler:
        sender = await scheduler.sender()
        with psycopg.connect(database_url) as holder:
            # In a thread: the server in this process may have to end a transaction first.
            await asyncio.to_thread(holder.execute, "LOCK TABLE batches IN ACCESS EXCLUSIVE MODE")
            flood = [asyncio.ensure_future(scheduler.schedule(sender)) for _ in range(40)]
            await eventually(lambda: sum(call.done() for call in flood) == 40 - 4 - 3)
            refused = Counter(
                reasons_of(error)
                for call in flood
                if call.done() and isinstance(error := call.exception(), grpc.aio.AioRpcError)
            )
            assert refused == {("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS"): 33}
            # Other callers have separate places and connections.
            await scheduler.senders.GetSender(
                sender_service_pb2.GetSenderRequest(sender_id=sender.sender_id), timeout=PATIENCE
            )
        answers = await asyncio.gather(*flood, return_exceptions=True)
        assert sum(not isinstance(answer, BaseException) for answer in answers) == 7
        assert scheduler.value("SELECT count(*) FROM batches") == 7


def peak_mib(child: DispatcherProcess) -> float:
    status = Path(f"/proc/{child.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# A row of half a MiB in a column that no template uses.
ROW = b"a@b.org," + b"x" * (512 * 1024) + b"\n"


async def upload(
    sender: sender_pb2.Sender,
) -> AsyncIterator[batch_service_pb2.UploadBatchRequest]:
    yield batch_service_pb2.UploadBatchRequest(options=options_for(sender))
    yield batch_service_pb2.UploadBatchRequest(chunk=b"email,note\n")
    yield batch_service_pb2.UploadBatchRequest(chunk=ROW)


@pytest.mark.parametrize(("kind", "calls"), [("uploads", 200), ("batches", 100)])
async def test_a_flood_ends_and_does_not_grow_the_schedulers_memory(
    database_url: str, redis_url: str, tmp_path: Path, kind: str, calls: int
) -> None:
    async with AsyncExitStack() as stack:
        process, address = await stack.enter_async_context(
            scheduler_process(database_url, redis_url, tmp_path)
        )
        # Separate connections: flow control would slow down a single one.
        schedulers = [
            Scheduler(
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(
                        address, options=[("grpc.use_local_subchannel_pool", 1)]
                    )
                ),
                load_settings(database_url=database_url),
                address,
            )
            for _ in range(20)
        ]
        await eventually(lambda: serves(schedulers[0]))
        sender = await schedulers[0].sender()
        await schedulers[0].schedule(sender)
        before = peak_mib(process)

        csv = b"email,note\n" + ROW

        def call(n: int) -> Awaitable[Any]:
            scheduler = schedulers[n % 20]
            if kind == "uploads":
                return scheduler.batches.UploadBatch(upload(sender))
            return scheduler.schedule(sender, csv)

        # Calls that waited in line until their patience ended, as on a busy machine.
        late: list[int] = []

        async def watched(n: int) -> Any:
            began = time.monotonic()
            try:
                return await call(n)
            except grpc.aio.AioRpcError:
                if time.monotonic() - began >= IN_LINE.total_seconds():
                    late.append(n)
                raise

        async with asyncio.timeout(PATIENCE):
            answers = await asyncio.gather(
                *(watched(n) for n in range(calls)), return_exceptions=True
            )

        accepted = [answer for answer in answers if not isinstance(answer, BaseException)]
        refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert len(accepted) + len(refused) == calls
        for error in refused:
            assert reasons_of(error) == ("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS")
        assert all(answer.batch.accepted_count == 1 for answer in accepted)
        assert schedulers[0].value("SELECT count(*) FROM email_jobs") == 1 + len(accepted)
        assert len(accepted) + len(late) >= 20
        assert accepted
        # Measured: 160 MiB (200 uploads of 1 MiB without a bound: 1,770 MiB).
        assert peak_mib(process) - before < 250


async def serves(scheduler: Scheduler) -> bool:
    try:
        await scheduler.senders.ListSenders(
            sender_service_pb2.ListSendersRequest(user_id="ann"), timeout=2
        )
    except grpc.aio.AioRpcError:
        return False
    return True
