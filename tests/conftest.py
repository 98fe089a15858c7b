"""One real PostgreSQL and one real Redis per run, and the isolation of tests from one another.

By default the embedded pair runs. With `OUTBOX_TEST_STORES=debian`, Debian's PostgreSQL 15 and
Redis 7.0 run, and only the tests that use them: the results of the others would be the same. If a
server is missing, the tests that need it fail. A server starts when a test first needs it.

The drivers and Hypothesis are imported where they are used. With several workers, one process only
distributes the tests: it needs none of them, and the workers start after it.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox_server.deploy.ports import skip_to_part

# grpc reads this at import. Without it, a server that a test starts while a channel is open may end
# in grpc's fork handlers, before it is PostgreSQL or Redis.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from psycopg import sql
    from redis.asyncio import Redis

    from outbox_server.deploy.embedded.inbox import Inbox
    from outbox_server.deploy.embedded.postgres import PostgresServer
    from outbox_server.deploy.embedded.valkey import ValkeyServer
    from tests.dns_server import DnsServer

TEMPLATE = "outbox_template"
DATABASE = "outbox_test"
# Between two tests, the files of the tables are made anew if they have more bytes together.
_MOST_BYTES = 4_000_000


@dataclass(frozen=True)
class Stores:
    """The servers of this run. A test that stops one starts it again."""

    postgres: PostgresServer
    redis: ValkeyServer

    def administrate(self, statement: sql.Composed) -> None:
        """Run a statement as the superuser, outside a transaction."""
        import psycopg

        from outbox_server.deploy.embedded.passwords import SUPERUSER

        url = self.postgres.url("postgres", SUPERUSER)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement)

    def clone(self, database: str, template: str = TEMPLATE) -> str:
        """Make a copy of a database, by default with the schema and no rows; return its URL."""
        from psycopg import sql

        self.administrate(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER outbox").format(
                sql.Identifier(database), sql.Identifier(template)
            )
        )
        return self.postgres.url(database)


def pytest_configure() -> None:
    """Let each worker look for free ports in a part of them where no other worker looks.

    Otherwise one worker may choose a port that another one has chosen and not bound yet.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw"):
        return
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    # All workers of a run know its id, and another run at the same time has another one.
    run = int(hashlib.sha256(os.environ["PYTEST_XDIST_TESTRUNUID"].encode()).hexdigest(), 16)
    skip_to_part(int(worker.removeprefix("gw")), count, run)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without the garbage collector, and exclude imported objects from its work.

    The imported modules contain hundreds of thousands of objects that are never garbage, and each
    full collection would examine all of them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Set up Hypothesis when a folder of tests is collected."""
    if not isinstance(collector, pytest.Directory):
        return
    import hypothesis

    # No time limit: on a busy machine the examples are slow but still valid.
    hypothesis.settings.register_profile(
        "outbox",
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        max_examples=_number_of_examples(),
    )
    hypothesis.settings.load_profile("outbox")


def _number_of_examples() -> int:
    """Return the number of examples of a property test. Each run generates other examples."""
    text = os.environ.get("OUTBOX_TEST_EXAMPLES", "50")
    if not text.isdecimal() or int(text) == 0:
        raise pytest.UsageError(f"OUTBOX_TEST_EXAMPLES={text}: it takes a number from 1 on")
    return int(text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that do not depend on the stores, unless these are the default pair."""
    if _kind_of_stores() == "embedded":
        return
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        uses = "stores" in getattr(item, "fixturenames", ())
        (chosen if uses else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def _kind_of_stores() -> str:
    kind = os.environ.get("OUTBOX_TEST_STORES", "embedded")
    if kind not in ("embedded", "debian"):
        raise pytest.UsageError(f"OUTBOX_TEST_STORES={kind}: it takes embedded or debian")
    return kind


def _choose_stores(kind: str, folder: Path) -> Stores:
    from outbox_server.deploy.embedded.postgres import PostgresServer
    from outbox_server.deploy.embedded.valkey import ValkeyServer

    postgres, redis = folder / "postgres", folder / "redis"
    if kind == "embedded":
        return Stores(PostgresServer(postgres, durable=False), ValkeyServer(redis))
    return Stores(
        PostgresServer(
            postgres,
            durable=False,
            binaries=Path("/usr/lib/postgresql/15/bin"),
            system_user="postgres",
        ),
        ValkeyServer(redis, binary=Path("/usr/bin/redis-server")),
    )


def _build_schema(url: str) -> None:
    import psycopg
    from psycopg import sql

    from outbox_server.shared.database.migrating import migrate
    from outbox_server.shared.database.models import Base

    migrate(url)
    with psycopg.connect(url, autocommit=True) as connection:
        for table in Base.metadata.sorted_tables:
            # Or else PostgreSQL's plans would depend on what was in a table at some moment of an
            # earlier test.
            change = sql.SQL("ALTER TABLE {} SET (autovacuum_enabled = false)")
            connection.execute(change.format(sql.Identifier(table.name)))


@pytest.fixture(autouse=True)
def _log_apart() -> None:
    """Let each test begin with the same log, whatever an earlier one has configured."""
    from tests.server_log import write_log_apart

    write_log_apart()


@pytest.fixture(scope="session")
def stores() -> Iterator[Stores]:
    """Start both servers, with the schema in a template database."""
    from tests.shared_statements import share_statements

    # Not pytest's own folder: only its owner may enter it, and PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="outbox-test-"))
    folder.chmod(0o711)
    chosen = _choose_stores(_kind_of_stores(), folder)

    async def start() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(chosen.postgres.start())
            group.create_task(chosen.redis.start())
        await chosen.postgres.ensure_database(TEMPLATE)

    async def stop() -> None:
        await chosen.postgres.stop()
        await chosen.redis.stop()

    # A separate loop that is not set as the thread's loop, since each test has its own loop.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        try:
            runner.run(start())
            _build_schema(chosen.postgres.url(TEMPLATE))
            share_statements()
            yield chosen
        finally:
            runner.run(stop())
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def _run_database(stores: Stores) -> str:
    return stores.clone(DATABASE)


@pytest.fixture(scope="session")
def _delete_rows(_run_database: str) -> Iterator[Callable[[], object]]:
    from psycopg import sql

    from outbox_server.shared.database.models import Base
    from tests.kept_connection import KeptConnection

    tables = [sql.Identifier(table.name) for table in reversed(Base.metadata.sorted_tables)]
    # DELETE is twenty times as fast as TRUNCATE, which creates new files, but leaves the old pages.
    delete = sql.SQL("; ").join(sql.SQL("DELETE FROM {}").format(table) for table in tables)
    statement = sql.SQL(
        "DO $$ BEGIN IF (SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relkind = 'r'"
        " AND relnamespace = 'public'::regnamespace) > {} THEN TRUNCATE {}; ELSE {}; END IF; END $$"
    ).format(sql.Literal(_MOST_BYTES), sql.SQL(", ").join(tables), delete)
    connection = KeptConnection(_run_database)
    yield lambda: connection.execute(statement)
    connection.close()


@pytest.fixture
def database_url(_run_database: str, _delete_rows: Callable[[], object]) -> str:
    """The run's database: migrated and without rows."""
    _delete_rows()
    return _run_database


@pytest.fixture
def new_database(stores: Stores) -> Iterator[Callable[..., str]]:
    """Return a function that creates a migrated database for one test and returns its URL.

    Its argument is a database to copy instead of the empty one.
    """
    from psycopg import sql

    names: list[str] = []
    numbers = itertools.count(1)

    def create(template: str = TEMPLATE) -> str:
        names.append(f"outbox_own_{next(numbers)}")
        return stores.clone(names[-1], template)

    yield create
    for name in names:
        stores.administrate(sql.SQL("DROP DATABASE {} (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def redis_url(stores: Stores) -> str:
    """The run's Redis, empty."""
    import redis

    with redis.Redis.from_url(stores.redis.url) as client:
        client.flushall()
    return stores.redis.url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of the run's Redis, which starts empty."""
    from redis.asyncio import Redis

    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def inbox(tmp_path: Path) -> AsyncIterator[Inbox]:
    """An SMTP server for one test, which accepts every mail."""
    from outbox_server.deploy.embedded.inbox import Inbox

    async with Inbox(tmp_path / "inbox") as server:
        yield server


@pytest.fixture
async def names() -> AsyncIterator[DnsServer]:
    """A DNS server for one test, whose `resolver()` asks it."""
    from tests.dns_server import DnsServer

    async with DnsServer() as server:
        yield server
