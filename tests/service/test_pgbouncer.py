"""All services behind PgBouncer in transaction mode, and the URLs that lead to several hosts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.shared.database import engine as engine_module
from outbox_server.shared.database.connecting import parse_target
from outbox_server.shared.database.engine import create_engine, snapshot
from outbox_server.shared.database.migrating import migrate
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings
from tests.conftest import DATABASE, Stores
from tests.dispatchers import options, process, settings_of
from tests.eventually import eventually
from tests.pgbouncer import pooler
from tests.scheduler_stack import Scheduler


def password_of(stores: Stores) -> str:
    return stores.postgres.passwords.password_of("outbox")


@asynccontextmanager
async def engine_of(url: str, **kind: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(load_settings(database_url=url, database_pool=2), **kind)
    try:
        yield engine
    finally:
        await engine.dispose()


async def shown(connection: AsyncConnection, *names: str) -> list[Any]:
    return [await connection.scalar(text(f"SHOW {name}")) for name in names]


async def test_mail_is_sent_through_a_pooler_that_is_killed_and_then_leads_to_another_server(
    stores: Stores, database_url: str, redis_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    async with (
        TcpProxy(lambda: stores.postgres.port) as first,
        pooler(first.port, DATABASE, password_of(stores)) as bouncer,
        AsyncExitStack() as stack,
    ):
        stack.enter_context(administrated(stores))
        values = options(
            bouncer.url(DATABASE), redis_url, inbox.url, lease="15s", dispatcher_concurrency=3
        )
        async with (
            process(values, tmp_path / "dispatcher") as dispatcher,
            process(values, tmp_path / "stats", "stats") as stats,
            process(values, tmp_path / "scheduler", "scheduler") as server,
            grpc.aio.insecure_channel(await server.address()) as channel,
        ):
            services = (dispatcher, stats, server)
            for service in services:
                await eventually(service.ready)
            settings = settings_of({**values, "database_url": database_url})
            scheduler = Scheduler(channel, settings, await server.address())
            sender = await scheduler.sender(hourly_limit=1_000_000)
            refused: set[grpc.StatusCode] = set()
            accepted = 0

            async def scheduled(request: str, csv: str) -> bool:
                try:
                    await scheduler.schedule(sender, csv, request_id=request)
                except grpc.aio.AioRpcError as error:
                    refused.add(error.code())
                    return False
                return True

            async def batch() -> None:
                nonlocal accepted
                csv = "email\n" + "".join(f"r{n}@b.org\n" for n in range(25))
                # A call may meet the moment of the fault; the same request is repeated.
                request = f"batch-{accepted}"
                await eventually(lambda: scheduled(request, csv))
                accepted += 25
                await eventually(lambda: len({m.message_id for m in inbox.mails}) == accepted)

            await batch()
            await bouncer.kill()
            for service in services:
                await eventually(service.unready)
            await bouncer.start()
            await batch()
            # The server's address changes, and every session with it.
            bouncer.lead_to(stores.postgres.port)
            first.refuse()
            await batch()
            for service in services:
                await eventually(service.ready)
                assert service.is_running()
        assert refused <= {grpc.StatusCode.UNAVAILABLE}
        sent = Counter(mail.message_id for mail in inbox.mails)
        # No mail was in doubt: no dispatcher died, and no lease ended.
        assert sent.total() == accepted == 75, dispatcher.log()


# The settings of a transaction, and values that an administrator may have chosen for the database.
OURS = {
    "statement_timeout": ("1min", "700ms"),
    "TimeZone": ("UTC", "Asia/Kolkata"),
    "enable_seqscan": ("off", "on"),
    "lock_timeout": ("10s", "50ms"),
    "idle_in_transaction_session_timeout": ("1min", "300ms"),
    "DateStyle": ("ISO, DMY", "SQL, DMY"),
    "IntervalStyle": ("postgres", "iso_8601"),
    "bytea_output": ("hex", "escape"),
    "array_nulls": ("on", "off"),
}


@contextmanager
def administrated(stores: Stores) -> Iterator[None]:
    """Let the database have other settings than Outbox needs."""
    change = sql.SQL("ALTER DATABASE {} {}")
    for name, (_, value) in OURS.items():
        setting = sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
        stores.administrate(change.format(sql.Identifier(DATABASE), setting))
    try:
        yield
    finally:
        stores.administrate(change.format(sql.Identifier(DATABASE), sql.SQL("RESET ALL")))


@pytest.mark.parametrize("pooled", [False, True])
async def test_settings_hold_in_each_transaction_and_do_not_reach_other_clients(
    stores: Stores, database_url: str, *, pooled: bool
) -> None:
    ours = [value for value, _ in OURS.values()]
    async with AsyncExitStack() as stack:
        stack.enter_context(administrated(stores))
        url = database_url
        if pooled:
            port = stores.postgres.port
            bouncer = await stack.enter_async_context(pooler(port, DATABASE, password_of(stores)))
            url = bouncer.url(DATABASE)
        kinds: list[dict[str, bool]] = [{}, {"single_statements": True}]
        for kind in kinds:
            async with engine_of(url, lookups_only=True, **kind) as engine:
                for _ in range(2):
                    async with engine.connect() as connection:
                        assert await shown(connection, *OURS) == ours
                async with snapshot(engine) as connection:
                    assert await shown(connection, "transaction_read_only") == ["on"]
                    assert await shown(connection, *OURS) == ours
        with psycopg.connect(url, autocommit=True) as other:
            for name, (_, value) in OURS.items():
                row = other.execute(f"SHOW {name}".encode()).fetchone()
                assert row == (value,)


@pytest.mark.parametrize("pooled", [False, True])
async def test_a_transaction_that_is_left_idle_loses_its_locks(
    stores: Stores, database_url: str, monkeypatch: pytest.MonkeyPatch, *, pooled: bool
) -> None:
    monkeypatch.setattr(engine_module, "_IDLE_TIMEOUT_MS", 300)
    lock = text("SELECT pg_advisory_xact_lock(1)")
    async with AsyncExitStack() as stack:
        url = database_url
        if pooled:
            port = stores.postgres.port
            bouncer = await stack.enter_async_context(pooler(port, DATABASE, password_of(stores)))
            url = bouncer.url(DATABASE)
        engine = await stack.enter_async_context(engine_of(url))
        async with engine.connect() as left, engine.connect() as other:
            await left.execute(lock)
            # It waits for the end of the first transaction.
            await other.execute(lock)
            with pytest.raises(OperationalError):
                await left.execute(lock)
        async with engine.connect() as connection:
            await connection.execute(lock)


async def test_statements_are_prepared_without_a_pooler_only(
    stores: Stores, database_url: str
) -> None:
    async def prepared(url: str) -> int:
        """Repeat a statement; return how many of the session are prepared."""
        async with engine_of(url, single_statements=True) as engine, engine.connect() as connection:
            for number in range(12):
                answer = await connection.scalar(text("SELECT :n + 1"), {"n": number})
                assert answer == number + 1
            count = text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE :like")
            return int(await connection.scalar(count, {"like": "SELECT $1%+ 1"}) or 0)

    assert await prepared(database_url) == 1
    assert await prepared(f"{database_url}&prepare_threshold=none") == 0
    async with pooler(stores.postgres.port, DATABASE, password_of(stores)) as bouncer:
        url = bouncer.url(DATABASE)
        # Clients whose statements would have the same names.
        assert await asyncio.gather(*(prepared(url) for _ in range(8))) == [0] * 8


@pytest.mark.usefixtures("database_url")
async def test_a_statement_that_is_given_up_sends_no_cancel_request_to_a_pooler(
    stores: Stores, database_url: str
) -> None:
    """PgBouncer 1.18 ends, with the connections of all its clients, if many come."""

    async def running(seconds: int) -> int:
        """Return how many statements sleep for this time."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = :query"
        async with engine_of(database_url) as engine, engine.connect() as connection:
            values = {"query": f"SELECT pg_sleep({seconds})"}
            return int(await connection.scalar(text(query), values) or 0)

    async def give_up(url: str, seconds: int) -> None:
        """Begin two statements, cancel them, and use the pool again."""

        async def sleep() -> None:
            async with engine.connect() as connection:
                await connection.execute(text(f"SELECT pg_sleep({seconds})"))

        async def begun() -> bool:
            return await running(seconds) == len(tasks)

        async with engine_of(url) as engine:
            tasks = [asyncio.create_task(sleep()) for _ in range(2)]
            await eventually(begun)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
            async with engine.connect() as connection:
                assert await connection.scalar(text("SELECT 1")) == 1

    async with pooler(stores.postgres.port, DATABASE, password_of(stores)) as bouncer:
        await give_up(bouncer.url(DATABASE), 3)
        assert "cancel request" not in bouncer.log.read_text()
    # Without a pooler, PostgreSQL ends them at once.
    await give_up(database_url, 60)
    assert await running(60) == 0


@pytest.mark.usefixtures("database_url")
async def test_migrate_refuses_a_pooler_in_one_line(stores: Stores) -> None:
    async with pooler(stores.postgres.port, DATABASE, password_of(stores)) as bouncer:
        with pytest.raises(ConfigurationError, match=r"^OUTBOX_DATABASE_URL: .* leads to a pooler"):
            await asyncio.to_thread(migrate, bouncer.url(DATABASE))


async def test_a_url_with_several_hosts_finds_the_one_that_can_write(
    stores: Stores, new_database: Callable[[], str]
) -> None:
    name = urlsplit(new_database()).path.strip("/")
    for hosts in (
        f"{LOOPBACK}:{free_port()},{LOOPBACK}:{stores.postgres.port}",
        f"{LOOPBACK}:{stores.postgres.port},[::1]:{free_port()}",
    ):
        login = f"outbox:{password_of(stores)}"
        url = f"postgresql://{login}@{hosts}/{name}?target_session_attrs=read-write"
        await asyncio.to_thread(migrate, url)
        async with engine_of(f"{url}&prepare_threshold=2") as engine, engine.connect() as found:
            assert await found.scalar(text("SELECT current_database()")) == name


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("prepare_threshold=often", "prepare_threshold must be none or a number"),
        ("prepare_threshold=-1", "prepare_threshold must be none or a number"),
        ("sslmod=require", "has an unknown parameter 'sslmod'"),
        ("password=%zz", "is malformed for libpq"),
    ],
)
def test_a_wrong_parameter_of_the_database_is_named(query: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_target(f"postgresql://outbox:hunter2@db/outbox?{query}")
    assert complaint in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("query", "after"),
    [
        ("prepare_threshold=3&sslmode=require", 3),
        ("sslmode=require&prepare_threshold=0", None),
        ("sslmode=require&prepare_threshold=none&connect_timeout=2", None),
    ],
)
def test_prepare_threshold_is_no_parameter_of_libpq(query: str, after: int | None) -> None:
    target = parse_target(f"postgresql+psycopg://outbox@db1:1,db2:2/outbox?{query}")
    assert (target.prepare_given, target.prepare_after) == (True, after)
    assert "prepare_threshold" not in target.parameters
    assert target.parameters["sslmode"] == "require"
    assert (target.parameters["host"], target.parameters["port"]) == ("db1,db2", "1,2")
