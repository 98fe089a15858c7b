"""`outbox scheduler`, `dispatcher`, `stats` and `migrate` as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psycopg
import pytest
from psycopg import sql

from outbox_server.deploy.ports import free_port
from tests.conftest import Stores
from tests.eventually import PATIENCE, eventually
from tests.probing import serving

OUTBOX = Path(sys.executable).with_name("outbox")


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return kept | variables


@contextmanager
def running(
    folder: Path, name: str, variables: dict[str, str], *options: str
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [OUTBOX, name, *options],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("name", "service"),
    [
        ("scheduler", "outbox.v1.SenderService"),
        ("dispatcher", "outbox.v1.DispatcherService"),
        ("stats", "outbox.v1.StatsService"),
    ],
)
async def test_a_service_command_serves_until_sigterm(
    name: str, service: str, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    variables = {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_REDIS_URL": redis_url,
        "OUTBOX_AUTH": "off",
        f"OUTBOX_{name.upper()}_LISTEN": address,
    }
    with running(tmp_path, name, variables) as process:
        async with grpc.aio.insecure_channel(address) as channel:

            async def serves() -> bool:
                assert process.poll() is None
                return await serving(channel, service)

            await eventually(serves)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (0, "")


async def test_a_dispatcher_with_hold_first_holds_the_installation(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    variables = {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_REDIS_URL": redis_url,
        "OUTBOX_AUTH": "off",
        "OUTBOX_DISPATCHER_LISTEN": "127.0.0.1:0",
    }
    with psycopg.connect(database_url, autocommit=True) as connection:

        def held() -> bool:
            return bool(connection.execute("SELECT FROM hold WHERE reason = 3").rowcount)

        with running(tmp_path, "dispatcher", variables, "--hold"):
            await eventually(held)


def test_a_service_command_with_an_invalid_variable_exits_with_code_2(tmp_path: Path) -> None:
    with running(tmp_path, "stats", {"OUTBOX_LEASE": "1y"}) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert "OUTBOX_LEASE" in err


def test_migrate_creates_the_schema_and_can_be_run_again(stores: Stores, tmp_path: Path) -> None:
    name = sql.Identifier("outbox_to_migrate")
    stores.administrate(sql.SQL("CREATE DATABASE {} OWNER outbox").format(name))
    url = stores.postgres.url("outbox_to_migrate")
    try:
        for _ in range(2):
            with running(tmp_path, "migrate", {"OUTBOX_DATABASE_URL": url}) as process:
                out, err = process.communicate(timeout=PATIENCE)
            assert (process.returncode, out) == (0, "")
            assert "is up to date" in err
        with psycopg.connect(url) as connection:
            connection.execute("SELECT id FROM senders")
    finally:
        stores.administrate(sql.SQL("DROP DATABASE {} (FORCE)").format(name))


def test_migrate_without_a_database_reports_it_in_one_line(tmp_path: Path) -> None:
    url = f"postgresql://outbox:geheim@127.0.0.1:{free_port()}/outbox"
    with running(tmp_path, "migrate", {"OUTBOX_DATABASE_URL": url}) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("outbox: OUTBOX_DATABASE_URL: ")
    assert err.count("\n") == 1
    assert "geheim" not in err
