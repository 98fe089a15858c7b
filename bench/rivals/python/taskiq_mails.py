"""taskiq with Redis lists, aiosmtplib and asyncpg. As a program it adds the rows to the queue."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import asyncpg
from mails import ROWS, PooledMailer  # type: ignore[import-not-found]
from taskiq import TaskiqEvents
from taskiq_redis import ListQueueBroker

broker = ListQueueBroker(os.environ["REDIS_URL"])
mailer = PooledMailer()


async def _open(_: Any) -> None:
    await mailer.open()


async def _close(_: Any) -> None:
    await mailer.close()


async def send(row: dict[str, Any]) -> None:
    """Send one mail."""
    await mailer.send(row)


broker.add_event_handler(TaskiqEvents.WORKER_STARTUP, _open)
broker.add_event_handler(TaskiqEvents.WORKER_SHUTDOWN, _close)
task = broker.task(send)


async def enqueue() -> None:
    """Add the rows of the table `mails`."""
    await broker.startup()
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    rows = [dict(row) for row in await connection.fetch(ROWS)]
    await connection.close()
    for first in range(0, len(rows), 200):
        await asyncio.gather(*(task.kiq(row) for row in rows[first : first + 200]))
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(enqueue())
