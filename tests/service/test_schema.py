"""Services on a schema that is older or newer than their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import psycopg
import pytest
from outbox.v1 import server_service_pb2 as pb
from outbox.v1.server_service_pb2_grpc import ServerServiceStub

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.database.migrating import migrate
from outbox_server.shared.database.schema import REVISION
from outbox_server.shared.rpc.server_info import CAPABILITIES, installed_version
from tests.dispatchers import options, process, running, settings_of
from tests.eventually import eventually
from tests.probing import serving
from tests.release_after import LAST, VERSIONS, contract_step
from tests.scheduler_stack import running_scheduler
from tests.stats_stack import stats_server


async def info(channel: grpc.aio.Channel) -> pb.ServerInfo:
    return await ServerServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest())


def without_a_schema(url: str) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


async def test_services_wait_for_migrate_and_then_work(
    new_database: Callable[[], str], redis_url: str, inbox: Inbox
) -> None:
    url = without_a_schema(new_database())
    async with (
        running_scheduler(url, redis_url, min_gap="0") as scheduler,
        stats_server(url, redis_url) as stats,
        running(settings_of(options(url, redis_url, inbox.url))) as dispatcher,
        grpc.aio.insecure_channel(scheduler.address) as channel,
    ):
        older = await info(channel)
        assert (older.schema_revision, older.code_schema_revision) == ("", REVISION)
        for each in (channel, stats):
            assert not await serving(each)
        assert not await dispatcher.serving()
        await asyncio.to_thread(migrate, url)
        await eventually(lambda: serving(channel))
        await eventually(lambda: serving(stats))
        await eventually(dispatcher.serving)
        await scheduler.schedule(await scheduler.sender())
        await eventually(lambda: inbox.mails)
        assert (await info(stats)).schema_revision == REVISION


async def test_this_release_sends_while_the_next_one_migrates_and_afterwards(
    new_database: Callable[[], str], redis_url: str, inbox: Inbox
) -> None:
    url = new_database()
    async with (
        running_scheduler(url, redis_url, min_gap="0") as scheduler,
        running(settings_of(options(url, redis_url, inbox.url))) as dispatcher,
        grpc.aio.insecure_channel(scheduler.address) as channel,
    ):
        sender = await scheduler.sender(hourly_limit=1_000_000)
        csv = "email\n" + "".join(f"r{n}@b.org\n" for n in range(40))
        migrating = asyncio.create_task(asyncio.to_thread(migrate, url, more_versions=VERSIONS))
        batches = 0
        while not migrating.done() or batches < 3:
            await scheduler.schedule(sender, csv)
            batches += 1
        await migrating

        async def knows() -> bool:
            return (await info(channel)).schema_revision == LAST

        await eventually(knows)
        await eventually(lambda: len(inbox.mails) == 40 * batches)
        assert await serving(channel)
        assert await dispatcher.serving()
        assert len({mail.message_id for mail in inbox.mails}) == 40 * batches


async def test_a_service_refuses_a_schema_without_what_it_uses_in_one_line(
    new_database: Callable[[], str], redis_url: str, tmp_path: Path
) -> None:
    url = new_database()
    versions = tmp_path / "versions"
    versions.mkdir()
    await asyncio.to_thread(migrate, url, more_versions=contract_step(versions, oldest=LAST))
    values = options(url, redis_url, "smtp://127.0.0.1:9", log_level="error")
    async with process(values, tmp_path / "log") as dispatcher:
        assert await dispatcher.exit_code() == 2
        *_, last = dispatcher.log().splitlines()
    assert last.endswith(f"this release has {REVISION}: run a newer release")
    assert "Traceback" not in dispatcher.log()


async def test_a_service_that_waits_for_migrate_stops_on_sigterm(
    new_database: Callable[[], str], redis_url: str, tmp_path: Path
) -> None:
    url = without_a_schema(new_database())
    values = options(url, redis_url, "smtp://127.0.0.1:9", log_level="error")
    async with process(values, tmp_path / "log") as dispatcher:
        await eventually(lambda: "run `outbox migrate`" in dispatcher.log())
        assert await dispatcher.not_serving()
        assert await dispatcher.terminate() == 0
    # It reports this once, not at every check.
    assert dispatcher.log().count("run `outbox migrate`") == 1


@pytest.mark.parametrize("service", ["scheduler", "dispatcher", "stats"])
async def test_every_server_describes_itself(
    service: str, database_url: str, redis_url: str
) -> None:
    def described(found: pb.ServerInfo) -> bool:
        return found == pb.ServerInfo(
            service=service,
            version=installed_version(),
            schema_revision=REVISION,
            code_schema_revision=REVISION,
            capabilities=CAPABILITIES,
        )

    async def describes(channel: grpc.aio.Channel) -> bool:
        return described(await info(channel))

    if service == "stats":
        async with stats_server(database_url, redis_url) as channel:
            await eventually(lambda: describes(channel))
    elif service == "scheduler":
        async with (
            running_scheduler(database_url, redis_url) as scheduler,
            grpc.aio.insecure_channel(scheduler.address) as channel,
        ):
            await eventually(lambda: describes(channel))
    else:
        values = options(database_url, redis_url, "smtp://127.0.0.1:9")
        async with running(settings_of(values)) as dispatcher:
            await eventually(lambda: describes(dispatcher.channel))
