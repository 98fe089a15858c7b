"""Stores that answer and do not serve: health says why, and mail goes on afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from psycopg import sql
from redis.asyncio import Redis

from outbox_server.deploy.child import Child
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.deploy.wheels import valkey_binary
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from tests.conftest import Stores
from tests.dispatchers import DispatcherProcess, options, process, readiness, settings_of
from tests.eventually import eventually
from tests.world import World

Trouble = Callable[[Stores, str], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def full(stores: Stores, _: str) -> AsyncIterator[None]:
    async with Redis.from_url(stores.redis.url) as client:
        await client.config_set("maxmemory", "1")
        try:
            yield
        finally:
            await client.config_set("maxmemory", "0")


@asynccontextmanager
async def replica(stores: Stores, _: str) -> AsyncIterator[None]:
    async with Redis.from_url(stores.redis.url) as client:
        follow: Any = client.replicaof
        # It keeps its data, as its primary cannot be reached.
        await follow(LOOPBACK, free_port())
        try:
            yield
        finally:
            await follow("NO", "ONE")


@asynccontextmanager
async def without_a_command(stores: Stores, _: str) -> AsyncIterator[None]:
    """An access rule forbids one of the commands that scripts use."""
    async with Redis.from_url(stores.redis.url) as client:
        await client.acl_setuser("default", enabled=True, commands=["-info"], reset=False)
        try:
            yield
        finally:
            await client.acl_setuser("default", enabled=True, commands=["+info"], reset=False)


@asynccontextmanager
async def read_only(stores: Stores, database: str) -> AsyncIterator[None]:
    change = sql.SQL("ALTER DATABASE {} {} default_transaction_read_only{}")
    name = sql.Identifier(database)
    stores.administrate(change.format(name, sql.SQL("SET"), sql.SQL(" = on")))
    end_sessions(stores, database)
    try:
        yield
    finally:
        stores.administrate(change.format(name, sql.SQL("RESET"), sql.SQL("")))
        end_sessions(stores, database)


@asynccontextmanager
async def without_a_column(stores: Stores, database: str) -> AsyncIterator[None]:
    rename = "ALTER TABLE email_jobs RENAME COLUMN {} TO {}"
    with psycopg.connect(stores.postgres.url(database, SUPERUSER), autocommit=True) as admin:
        admin.execute("SET lock_timeout = '10s'")
        admin.execute(rename.format("variables", "gone").encode())
        try:
            yield
        finally:
            admin.execute(rename.format("gone", "variables").encode())


@asynccontextmanager
async def without_a_privilege(stores: Stores, database: str) -> AsyncIterator[None]:
    """The table is written by a trigger, with the outcome of each mail."""
    with psycopg.connect(stores.postgres.url(database, SUPERUSER), autocommit=True) as admin:
        admin.execute("REVOKE INSERT ON job_events FROM outbox")
        try:
            yield
        finally:
            admin.execute("GRANT INSERT ON job_events TO outbox")


def end_sessions(stores: Stores, database: str) -> None:
    stores.administrate(
        sql.SQL(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = {} AND pid <> pg_backend_pid()"
        ).format(sql.Literal(database))
    )


@asynccontextmanager
async def ready_dispatcher(
    values: dict[str, str], folder: Path
) -> AsyncIterator[tuple[DispatcherProcess, str]]:
    address = f"{LOOPBACK}:{free_port()}"
    async with process({**values, "health_listen": address}, folder / "log") as dispatcher:
        await eventually(dispatcher.serving)
        yield dispatcher, address


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (full, "redis: out of memory"),
        (replica, "redis: read-only replica"),
        (without_a_command, "redis: permission denied"),
        (read_only, "postgresql: read-only server"),
        (without_a_column, "postgresql: column missing"),
        (without_a_privilege, "postgresql: permission denied"),
    ],
)
async def test_a_store_that_answers_and_does_not_serve_is_reported_and_mail_goes_on_later(
    stores: Stores,
    new_database: Callable[[], str],
    redis_url: str,
    inbox: Inbox,
    tmp_path: Path,
    trouble: Trouble,
    reason: str,
) -> None:
    url = new_database()
    values = options(url, redis_url, inbox.url, lease="3s")
    async with ready_dispatcher(values, tmp_path) as (dispatcher, address):
        async with trouble(stores, urlsplit(url).path.strip("/")):

            async def reported() -> bool:
                return await readiness(address) == ("NOT_SERVING", reason)

            await eventually(reported)
            store, _, kind = reason.partition(": ")
            # On a busy machine, a store may be late besides.
            lines = [
                line
                for line in dispatcher.log().splitlines()
                if "store_fails" in line and f'"{store}"' in line and kind in line
            ]
            assert lines, dispatcher.log()
            async with grpc.aio.insecure_channel(address) as channel:
                alive = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service="liveness")
                )
                assert alive.status == health_pb2.HealthCheckResponse.SERVING
        await eventually(dispatcher.serving)
        async with World(settings_of(values)) as world:
            await world.schedule(await world.sender(), 3)
            await eventually(lambda: len(inbox.mails) == 3)
        assert dispatcher.is_running()
    # At growing intervals: far fewer lines than checks.
    assert len(lines) <= 3


@asynccontextmanager
async def cluster_node(binary: Path, folder: Path) -> AsyncIterator[Redis]:
    folder.mkdir()  # noqa: ASYNC240
    port = free_port()
    words: list[str | Path] = [binary, "--port", str(port), "--bind", LOOPBACK]
    words += ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    node = Child(
        "cluster node",
        [*words, "--dir", folder, "--save", ""],
        log=folder / "log",
        cwd=folder,
    )
    node.start()
    try:
        async with Redis(host=LOOPBACK, port=port, decode_responses=True) as client:

            async def answers() -> bool:
                try:
                    return bool(await client.ping())
                except QUEUE_ERRORS:
                    return False

            await eventually(answers)
            yield client
    finally:
        await node.stop()


async def test_a_cluster_node_without_the_slot_is_reported(
    stores: Stores, new_database: Callable[[], str], inbox: Inbox, tmp_path: Path
) -> None:
    binary = stores.redis.binary or valkey_binary()
    async with (
        cluster_node(binary, tmp_path / "1") as ours,
        cluster_node(binary, tmp_path / "2") as other,
    ):
        port = ours.connection_pool.connection_kwargs["port"]
        address = f"{LOOPBACK}:{free_port()}"
        url = f"redis://{LOOPBACK}:{port}/0"
        values = options(new_database(), url, inbox.url, health_listen=address)
        async with process(values, tmp_path / "log") as dispatcher:
            await dispatcher.address()

            async def reported(reason: str) -> bool:
                return await readiness(address) == ("NOT_SERVING", f"redis: {reason}")

            await eventually(lambda: reported("cluster is down"))
            command: Any = other.execute_command
            await command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await command("CLUSTER", "SET-CONFIG-EPOCH", 2)
            config: Any = await ours.config_get("cluster-port")
            await command("CLUSTER", "MEET", LOOPBACK, port, config["cluster-port"])
            await eventually(lambda: reported("slot is on another node"))
            assert dispatcher.is_running()


async def test_unreachable_stores_are_logged_with_their_place_and_without_secrets(
    tmp_path: Path,
) -> None:
    postgres, redis = free_port(), free_port()
    values = options(
        f"postgresql://outbox:hunter2@{LOOPBACK}:{postgres}/outbox",
        f"redis://:hunter2@{LOOPBACK}:{redis}/0",
        f"smtp://{LOOPBACK}:9",
        shard="4",
        health_listen=f"{LOOPBACK}:{free_port()}",
    )
    async with process(values, tmp_path / "log") as dispatcher:

        def reports() -> list[str]:
            return [line for line in dispatcher.log().splitlines() if "store_fails" in line]

        # At once, after two seconds, and after four more.
        await eventually(lambda: len(reports()) >= 4)
        for port in (postgres, redis):
            assert sum(f"{LOOPBACK}:{port}/" in line for line in reports()) >= 2
        assert all('"trouble": "unreachable"' in line for line in reports())
        assert "Connection refused" in reports()[0] or "Connect call failed" in reports()[0]
        assert "did you mean OUTBOX_SHARDS?" in dispatcher.log()
        assert await readiness(values["health_listen"]) == (
            "NOT_SERVING",
            "postgresql: unreachable; redis: unreachable",
        )
        assert await dispatcher.terminate() == 0
    assert "hunter2" not in dispatcher.log()
    assert "Traceback" not in dispatcher.log()


@pytest.mark.parametrize(
    ("service", "url", "redis_url", "complaint"),
    [
        ("scheduler", "db:54a2/outbox", "x/0", "DATABASE_URL: has a port that is not a number"),
        ("dispatcher", "db/outbox?sslmode=bogus", "x/0", "DATABASE_URL: sslmode must be one of"),
        ("stats", "db/outbox?connect_timeout=abc", "x/0", "DATABASE_URL: connect_timeout must be"),
        ("scheduler", "db/outbox", "x/0?socket_timeout=5s", "REDIS_URL: socket_timeout must be"),
    ],
)
async def test_a_malformed_url_ends_the_start_with_one_line(
    service: str, url: str, redis_url: str, complaint: str, tmp_path: Path
) -> None:
    values = options(f"postgresql://outbox:hunter2@{url}", f"redis://{redis_url}", "smtp://x:9")
    async with process(values, tmp_path / "log", service) as child:
        assert await child.exit_code() == 2
    (line,) = child.log().splitlines()
    assert line.startswith(f"OUTBOX_{complaint}")
    assert "hunter2" not in line
