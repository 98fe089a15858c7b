"""A PgBouncer for a test, in front of a PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg

from outbox_server.deploy.embedded.pgbouncer import PgBouncer, pooler_folder
from tests.eventually import eventually


@asynccontextmanager
async def pooler(server_port: int, database: str, password: str) -> AsyncIterator[PgBouncer]:
    """Run a PgBouncer in front of a server."""
    with pooler_folder() as folder:
        bouncer = PgBouncer(folder, server_port, password, sessions=5)

        def reaches_the_server() -> bool:
            try:
                psycopg.connect(bouncer.url(database), connect_timeout=5).close()
            except psycopg.OperationalError:
                return False
            return True

        try:
            await bouncer.start()
            await eventually(lambda: asyncio.to_thread(reaches_the_server))
            yield bouncer
        finally:
            await bouncer.kill()
