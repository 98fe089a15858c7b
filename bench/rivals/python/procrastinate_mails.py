"""procrastinate and aiosmtplib: `enqueue` adds the rows to the queue, `work` sends them."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import asyncpg
import uvloop
from mails import ROWS, PooledMailer  # type: ignore[import-not-found]
from procrastinate import App, PsycopgConnector

app = App(connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"], max_size=20))
mailer = PooledMailer()


async def send(row: dict[str, Any]) -> None:
    """Send one mail."""
    await mailer.send(row)


task = app.task(name="send")(send)


async def enqueue() -> None:
    """Create the tables, and add the rows of the table `mails`."""
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        connection = await asyncpg.connect(os.environ["DATABASE_URL"])
        rows = [dict(row) for row in await connection.fetch(ROWS)]
        await connection.close()
        for first in range(0, len(rows), 1000):
            await task.batch_defer_async(*({"row": row} for row in rows[first : first + 1000]))


async def work() -> None:
    """Send until SIGTERM."""
    await mailer.open()
    async with app.open_async():
        await app.run_worker_async(
            concurrency=int(os.environ["CONCURRENCY"]), shutdown_graceful_timeout=2
        )
    await mailer.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["enqueue"]:
        asyncio.run(enqueue())
    else:
        uvloop.run(work())
