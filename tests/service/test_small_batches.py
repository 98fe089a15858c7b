"""Small batches of many callers at once: stored in groups, each call with its own result."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.batch_pb2 import BatchOptions, Recipient, Recipients
from outbox.v1.batch_service_pb2 import (
    GetBatchRequest,
    ScheduleBatchRequest,
    ScheduleBatchResponse,
    UploadBatchRequest,
)
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import (
    CreateSenderRequest,
    DeleteSenderRequest,
    GetSenderRequest,
    PauseSenderRequest,
)
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.deploy.ports import free_port
from outbox_server.services.scheduler import group_commit
from outbox_server.services.scheduler.group_commit import GroupCommit
from outbox_server.services.scheduler.storage.group_intake import GroupIntakeStore
from outbox_server.shared import recent_callers
from outbox_server.shared.database.fair_pool import FairPool
from outbox_server.shared.database.frequent import KeptConnections
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import (
    NO_RELAY,
    Scheduler,
    options_for,
    refusal_of,
    running_scheduler,
    scheduler_process,
)
from tests.two_users import Metadata, Rivals, rivals

CLIENTS = 16
OF_EACH_BATCH: Final = (
    "batch_id",
    "request_id",
    "create_time",
    "schedule_time",
    "forecast_end_time",
)
# 9999-12-31T23:59:59Z
LAST_SECOND = 253_402_300_799
_LOCKED = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"


class Gate:
    """Holds up the groups until it is opened, and counts them and the calls that joined one."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        # The number of a group that waits for `later` instead.
        self.held = 0
        self.later = asyncio.Event()
        self.joined = 0
        self.begun = 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    begin, store = GroupIntakeStore.begin, GroupCommit.store

    @asynccontextmanager
    async def begin_later(self: GroupIntakeStore, connection: Any) -> AsyncIterator[Any]:
        gate.begun += 1
        await (gate.later if gate.begun == gate.held else gate.open).wait()
        async with begin(self, connection) as transaction:
            yield transaction

    async def store_counted(self: GroupCommit, *args: Any) -> Any:
        gate.joined += 1
        return await store(self, *args)

    monkeypatch.setattr(GroupIntakeStore, "begin", begin_later)
    monkeypatch.setattr(GroupCommit, "store", store_counted)
    return gate


def begin(scheduler: Scheduler, sender: Sender, *args: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.ensure_future(scheduler.schedule(sender, *args, **options))


async def test_calls_that_come_during_a_group_are_stored_in_one_transaction(
    scheduler: Scheduler, gate: Gate
) -> None:
    senders = [await scheduler.sender(email=f"news{n}@example.com") for n in range(4)]
    first = begin(scheduler, senders[0])
    await eventually(lambda: gate.begun == 1)
    # More than there are places for calls that are being read.
    calls = [
        begin(scheduler, senders[n % 4], f"email\nu{n}@b.org\nv{n}@b.org\n", request_id=f"call-{n}")
        for n in range(CLIENTS)
    ]
    await eventually(lambda: gate.joined == 1 + CLIENTS)
    gate.open.set()
    answers: list[ScheduleBatchResponse] = await asyncio.gather(first, *calls)
    assert scheduler.value("SELECT count(DISTINCT xmin::text) FROM batches") == 2
    assert len({answer.batch.batch_id for answer in answers}) == 1 + CLIENTS
    for n, answer in enumerate(answers[1:]):
        assert answer.batch.request_id == f"call-{n}"
        assert answer.batch.sender_id == senders[n % 4].sender_id
        assert answer.batch.counts.scheduled_count == 2
        assert not answer.replayed
        rows = scheduler.rows(
            "SELECT recipient, sender_id FROM email_jobs WHERE batch_id = %s ORDER BY row_number",
            int(answer.batch.batch_id),
        )
        assert rows == [(f"{c}{n}@b.org", int(senders[n % 4].sender_id)) for c in "uv"]
    # The heads are loaded before the answers, and their markers are deleted afterwards.
    await eventually(lambda: scheduler.value("SELECT count(*) = 0 FROM head_markers"))


async def test_the_answer_is_that_of_a_batch_that_is_stored_alone(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    rows = [
        Recipient(email="ann@b.org", columns={"Name": "Ann"}),
        Recipient(email="ANN@b.org", columns={"Name": "Ann"}),
        Recipient(email="zoë@b.org", columns={"Name": "Zoë \\ \n"}),
    ]
    request = ScheduleBatchRequest(
        options=options_for(sender, request_id="grouped", body="Dear {{ name }}"),
        recipients=Recipients(rows=rows),
    )
    answer = await scheduler.batches.ScheduleBatch(request)
    # Too large for the event loop, because of an option that is no part of the batch's content.
    request.options.request_id = "alone"
    request.recipients.rows.extend([Recipient()] * 200)
    alone = await scheduler.batches.ScheduleBatch(request)
    for batch in (answer.batch, alone.batch):
        assert {field.name for field, _ in batch.ListFields()} >= set(OF_EACH_BATCH)
        for field in OF_EACH_BATCH:
            batch.ClearField(field)
    assert answer.batch == alone.batch
    assert answer.batch.duplicate_count == 1
    columns = "row_number, recipient, recipient_key, address_key, variables, state, expires_at"
    stored = f"SELECT {columns} FROM email_jobs WHERE batch_id = %s ORDER BY id"
    grouped, whole = (
        scheduler.rows(stored, scheduler.value("SELECT id FROM batches WHERE request_id = %s", one))
        for one in ("grouped", "alone")
    )
    assert grouped == whole
    assert len(grouped) == 2


async def test_a_small_batch_has_a_forecast_if_little_waits_or_on_request(
    scheduler: Scheduler,
) -> None:
    sender = await scheduler.sender(hourly_limit=60)
    later = Timestamp(seconds=4_000_000_000)
    request = ScheduleBatchRequest(
        options=options_for(sender, schedule_time=later),
        csv=b"email\n" + b"".join(b"u%d@b.org\n" % n for n in range(64)),
    )
    answer = await scheduler.batches.ScheduleBatch(request)
    batch = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=answer.batch.batch_id))
    # 60 of them in the first hour.
    assert 3600 <= answer.forecast_end_time.seconds - later.seconds < 3700
    assert answer.batch.forecast_end_time == answer.forecast_end_time == batch.forecast_end_time
    request = ScheduleBatchRequest(
        options=options_for(sender, schedule_time=later), csv=b"email\na@b.org\nb@b.org\n"
    )
    answer = await scheduler.batches.ScheduleBatch(request)
    assert not answer.HasField("forecast_end_time")
    assert not answer.batch.HasField("forecast_end_time")
    request.require_forecast = True
    answer = await scheduler.batches.ScheduleBatch(request)
    assert (answer.replayed, answer.HasField("forecast_end_time")) == (True, True)
    request.options.request_id = "new"
    answer = await scheduler.batches.ScheduleBatch(request)
    assert (answer.replayed, answer.HasField("forecast_end_time")) == (False, True)
    # Notices need no waiting mail.
    await scheduler.senders.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    answer = await scheduler.schedule(sender)
    assert any("paused" in notice for notice in answer.notices)


async def test_only_the_first_call_with_a_template_needs_a_worker(
    scheduler: Scheduler, gate: Gate
) -> None:
    gate.open.set()
    sender = await scheduler.sender()
    body = "{% if points > 100 %}gold{% else %}{{ name | upcase }}{% endif %}"
    rows = "email,points,name\na@b.org,120,Ann\nb@b.org,3,Bob\n"
    joined = []
    for _ in range(2):
        answer = await scheduler.schedule(sender, rows, body=body)
        assert (answer.batch.accepted_count, answer.batch.rejected_count) == (2, 0)
        joined.append(gate.joined)
    assert joined == [0, 1]
    # Only a worker can tell what this row is.
    answer = await scheduler.schedule(sender, rows + "c@b.org,many,Cat\n", body=body)
    assert [rejection.row_number for rejection in answer.rejections] == [3]
    assert gate.joined == 1


async def test_a_bad_call_fails_alone(scheduler: Scheduler, gate: Gate) -> None:
    good, deleted = await scheduler.sender(), await scheduler.sender(email="gone@example.com")
    full = await scheduler.sender("eve")
    await scheduler.senders.DeleteSender(DeleteSenderRequest(sender_id=deleted.sender_id))
    scheduler.execute("INSERT INTO users (user_id, waiting_jobs) VALUES ('eve', 1)")
    done = begin(scheduler, good, request_id="done")
    await eventually(lambda: gate.begun == 1)
    unknown = Sender(sender_id="4611686018427387904")
    bad = {
        "SENDER_NOT_FOUND": begin(scheduler, unknown),
        "SENDER_NOT_FOUND ": begin(scheduler, deleted),
        "SENDER_NOT_FOUND  ": begin(scheduler, full, user_id="ann"),
        "USER_WAITING_JOBS_EXCEEDED": begin(scheduler, full, "email\na@b.org\nb@b.org\n"),
        "SPACING_INVALID": begin(
            scheduler,
            good,
            "email\na@b.org\nb@b.org\n",
            schedule_time=Timestamp(seconds=LAST_SECOND),
            spacing=Duration(seconds=1),
        ),
    }
    fine = [begin(scheduler, one, request_id="fine") for one in (good, full)]
    await eventually(lambda: gate.joined == 1 + len(bad) + len(fine))
    gate.open.set()
    answers = await asyncio.gather(done, *fine)
    assert [answer.batch.accepted_count for answer in answers] == [1, 1, 1]
    for reason, call in bad.items():
        assert (await refusal_of(call)).reason == reason.strip()
    assert scheduler.value("SELECT count(*) FROM batches") == 3


async def test_equal_request_ids_of_one_user_give_one_batch(
    scheduler: Scheduler, gate: Gate
) -> None:
    sender, other = await scheduler.sender(), await scheduler.sender("bob")
    calls = [begin(scheduler, sender, request_id="once") for _ in range(CLIENTS)]
    different = begin(scheduler, sender, "email\nb@b.org\n", request_id="once")
    elsewhere = begin(scheduler, other, "email\nc@b.org\n", request_id="once")
    await eventually(lambda: gate.joined == CLIENTS + 2)
    gate.open.set()
    answers = await asyncio.gather(*calls, different, elsewhere, return_exceptions=True)
    batches = [each for each in answers if isinstance(each, ScheduleBatchResponse)]
    assert len({each.batch.batch_id for each in batches}) == 2
    assert [each.replayed for each in batches].count(False) == 2
    assert (await refusal_of(different)).reason == "REQUEST_ID_REUSED"
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 2


async def test_a_quota_counts_all_calls_of_a_group(scheduler: Scheduler, gate: Gate) -> None:
    sender = await scheduler.sender()
    scheduler.execute("INSERT INTO users (user_id, waiting_jobs) VALUES ('ann', 5)")
    first = begin(scheduler, sender)
    await eventually(lambda: gate.begun == 1)
    calls = [begin(scheduler, sender) for _ in range(CLIENTS)]
    await eventually(lambda: gate.joined == 1 + CLIENTS)
    gate.open.set()
    answers = await asyncio.gather(first, *calls, return_exceptions=True)
    assert sum(isinstance(answer, ScheduleBatchResponse) for answer in answers) == 5
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 5


async def test_waiting_jobs_of_cancelled_batches_do_not_count(scheduler: Scheduler) -> None:
    sender = await scheduler.sender()
    scheduler.execute("INSERT INTO users (user_id, waiting_jobs) VALUES ('ann', 1)")
    await begin(scheduler, sender)
    assert (await refusal_of(begin(scheduler, sender))).reason == "USER_WAITING_JOBS_EXCEEDED"
    # Its row is still SCHEDULED, until the rows of cancelled batches follow.
    scheduler.execute(
        "INSERT INTO batch_cancellations (batch_id, sender_id, cancelled_at)"
        " SELECT id, sender_id, now() FROM batches"
    )
    assert (await begin(scheduler, sender)).batch.accepted_count == 1


async def test_suppressed_addresses_get_no_job(scheduler: Scheduler, gate: Gate) -> None:
    sender, other = await scheduler.sender(), await scheduler.sender("bob")
    for address in ("Stop@b.org", "fußball@b.org"):
        await scheduler.suppressions.CreateSuppression(
            CreateSuppressionRequest(user_id="ann", suppression=Suppression(email=address))
        )
    csv = "email\nstop@b.org\nfussball@b.org\nFUSSBALL@b.org\nfußball@b.org\ngo@b.org\n"
    calls = [begin(scheduler, one, csv) for one in (sender, other, sender)]
    await eventually(lambda: gate.joined == len(calls))
    gate.open.set()
    mine, hers, again = [answer.batch for answer in await asyncio.gather(*calls)]
    assert (mine.accepted_count, mine.suppressed_count, mine.duplicate_count) == (2, 2, 1)
    assert (again.accepted_count, again.suppressed_count) == (2, 2)
    assert (hers.accepted_count, hers.suppressed_count) == (4, 0)


async def test_a_caller_that_leaves_before_its_group_leaves_nothing(
    scheduler: Scheduler, gate: Gate
) -> None:
    sender = await scheduler.sender()
    first = begin(scheduler, sender, request_id="first")
    await eventually(lambda: gate.begun == 1)
    leaves, stays = begin(scheduler, sender, request_id="leaves"), begin(scheduler, sender)
    await eventually(lambda: gate.joined == 3)
    leaves.cancel()
    # Later calls show that the server has seen it.
    request = GetSenderRequest(sender_id=sender.sender_id)
    await scheduler.senders.GetSender(request)
    await eventually(leaves.done)
    await scheduler.senders.GetSender(request)
    gate.open.set()
    await asyncio.gather(first, stays)
    assert scheduler.value("SELECT count(*) FROM batches WHERE request_id = 'leaves'") == 0
    assert scheduler.value("SELECT count(*) FROM batches") == 2
    assert not (await scheduler.schedule(sender, request_id="leaves")).replayed


async def test_a_deadline_ends_a_call_that_waits_for_its_group(
    scheduler: Scheduler, gate: Gate
) -> None:
    sender = await scheduler.sender()
    first = begin(scheduler, sender)
    await eventually(lambda: gate.begun == 1)
    request = ScheduleBatchRequest(options=options_for(sender), csv=b"email\na@b.org\n")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await scheduler.batches.ScheduleBatch(request, timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gate.open.set()
    await first


async def test_locks_of_others_delay_only_the_calls_that_need_them(
    scheduler: Scheduler, gate: Gate
) -> None:
    gate.open.set()
    sender, locked = await scheduler.sender(), await scheduler.sender(email="locked@example.com")
    busy = await scheduler.sender("bob")

    async def uploading() -> AsyncIterator[UploadBatchRequest]:
        yield UploadBatchRequest(options=options_for(sender, request_id="uploading"))
        yield UploadBatchRequest(
            chunk=b"email\n" + b"".join(b"u%d@b.org\n" % n for n in range(5000))
        )
        await finish.wait()

    finish = asyncio.Event()
    upload = asyncio.ensure_future(scheduler.batches.UploadBatch(uploading()))
    # Its batch is written but not committed. Only the lock on a request has one key of 64 bits.
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1"
    await eventually(lambda: scheduler.value(held) == 1)
    with psycopg.connect(scheduler.settings.database_url) as holder:
        holder.execute("SELECT FROM senders WHERE id = %s FOR UPDATE", [int(locked.sender_id)])
        holder.execute("SELECT pg_advisory_xact_lock(%s, hashtext('bob'))", [0x5551])
        waiting = [
            begin(scheduler, sender, request_id="uploading"),
            begin(scheduler, locked),
            begin(scheduler, busy),
        ]
        await eventually(lambda: scheduler.value(_LOCKED) == 3)
        joined = gate.joined
        await asyncio.gather(*(begin(scheduler, sender) for _ in range(CLIENTS)))
        assert gate.joined == joined + CLIENTS
        assert not any(call.done() for call in waiting)
    finish.set()
    reused, _, _ = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(reused, grpc.aio.AioRpcError)
    assert (await upload).batch.accepted_count == 5000
    assert scheduler.value("SELECT count(*) FROM batches") == 3 + CLIENTS


async def test_a_lost_connection_to_postgresql_fails_no_call(
    scheduler: Scheduler, gate: Gate
) -> None:
    sender = await scheduler.sender()
    calls = [begin(scheduler, sender) for _ in range(4)]
    await eventually(lambda: gate.joined == 4)
    scheduler.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    gate.open.set()
    answers = await asyncio.gather(*calls)
    assert not any(answer.replayed for answer in answers)
    assert scheduler.value("SELECT count(*) FROM batches") == 4
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 4


def begin_of(
    both: Rivals, sender: Sender, key: Metadata, request_id: str
) -> asyncio.Future[ScheduleBatchResponse]:
    request = ScheduleBatchRequest(
        options=options_for(sender, request_id=request_id), csv=b"email\na@b.org\n"
    )
    return asyncio.ensure_future(both.scheduler.batches.ScheduleBatch(request, metadata=key))


async def test_nobody_waits_for_the_groups_of_a_user_with_many_calls(
    database_url: str, redis_url: str, gate: Gate
) -> None:
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)

        call = partial(begin_of, both)
        # A group of the first calls, and a group of very many, which is held up.
        gate.held = 2
        flood = [call(evil, both.eve, f"eve-{n}") for n in range(100)]
        await eventually(lambda: gate.joined == 100)
        gate.open.set()
        await eventually(lambda: gate.begun == 2)
        await asyncio.wait_for(call(hers, both.ann, "ann"), PATIENCE)
        # The group of very many is still being written, and hers has none of those that wait.
        assert gate.begun == 3
        groups = "SELECT array_agg(request_id) FROM batches GROUP BY xmin::text"
        stored = [requests for (requests,) in both.scheduler.rows(groups)]
        assert ["ann"] in stored
        assert sum(map(len, stored)) < 101
        gate.later.set()
        await asyncio.gather(*flood)
        stored = [requests for (requests,) in both.scheduler.rows(groups)]
        assert sum(map(len, stored)) == 101


async def test_callers_of_a_group_that_failed_wait_for_no_other_group(
    database_url: str, redis_url: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller had many calls, and few of them are left when their group has failed."""
    monkeypatch.setattr(recent_callers, "_PRESENT_S", 3600.0)
    all_wait, others = asyncio.Event(), asyncio.Event()
    connection, write = GroupIntakeStore.connection, GroupCommit._write
    groups: list[set[str]] = []

    @asynccontextmanager
    async def connection_later(self: GroupIntakeStore) -> AsyncIterator[Any]:
        await all_wait.wait()
        async with connection(self) as driver:
            yield driver

    async def fail_first(self: GroupCommit, transaction: Any, group: list[Any]) -> Any:
        groups.append({each.claimant.name for each in group})
        if len(groups) == 1:
            raise psycopg.OperationalError("a fault of the test")
        if "ann" in groups[-1]:
            await others.wait()
        return await write(self, transaction, group)

    monkeypatch.setattr(GroupIntakeStore, "connection", connection_later)
    monkeypatch.setattr(GroupCommit, "_write", fail_first)
    gate.open.set()
    async with rivals(database_url, redis_url) as both:
        # The first group has eight calls of each.
        calls = {}
        for name, key, count in (("eve", both.eve, 12), ("ann", both.ann, 30)):
            sender = await both.sender(key)
            calls[name] = [
                asyncio.ensure_future(
                    both.scheduler.batches.ScheduleBatch(
                        ScheduleBatchRequest(options=options_for(sender), csv=b"email\na@b.org\n"),
                        metadata=key,
                    )
                )
                for _ in range(count)
            ]
        await eventually(lambda: gate.joined == 12 + 30)
        all_wait.set()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*calls["eve"])
        assert groups[0] == {"ann", "eve"}
        assert {"eve"} in groups
        assert not all(call.done() for call in calls["ann"])
        others.set()
        await asyncio.gather(*calls["ann"])
        assert both.scheduler.value("SELECT count(*) FROM batches") == 12 + 30


async def test_connections_that_parts_keep_leave_the_whole_pool_to_others(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise idle connections would fill a small pool."""
    all_kept: Counter[AsyncEngine] = Counter()
    begin = KeptConnections.__init__

    def count(self: KeptConnections, engine: AsyncEngine, kept: int = 1) -> None:
        all_kept[engine] += kept
        begin(self, engine, kept)

    monkeypatch.setattr(KeptConnections, "__init__", count)
    settings = settings_of(options(database_url, redis_url, NO_RELAY, database_pool=2))
    async with (
        running_scheduler(database_url, redis_url, min_gap="0", database_pool=2),
        running(settings) as dispatcher,
    ):
        await eventually(dispatcher.serving)
        assert len(all_kept) == 2
        for engine, kept in all_kept.items():
            pool = engine.sync_engine.pool
            assert isinstance(pool, FairPool)
            assert pool.size() >= 2 + kept


async def test_groups_of_a_user_with_many_calls_give_way_to_those_of_others(
    database_url: str, redis_url: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "_GIVES_WAY_S", PATIENCE)
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        call = partial(begin_of, both)
        gate.held = 1
        gate.open.set()
        first = call(hers, both.ann, "ann")
        await eventually(lambda: gate.begun == 1)
        flood = [call(evil, both.eve, f"eve-{n}") for n in range(20)]
        await eventually(lambda: gate.joined == 21)
        request = GetSenderRequest(sender_id=hers.sender_id)
        await both.scheduler.senders.GetSender(request, metadata=both.ann)
        assert gate.begun == 1
        gate.later.set()
        await asyncio.gather(first, *flood)


async def test_a_killed_scheduler_leaves_each_batch_whole_or_not_at_all(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(address, options=options)
        )
        batches, senders = BatchServiceStub(channel), SenderServiceStub(channel)
        holder = stack.enter_context(psycopg.connect(database_url, autocommit=True))

        def request(number: int) -> ScheduleBatchRequest:
            return ScheduleBatchRequest(
                options=BatchOptions(
                    request_id=f"call-{number}", sender_id=sender, subject="Hello", body="Good day"
                ),
                csv=b"email\n" + b"".join(b"u%d-%d@b.org\n" % (number, row) for row in range(3)),
            )

        async def call(number: int) -> ScheduleBatchResponse:
            return await batches.ScheduleBatch(
                request(number), timeout=PATIENCE, wait_for_ready=True
            )

        async with scheduler_process(database_url, redis_url, tmp_path, address) as (process, _):
            new = CreateSenderRequest(user_id="ann", sender=Sender(email="news@example.com"))
            sender = (await senders.CreateSender(new, wait_for_ready=True)).sender_id
            await asyncio.gather(*(call(number) for number in range(CLIENTS)))
            with holder.transaction():
                # The batches of a group are written, and their jobs wait.
                holder.execute("LOCK TABLE email_jobs IN SHARE MODE")
                pending = [
                    asyncio.ensure_future(call(number)) for number in range(CLIENTS, 3 * CLIENTS)
                ]
                async with await psycopg.AsyncConnection.connect(
                    database_url, autocommit=True
                ) as watcher:

                    async def is_writing() -> bool:
                        row = await (await watcher.execute(_LOCKED)).fetchone()
                        return bool(row and row[0])

                    await eventually(is_writing)
                await process.kill()
        found = await asyncio.gather(*pending, return_exceptions=True)
        assert all(isinstance(each, grpc.aio.AioRpcError) for each in found)
        whole = (
            "SELECT count(*) FILTER (WHERE accepted_count = n AND n = 3), count(*) FROM batches"
            " LEFT JOIN (SELECT batch_id, count(*) AS n FROM email_jobs GROUP BY 1) AS jobs"
            " ON batch_id = id"
        )
        assert holder.execute(whole).fetchone() == (CLIENTS, CLIENTS)
        async with scheduler_process(database_url, redis_url, tmp_path, address):
            again = await asyncio.gather(*(call(number) for number in range(3 * CLIENTS)))
        assert [each.replayed for each in again] == [True] * CLIENTS + [False] * 2 * CLIENTS
        assert holder.execute(whole).fetchone() == (3 * CLIENTS, 3 * CLIENTS)
