"""Runs the rivals' queues: the same mails, the same sink, PostgreSQL and Redis."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

from bench.bench import Bench, run_to_end
from bench.world import background

BULLMQ: Final = "BullMQ"
TASKIQ: Final = "taskiq"
PROCRASTINATE: Final = "procrastinate"
NAMES: Final = (BULLMQ, TASKIQ, PROCRASTINATE)
# What a reader of the table must know.
DOES_LESS: Final = {
    BULLMQ: "BullMQ 6 + pooled nodemailer + pg: no window, no gap, no fencing, no record of "
    "attempts; jobs are in Redis alone, without fsync; templates are inserted unescaped",
    TASKIQ: "taskiq + aiosmtplib (kept connections) + asyncpg: the same, and a killed worker loses "
    "the mails that it has fetched",
    PROCRASTINATE: "procrastinate + aiosmtplib (kept connections) + asyncpg: no window, no gap, no "
    "record of attempts; its queue is in PostgreSQL, as ours is",
}

_TABLE: Final = """
    CREATE TABLE mails (
        id bigint PRIMARY KEY, sender text NOT NULL, recipient text NOT NULL, name text NOT NULL,
        "order" text NOT NULL, city text NOT NULL, due_at timestamptz,
        state smallint NOT NULL DEFAULT 1, started_at timestamptz, sent_at timestamptz, reply text)
"""
_ROWS: Final = """
    INSERT INTO mails (id, sender, recipient, name, "order", city, due_at)
    SELECT n, 's' || n %% %(senders)s || '@example.com', 'r' || n || '@example.net',
           'Ann Example ' || n, lpad(n::text, 8, '0'), 'Springfield',
           %(start)s::timestamptz + n * %(every)s
    FROM generate_series(1, %(mails)s) AS n
"""
SENT: Final = "SELECT count(*) FROM mails WHERE state = 3"


@dataclass(frozen=True, slots=True)
class RivalQueue:
    """A rival with its mails in the queue."""

    name: str
    database_url: str
    _bench: Bench
    _smtp_port: int

    @contextmanager
    def worker(self, concurrency: int) -> Iterator[int]:
        """Send the mails, until the context ends; yield the id of the process."""
        env = self._environment | {"CONCURRENCY": str(concurrency)}
        if self.name == BULLMQ:
            node, folder = self._bench.rivals.node()
            argv = [node, "worker.js"]
        else:
            python, folder = self._bench.rivals.python()
            argv = [python, "procrastinate_mails.py", "work"]
            if self.name == TASKIQ:
                argv = [python, "-m", "taskiq", "worker", "taskiq_mails:broker", "--workers", "1"]
                argv += ["--max-async-tasks", str(concurrency), "--log-level", "ERROR"]
        with background(argv, env, folder) as pid:
            yield pid

    async def enqueue(self) -> None:
        """Put the rows of the table into the queue."""
        if self.name == BULLMQ:
            await add_bulk(self._bench, self._environment)
            return
        python, folder = self._bench.rivals.python()
        script = "taskiq_mails.py" if self.name == TASKIQ else "procrastinate_mails.py"
        env = os.environ | self._environment
        await run_to_end([python, script, "enqueue"], env, folder)

    @property
    def _login_url(self) -> str:
        name = urlsplit(self.database_url).path
        port = self._bench.servers.postgres.port
        return f"postgresql://{self._bench.rivals_login}@127.0.0.1:{port}{name}"

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "DATABASE_URL": self._login_url,
            "REDIS_URL": self._bench.servers.redis_url,
            "SMTP_PORT": str(self._smtp_port),
            "PYTHONDONTWRITEBYTECODE": "1",
        }


async def add_bulk(bench: Bench, env: dict[str, str]) -> dict[str, Any]:
    """Run the program that adds mails to BullMQ; return what it says."""
    node, folder = bench.rivals.node()
    output = await run_to_end([node, "enqueue.js"], os.environ | env, folder)
    found: dict[str, Any] = json.loads(output)
    return found


@asynccontextmanager
async def rival_queue(
    bench: Bench,
    name: str,
    *,
    mails: int,
    senders: int,
    smtp_port: int | None = None,
    start: datetime | None = None,
    every: timedelta = timedelta(0),
) -> AsyncIterator[RivalQueue]:
    """Yield a rival whose queue has the mails, each `every` after the one before it."""
    async with bench.empty() as url:
        async with bench.connected(url) as connection:
            await connection.execute(_TABLE)
            await connection.execute(
                _ROWS, {"senders": senders, "mails": mails, "start": start, "every": every}
            )
            await connection.execute("ANALYZE")
        queue = RivalQueue(name, url, bench, smtp_port or bench.smtp_port)
        await queue.enqueue()
        yield queue
