"""What all rows share in one run: servers, a sink, the rivals, and the large databases."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from redis.asyncio import Redis

from bench.filling import add_jobs, add_senders, without_indexes
from bench.results import Figures
from bench.rivals.installing import InstalledRivals
from bench.size import BenchSize
from bench.world import BenchStack
from outbox_server.deploy.embedded.passwords import OWNER, SUPERUSER
from outbox_server.deploy.embedded.stack import Servers

Connection = psycopg.AsyncConnection[Any]
# The waiting jobs of the large databases are due in a month.
LATER: Final = timedelta(days=30)
LARGE: Final = "large"
# Each of these rows ends the jobs of one large sender per round.
_ROWS_OF_LARGE: Final = 3
# The jobs that each other sender has at least. A round of `rebuild` uses up one of each.
_LEAST_JOBS: Final = 10
_LEAST_LEAD_S: Final = 4.0


@dataclass(slots=True)
class Bench:
    """One run. The database that `servers` names is migrated and empty: it is the template."""

    servers: Servers
    sink_pid: int
    smtp_port: int
    size: BenchSize
    rivals: InstalledRivals
    say: Callable[[str], None]
    _lead_s: float | None = None
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _kept: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[BenchStack]:
        """Yield a stack with a migrated database of its own and an empty Redis."""
        name = f"round{next(self._numbers)}"
        await self._create(name, self.template)
        try:
            async with self._on(name) as stack:
                yield stack
        finally:
            await self._admin(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(_quoted(name)))

    @asynccontextmanager
    async def waiting(self, senders: int, jobs: int) -> AsyncIterator[BenchStack]:
        """Yield a stack with `jobs` waiting jobs of `senders` senders, which rows share.

        Three senders per round, named `large...`, have a tenth of the jobs each, if there are
        enough for that.
        """
        key = ("waiting", senders, jobs)
        if key not in self._kept:
            self.say(f"building {jobs:,} jobs of {senders:,} senders")
            name = f"waiting{next(self._numbers)}"
            await self._create(name, self.template)
            async with self.connected(self._url(name)) as connection:
                await _fill(connection, senders, jobs, large=_ROWS_OF_LARGE * self.size.rounds)
            self._kept[key] = name
        async with self._on(self._kept[key]) as stack:
            yield stack

    @asynccontextmanager
    async def empty(self) -> AsyncIterator[str]:
        """Yield the URL of an empty database, for a rival. Redis is emptied."""
        name = f"rival{next(self._numbers)}"
        await self._create(name, "template0")
        try:
            async with self._on(name) as stack:
                yield stack.database_url
        finally:
            await self._admin(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(_quoted(name)))

    @asynccontextmanager
    async def connected(self, url: str) -> AsyncIterator[Connection]:
        """Yield a connection in autocommit."""
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            yield connection

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[Redis]:
        """Yield a client of Redis."""
        async with Redis.from_url(self.servers.redis_url) as client:
            yield client

    async def lead_s(self) -> float:
        """Return how long before it is due mail is scheduled, so that a dispatcher is ready.

        A dispatcher is started once to find out: a machine with other work takes longer.
        """
        if self._lead_s is None:
            async with self.fresh() as stack:
                began = time.monotonic()
                with stack.process("dispatcher"):
                    self._lead_s = _LEAST_LEAD_S + 2 * (time.monotonic() - began)
        return self._lead_s

    async def once(
        self, key: tuple[Any, ...], measure: Callable[[], Awaitable[Figures]]
    ) -> Figures:
        """Measure what several rows need in the same round once."""
        if key not in self._kept:
            self._kept[key] = await measure()
        found: Figures = self._kept[key]
        return found

    @property
    def template(self) -> str:
        """The name of the migrated database."""
        return urlsplit(self.servers.database_url).path.lstrip("/")

    @property
    def rivals_login(self) -> str:
        """`user:password` of PostgreSQL: not every driver reads a file of passwords."""
        return f"{OWNER}:{self.servers.postgres.passwords.password_of(OWNER)}"

    def _url(self, name: str) -> str:
        return self.servers.postgres.url(name)

    @asynccontextmanager
    async def _on(self, name: str) -> AsyncIterator[BenchStack]:
        async with self.redis() as redis:
            await redis.flushall()
        # What earlier rounds wrote is on disk before the next one begins.
        await self._admin(sql.SQL("CHECKPOINT"))
        yield BenchStack(self.servers, self.smtp_port, self._url(name))

    async def _create(self, name: str, template: str) -> None:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER outbox")
        await self._admin(statement.format(_quoted(name), _quoted(template)))

    async def _admin(self, statement: sql.SQL | sql.Composed) -> None:
        url = self.servers.postgres.url("postgres", SUPERUSER)
        async with self.connected(url) as connection:
            await connection.execute(statement)


def _quoted(name: str) -> sql.Identifier:
    return sql.Identifier(name)


async def _fill(connection: Connection, senders: int, jobs: int, *, large: int) -> None:
    cursor = await connection.execute("SELECT now() + %s", [LATER])
    row = await cursor.fetchone()
    start = row[0] if row else None
    enough = jobs - jobs // 10 * large >= _LEAST_JOBS * senders
    large = large if jobs // 10 >= 1_000 and enough and senders <= 1_000 else 0
    async with without_indexes(connection):
        if large:
            ids = await add_senders(connection, large, LARGE)
            await add_jobs(connection, ids, jobs // 10, start=start, name=LARGE)
        ids = await add_senders(connection, senders - large)
        left = jobs - large * (jobs // 10)
        per = max(1, left // len(ids))
        await add_jobs(connection, ids, per, start=start)
        # On top of the waiting ones: mail that was sent a day ago.
        await add_jobs(connection, ids, max(1, per // 20), start=start, name="old", ended=True)
    await connection.execute("VACUUM ANALYZE")


def figures_of(**figures: float) -> Mapping[str, float]:
    """Return figures by their names."""
    return figures


async def run_to_end(argv: list[str], env: dict[str, str] | None, cwd: Path) -> bytes:
    """Run a program and return its output.

    Raises:
        RuntimeError: it failed.
    """
    child = await asyncio.create_subprocess_exec(
        *argv, env=env, cwd=cwd, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await child.communicate()
    if child.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {child.returncode}")
    return output
