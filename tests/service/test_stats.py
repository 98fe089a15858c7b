"""The stats service on a real PostgreSQL, called over a real channel."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import grpc
import psycopg
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from outbox.v1 import stats_service_pb2 as proto
from outbox.v1 import stats_service_pb2_grpc
from outbox.v1.email_job_pb2 import EmailJobCounts

from outbox_server.deploy.ports import free_port
from outbox_server.services.stats.server import serve
from outbox_server.shared.settings import load_settings
from tests import cooldowns
from tests.conftest import Stores
from tests.eventually import PATIENCE, eventually
from tests.for_each import for_each_case
from tests.probing import serving


class StatsServer:
    """A stats server for one test, its clients, and its database."""

    def __init__(self, database_url: str, channel: grpc.aio.Channel) -> None:
        self.database_url = database_url
        self.channel = channel
        self.stub = stats_service_pb2_grpc.StatsServiceStub(channel)

    async def serving(self) -> bool:
        return await serving(self.channel, "outbox.v1.StatsService")

    async def sql(self, statement: str, *values: Any) -> int:
        """Run a statement; return the first column of its first row, or 0 if it has no rows."""
        async with await psycopg.AsyncConnection.connect(
            self.database_url, autocommit=True, options="-c timezone=UTC"
        ) as connection:
            cursor = await connection.execute(statement, values)
            row = await cursor.fetchone() if cursor.description else None
        return int(row[0]) if row else 0

    async def sender(self, user: str = "anna", limit: int = 100) -> int:
        return await self.sql(
            "INSERT INTO senders (user_id, email, hourly_limit)"
            " VALUES (%s, 'a@x.test', %s) RETURNING id",
            user,
            limit,
        )

    async def delta(self, sender: int, state: int, n: int, hour: datetime | None = None) -> None:
        await self.sql(
            "INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)"
            " VALUES (%s, 1, date_trunc('hour', %s), %s, %s)",
            sender,
            hour or datetime.now(UTC),
            state,
            n,
        )

    async def job(self, sender: int, due: datetime, *, sending: bool = False) -> int:
        return await self.sql(
            "INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient,"
            " state, lease_until) VALUES (1, %s, %s, 1, 'b@x.test', %s, %s) RETURNING id",
            sender,
            due,
            2 if sending else 1,
            due if sending else None,
        )

    async def attempt(self, job: int, sender: int, end: datetime, *, counted: bool) -> None:
        await self.sql(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at,"
            " outcome, counted) VALUES (%s, 1, %s, %s, %s, 1, %s)",
            job,
            sender,
            end,
            end,
            counted,
        )


@asynccontextmanager
async def running(
    database_url: str, *, healthy: bool = True, **settings: Any
) -> AsyncIterator[StatsServer]:
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    settings = {"auth": "off", "stats_listen": "127.0.0.1:0"} | settings
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(
            serve(load_settings(database_url=database_url, **settings), stop, ready=port.set_result)
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{await port}") as channel:
            stats = StatsServer(database_url, channel)
            if healthy:
                await eventually(stats.serving)
            yield stats
        stop.set()


@pytest_asyncio.fixture
async def stats(database_url: str) -> AsyncIterator[StatsServer]:
    async with running(database_url) as server:
        yield server


async def fails(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return caught.value.code(), info.reason


async def test_the_counts_of_a_sender_equal_a_count_of_its_rows(stats: StatsServer) -> None:
    sender, other = await stats.sender(limit=20), await stats.sender()
    now = datetime.now(UTC)
    await stats.delta(sender, 1, 9)
    await stats.delta(sender, 1, -5)
    for state, n in ((3, 2), (4, 1), (6, 1), (7, 2), (8, 3), (5, 4)):
        await stats.delta(sender, state, n)
    await stats.delta(other, 3, 50)
    jobs = [await stats.job(sender, now + timedelta(seconds=s)) for s in (60, -60, -60)]
    await stats.job(sender, now - timedelta(hours=1), sending=True)
    await stats.job(other, now - timedelta(hours=1))

    answer = await stats.stub.GetSenderStats(proto.GetSenderStatsRequest(sender_id=str(sender)))

    assert answer.sender_id == str(sender)
    assert answer.counts == EmailJobCounts(
        scheduled_count=3,
        sending_count=1,
        sent_count=2,
        failed_count=1,
        uncertain_count=4,
        cancelled_count=1,
        suppressed_count=2,
        expired_count=3,
    )
    assert answer.waiting_count == 3
    assert answer.next_schedule_time.ToDatetime(UTC) == now - timedelta(seconds=60)
    assert answer.next_email_job_id == str(jobs[1])
    assert answer.hourly_limit == 20
    assert abs(answer.read_time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(seconds=5)


async def test_a_sender_without_mail_has_zero_counts_and_no_next_time(stats: StatsServer) -> None:
    request = proto.GetSenderStatsRequest(sender_id=str(await stats.sender()))
    answer = await stats.stub.GetSenderStats(request)
    assert answer.counts == EmailJobCounts()
    assert (answer.waiting_count, answer.window_used_count) == (0, 0)
    assert not answer.HasField("next_schedule_time")
    assert not answer.next_email_job_id
    assert len(answer.hours) == 24


def far_from_the_next_hour() -> bool:
    return (datetime.now(UTC) + timedelta(seconds=15)).hour == datetime.now(UTC).hour


async def test_hourly_counts_cover_the_last_24_hours_by_the_end_of_the_attempts(
    stats: StatsServer,
) -> None:
    await eventually(far_from_the_next_hour)
    sender = await stats.sender()
    now = datetime.now(UTC)
    for ago, state, n in ((0, 3, 5), (0, 4, 1), (0, 1, 7), (1, 3, 2), (23, 3, 3), (24, 3, 100)):
        await stats.delta(sender, state, n, now - timedelta(hours=ago))
    await stats.delta(sender, 3, 4, now - timedelta(hours=1))

    async def hours() -> list[Any]:
        request = proto.GetSenderStatsRequest(sender_id=str(sender))
        return list((await stats.stub.GetSenderStats(request)).hours)

    found = await hours()
    starts = [hour.start_time.ToDatetime(UTC) for hour in found]
    assert starts[-1] == datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    assert [late - early for early, late in pairwise(starts)] == [timedelta(hours=1)] * 23
    numbers = [(hour.sent_count, hour.failed_count) for hour in found]
    assert numbers == [(3, 0), *[(0, 0)] * 21, (6, 0), (5, 1)]

    async def folded() -> bool:
        return await stats.sql("SELECT count(*) FROM count_deltas") == 0

    await eventually(folded)
    assert await hours() == found


async def test_the_window_counts_sends_that_ended_in_it_and_took_a_slot(database_url: str) -> None:
    now = datetime.now(UTC)
    async with running(database_url, rate_window=timedelta(minutes=10)) as stats:
        sender, other = await stats.sender(), await stats.sender()
        for job, minutes in enumerate((1, 9, 11)):
            await stats.attempt(job, sender, now - timedelta(minutes=minutes), counted=True)
        await stats.attempt(3, sender, now, counted=False)
        await stats.attempt(4, other, now, counted=True)
        request = proto.GetSenderStatsRequest(sender_id=str(sender))
        assert (await stats.stub.GetSenderStats(request)).window_used_count == 2


@for_each_case(
    "text",
    [("987654321",), ("x",), ("01",), ("+1",), (" 1",), ("1\n",), ("-1",), ("0",), ("9" * 30,)],
)
async def test_a_sender_that_does_not_exist_is_not_found(stats: StatsServer, text: str) -> None:
    await stats.sender()
    call = stats.stub.GetSenderStats(proto.GetSenderStatsRequest(sender_id=text))
    assert await fails(call) == (grpc.StatusCode.NOT_FOUND, "SENDER_NOT_FOUND")


async def test_a_sender_is_found_only_by_its_owner(stats: StatsServer) -> None:
    sender = str(await stats.sender("anna"))
    call = stats.stub.GetSenderStats(proto.GetSenderStatsRequest(sender_id=sender, user_id="bert"))
    assert await fails(call) == (grpc.StatusCode.NOT_FOUND, "SENDER_NOT_FOUND")
    request = proto.GetSenderStatsRequest(sender_id=sender, user_id="anna")
    assert (await stats.stub.GetSenderStats(request)).sender_id == sender


async def test_a_deleted_sender_is_not_found(stats: StatsServer) -> None:
    sender = await stats.sender()
    await stats.sql("UPDATE senders SET deleted_at = now() WHERE id = %s", sender)
    call = stats.stub.GetSenderStats(proto.GetSenderStatsRequest(sender_id=str(sender)))
    assert await fails(call) == (grpc.StatusCode.NOT_FOUND, "SENDER_NOT_FOUND")


async def test_a_missing_sender_id_is_invalid(stats: StatsServer) -> None:
    call = stats.stub.GetSenderStats(proto.GetSenderStatsRequest())
    assert await fails(call) == (grpc.StatusCode.INVALID_ARGUMENT, "SENDER_ID_REQUIRED")


async def test_the_counts_of_a_user_are_the_sum_of_its_senders(stats: StatsServer) -> None:
    first, second, deleted = [await stats.sender("anna") for _ in range(3)]
    stranger = await stats.sender("bert")
    for sender, n in ((first, 1), (second, 2), (deleted, 4), (stranger, 1000)):
        await stats.delta(sender, 3, n)
        await stats.delta(sender, 1, 10 * n)
    await stats.job(second, datetime.now(UTC), sending=True)
    await stats.sql("UPDATE senders SET deleted_at = now() WHERE id = %s", deleted)

    answer = await stats.stub.GetUserStats(proto.GetUserStatsRequest(user_id="anna"))

    assert answer.user_id == "anna"
    assert answer.counts == EmailJobCounts(sent_count=7, scheduled_count=69, sending_count=1)
    assert [(part.sender_id, part.email, part.counts) for part in answer.senders] == [
        (str(first), "a@x.test", EmailJobCounts(sent_count=1, scheduled_count=10)),
        (
            str(second),
            "a@x.test",
            EmailJobCounts(sent_count=2, scheduled_count=19, sending_count=1),
        ),
        (str(deleted), "a@x.test", EmailJobCounts(sent_count=4, scheduled_count=40)),
    ]
    assert not answer.next_page_token
    assert abs(answer.read_time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(seconds=5)


async def test_the_senders_of_a_user_are_listed_in_pages_with_the_same_total(
    stats: StatsServer,
) -> None:
    senders = [await stats.sender("anna") for _ in range(5)]
    await stats.sender("bert")
    for sender in senders:
        await stats.delta(sender, 3, 1)
    pages: list[list[str]] = []
    token = ""
    while True:
        answer = await stats.stub.GetUserStats(
            proto.GetUserStatsRequest(user_id="anna", page_size=2, page_token=token)
        )
        assert answer.counts == EmailJobCounts(sent_count=5)
        pages.append([part.sender_id for part in answer.senders])
        token = answer.next_page_token
        if not token:
            break
    ids = [str(sender) for sender in senders]
    assert pages == [ids[:2], ids[2:4], ids[4:]]


async def test_a_page_that_ends_with_the_last_sender_has_no_next_page(stats: StatsServer) -> None:
    for _ in range(2):
        await stats.sender("anna")
    request = proto.GetUserStatsRequest(user_id="anna", page_size=2)
    assert not (await stats.stub.GetUserStats(request)).next_page_token


async def test_a_user_without_senders_has_zero_counts(stats: StatsServer) -> None:
    answer = await stats.stub.GetUserStats(proto.GetUserStatsRequest(user_id="nobody"))
    assert answer.counts == EmailJobCounts()
    assert not answer.senders


async def test_an_invalid_request_for_a_user_is_refused(stats: StatsServer) -> None:
    for _ in range(2):
        await stats.sender("anna")
    answer = await stats.stub.GetUserStats(proto.GetUserStatsRequest(user_id="anna", page_size=1))
    for request, reason in (
        (proto.GetUserStatsRequest(), "USER_ID_REQUIRED"),
        (proto.GetUserStatsRequest(user_id="anna", page_size=-1), "PAGE_SIZE_INVALID"),
        (proto.GetUserStatsRequest(user_id="anna", page_token="x"), "PAGE_TOKEN_INVALID"),
        (
            proto.GetUserStatsRequest(user_id="bert", page_token=answer.next_page_token),
            "PAGE_TOKEN_INVALID",
        ),
    ):
        assert await fails(stats.stub.GetUserStats(request)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            reason,
        )


async def test_a_watch_begins_with_the_state_and_then_sends_each_change(stats: StatsServer) -> None:
    sender = await stats.sender()
    await stats.delta(sender, 3, 1)
    request = proto.WatchSenderStatsRequest(sender_id=str(sender), user_id="anna")
    stream = stats.stub.WatchSenderStats(request)
    async with asyncio.timeout(PATIENCE):
        first: Any = await stream.read()
        assert (first.stats.counts.sent_count, first.done) == (1, False)
        await stats.delta(sender, 3, 4)
        second: Any = await stream.read()
        assert second.stats.counts.sent_count == 5
        stream.cancel()

        # Resumed: the stream does not repeat the old state, and sends the changes made meanwhile.
        request.resume_token = second.resume_token
        stream = stats.stub.WatchSenderStats(request)
        reading: Any = asyncio.ensure_future(stream.read())
        await stats.delta(sender, 4, 2)
        third = await reading
        assert (third.stats.counts.sent_count, third.stats.counts.failed_count) == (5, 2)
        await stats.sql("UPDATE senders SET deleted_at = now() WHERE id = %s", sender)
        last: Any = await stream.read()
        assert last.done
        assert await stream.read() == grpc.aio.EOF


async def test_a_watch_reports_when_a_cooldown_begins_changes_and_ends(stats: StatsServer) -> None:
    sender, other = await stats.sender(), await stats.sender()
    stream = stats.stub.WatchSenderStats(proto.WatchSenderStatsRequest(sender_id=str(sender)))
    async with asyncio.timeout(PATIENCE):
        message: Any = await stream.read()
        assert not message.stats.HasField("cooldown")
        # A change of another sender causes no message.
        await cooldowns.begin(stats.sql, other)
        await cooldowns.begin(stats.sql, sender)
        message = await stream.read()
        assert message.stats.cooldown.message == cooldowns.MESSAGE
        assert message.stats.cooldown.refusal_count == 2
        await stats.sql(
            "UPDATE cooldowns SET refusals = 3, message = 'no' WHERE sender_id = %s", sender
        )
        message = await stream.read()
        shown = message.stats.cooldown
        assert (shown.refusal_count, shown.message) == (3, "no")
        request = proto.GetSenderStatsRequest(sender_id=str(sender))
        assert (await stats.stub.GetSenderStats(request)).cooldown == shown
        await stats.sql("DELETE FROM cooldowns WHERE sender_id = %s", sender)
        message = await stream.read()
        assert not message.stats.HasField("cooldown")
    stream.cancel()


async def test_an_invalid_watch_is_refused(stats: StatsServer) -> None:
    sender = str(await stats.sender("anna"))
    for request, reason in (
        (proto.WatchSenderStatsRequest(sender_id=sender, user_id="bert"), "SENDER_NOT_FOUND"),
        (
            proto.WatchSenderStatsRequest(sender_id=sender, resume_token="x"),
            "RESUME_TOKEN_INVALID",
        ),
    ):
        stream: Any = stats.stub.WatchSenderStats(request)
        assert (await fails(stream.read()))[1] == reason


async def test_the_service_survives_a_restart_of_postgresql(
    stores: Stores, database_url: str
) -> None:
    async with running(database_url) as stats:
        sender = await stats.sender()
        request = proto.GetSenderStatsRequest(sender_id=str(sender))

        async def gone() -> bool:
            return not await stats.serving()

        async def folded() -> bool:
            return await stats.sql("SELECT count(*) FROM count_deltas") == 0

        await stores.postgres.kill()
        try:
            await eventually(gone)
            assert await fails(stats.stub.GetSenderStats(request)) == (
                grpc.StatusCode.UNAVAILABLE,
                "DATABASE_UNAVAILABLE",
            )
        finally:
            await stores.postgres.start()
        await eventually(stats.serving)
        await stats.delta(sender, 3, 7)
        assert (await stats.stub.GetSenderStats(request)).counts.sent_count == 7
        await eventually(folded)
        assert (await stats.stub.GetSenderStats(request)).counts.sent_count == 7


async def test_the_service_starts_without_postgresql_and_reports_not_serving() -> None:
    url = f"postgresql://outbox@127.0.0.1:{free_port()}/outbox"
    async with running(url, healthy=False) as stats:
        assert not await stats.serving()
        assert await fails(
            stats.stub.GetSenderStats(proto.GetSenderStatsRequest(sender_id="1"))
        ) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert not await stats.serving()


async def test_a_process_exits_with_code_0_on_sigterm(database_url: str) -> None:
    port = free_port()
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "outbox_server.services.stats",
        env={
            "OUTBOX_DATABASE_URL": database_url,
            "OUTBOX_AUTH": "off",
            "OUTBOX_STATS_LISTEN": f"127.0.0.1:{port}",
        },
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await channel.channel_ready()
                await eventually(StatsServer(database_url, channel).serving)
            child.send_signal(signal.SIGTERM)
            assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def test_an_invalid_setting_exits_with_code_2_and_is_named() -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "outbox_server.services.stats",
        env={"OUTBOX_RATE_WINDOW": "soon"},
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE):
        _, errors = await child.communicate()
    assert child.returncode == 2
    assert errors.decode().startswith("OUTBOX_RATE_WINDOW: ")
    assert errors.count(b"\n") == 1
