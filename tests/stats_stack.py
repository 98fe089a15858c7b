"""A stats service in this process, on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from outbox_server.services.stats.server import serve
from outbox_server.shared.settings import Settings, load_settings


@asynccontextmanager
async def running_stats(settings: Settings) -> AsyncIterator[str]:
    """Run a stats service; yield its address."""
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(settings, stop, ready=port.set_result))
        yield f"127.0.0.1:{await port}"
        stop.set()


@asynccontextmanager
async def stats_server(
    database_url: str, redis_url: str, **settings: Any
) -> AsyncIterator[grpc.aio.Channel]:
    """Run a stats service; `settings` are added to the usual ones."""
    loaded = load_settings(
        database_url=database_url,
        redis_url=redis_url,
        stats_listen="127.0.0.1:0",
        **{"auth": "off", **settings},
    )
    async with running_stats(loaded) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel
